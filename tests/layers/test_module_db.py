# SPDX-License-Identifier: Apache-2.0
"""Every sample and error sample of torch's own module database, in float64, on torch.nn's modules and on ours."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_function
from torch._functorch.compilers import nop
from torch.utils._pytree import tree_map

import gpu_rnn
from tests.support import layers as support

with warnings.catch_warnings():
    warnings.simplefilter("ignore", ImportWarning)  # it would like to have hypothesis; expecttest it must have
    from torch.testing._internal import common_modules
    from torch.testing._internal.common_modules import (
        ErrorModuleInput,
        ModuleErrorEnum,
        ModuleInfo,
        ModuleInput,
    )

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

NAMES = (*support.LAYERS, *support.CELLS)
INFOS = {info.module_cls.__name__: info for info in common_modules.module_db if info.module_cls.__name__ in NAMES}
MAKE = {"device": "cpu", "dtype": torch.float64, "requires_grad": True}


def samples(info: ModuleInfo, training: bool) -> Iterator[ModuleInput]:
    yield from info.module_inputs_func(info, training=training, **MAKE)
    if info.module_cls in (nn.RNN, nn.GRU):
        options = MAKE | {"training": training, "with_packed_sequence": True}
        yield from (s for s in info.module_inputs_func(info, **options) if is_packed(s))


def is_packed(sample: ModuleInput) -> bool:
    return isinstance(sample.forward_input.args[0], nn.utils.rnn.PackedSequence)


def call(module: nn.Module, sample: ModuleInput) -> Any:
    return module(*sample.forward_input.args, **sample.forward_input.kwargs)


def derivatives(module: nn.Module, sample: ModuleInput) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Outputs, first gradients, and the gradients of a random sum of those, by inputs and parameters."""
    outputs = support.leaves(call(module, sample))
    wanted = [*support.leaves(sample.forward_input.args), *module.parameters()]
    options = {"allow_unused": True, "materialize_grads": True}
    first = torch.autograd.grad(weigh(outputs), wanted, create_graph=True, **options)
    return outputs, list(first), list(torch.autograd.grad(weigh(first), wanted, **options))


def weigh(tensors: Any) -> Tensor:
    return sum((tensor * support.draw(*tensor.shape, seed=i)).sum() for i, tensor in enumerate(tensors))


def build(sample: ModuleInput, name: str, training: bool, **options: Any) -> tuple[nn.Module, nn.Module]:
    args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
    theirs, mine = support.pair(name, *args, ours=options, **kwargs)
    return theirs.train(training), mine.train(training)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_samples(name: str, training: bool, backend: str) -> None:
    tried = 0
    for sample in samples(INFOS[name], training):
        theirs, mine = build(sample, name, training, backend=backend)
        torch.testing.assert_close(derivatives(mine, sample), derivatives(theirs, sample), **support.TOLERANCE)
        if not is_packed(sample):  # torch's own reference for these samples fails on PackedSequence
            assert_reference(mine, sample)
        tried += 1
    assert tried


def assert_reference(mine: nn.Module, sample: ModuleInput) -> None:
    args, kwargs = sample.forward_input.args, sample.forward_input.kwargs
    expected = sample.reference_fn(mine, *args, **kwargs)
    torch.testing.assert_close(call(mine, sample), expected, **support.TOLERANCE)


def error_samples() -> list[Any]:
    found = []
    for name, training in itertools.product(NAMES, [True, False]):
        info = INFOS[name]
        for i, sample in enumerate(info.module_error_inputs_func(info, training=training, **MAKE)):
            found.append(pytest.param(name, training, sample, id=f"{name}-{'train' if training else 'eval'}-{i}"))
    return found


def outcome(constructor: Callable[..., nn.Module], sample: ErrorModuleInput, training: bool) -> None:
    inner = sample.module_error_input
    kwargs = {"dtype": torch.float64, **inner.constructor_input.kwargs}
    if sample.error_on is ModuleErrorEnum.CONSTRUCTION_ERROR:
        with pytest.raises(sample.error_type, match=sample.error_regex):
            constructor(*inner.constructor_input.args, **kwargs)
        return
    module = constructor(*inner.constructor_input.args, **kwargs).train(training)
    with pytest.raises(sample.error_type, match=sample.error_regex):
        call(module, inner)


@pytest.mark.parametrize(("name", "training", "sample"), error_samples())
def test_error_samples(name: str, training: bool, sample: ErrorModuleInput) -> None:
    outcome(getattr(nn, name), sample, training)
    outcome(getattr(gpu_rnn, name), sample, training)


@pytest.mark.parametrize("every", [17, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", support.LAYERS)
def test_graphs_of_symbols(name: str, training: bool, every: int) -> None:
    """AOTAutograd with symbolic sizes, as torch's own suite checks each module of its database: outputs and
    gradients."""
    info = INFOS[name]
    for sample in list(info.module_inputs_func(info, training=training, **MAKE))[::every]:
        options = sample.constructor_input
        module = getattr(gpu_rnn, name)(*options.args, **options.kwargs).double().train(training)
        parameters = dict(module.named_parameters())
        inputs = support.leaves(sample.forward_input.args)

        def function(
            parameters: dict[str, Tensor],
            inputs: list[Tensor],
            module: nn.Module = module,
            sample: ModuleInput = sample,
        ) -> Any:
            own = iter(inputs)
            args = tree_map(lambda value: next(own) if isinstance(value, Tensor) else value, sample.forward_input.args)
            return torch.func.functional_call(module, parameters, args, sample.forward_input.kwargs)

        graph = aot_function(function, nop, num_params_buffers=len(parameters), dynamic=True)
        results = []
        for run in (graph, function):
            outputs = support.leaves(run(parameters, inputs))
            results.append([*outputs, *torch.autograd.grad(weigh(outputs), [*inputs, *parameters.values()])])
        torch.testing.assert_close(*results)
