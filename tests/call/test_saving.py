# SPDX-License-Identifier: Apache-2.0
"""save="states": what is saved for the backward pass and what memory that takes, beside the same gradients."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import gpu_rnn
from benchmarks.measuring import saving
from gpu_rnn import functional
from gpu_rnn.backends import KERNELS
from tests.support import layers as support
from tests.support.cuda.machines import NEEDS_COMPILER

T, B, F, H = 13, 4, 6, 8
BACKENDS = ["step", "reference", pytest.param("native", marks=[pytest.mark.cuda_cpu, NEEDS_COMPILER])]
MADE: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {}),
    ("LSTM", {"num_layers": 3, "dropout": 0.5}),
    ("LSTM", {"bidirectional": True, "layer_norm": True, "num_layers": 2}),
    ("LSTM", {"proj_size": 3, "peephole": False, "recurrent_dropout": 0.3, "weight_drop": 0.2, "bias": False}),
    ("GRU", {"zoneout": 0.3, "recurrent_dropout": 0.3, "recurrent_dropout_per_gate": True}),
    ("GRU", {"reset_after": False, "bidirectional": True}),
    ("GRU", {"heads": 2, "rms_norm": True}),
    ("RNN", {"nonlinearity": "relu"}),
]


def pair(name: str, **options: Any) -> list[nn.Module]:
    """A layer that saves gates and the same that saves states, in float64."""
    layer = getattr(gpu_rnn, name)(F, H, dtype=torch.float64, **options)
    other = copy.deepcopy(layer)
    other.save = "states"
    return [layer, other]


def gradients(layer: nn.Module, call: Callable[..., Any], x: Tensor) -> list[Tensor]:
    """What a call gives, and its gradients; what is drawn is drawn alike."""
    torch.manual_seed(3)
    x = x.detach().clone().requires_grad_()
    y, *_ = call(layer, x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]


def agree(
    layers: list[nn.Module], call: Callable[..., Any] = lambda layer, x: layer(x), x: Tensor | None = None
) -> None:
    x = support.draw(T, B, F) if x is None else x
    torch.testing.assert_close(*(gradients(layer, call, x) for layer in layers), **support.TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "options"), MADE)
def test_gradients_are_the_same(backend: str, name: str, options: dict[str, Any]) -> None:
    layers = pair(name, backend=backend, **options)
    agree(layers, lambda layer, x: layer(x, lengths=[T, 3, 0, 7]))
    agree(layers, lambda layer, x: layer(x, mask=(x[..., 0] > 0).detach(), resets=(x[..., 1] > 1).detach()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "options"), MADE)
def test_states_alone_are_saved(backend: str, name: str, options: dict[str, Any]) -> None:
    """As many bytes as `explain` says, and beside them what the call was given."""
    gates, states = pair(name, backend=backend, **options)
    x = support.draw(T, B, F).requires_grad_()
    given = [x, *states.parameters()]
    saved = [saving.saved(lambda layer=layer: layer(x), given) for layer in (gates, states)]
    assert saved[1] < saved[0]
    said = gpu_rnn.explain(states, x).saved
    assert said is not None and said.states <= saved[1]
    assert "are made again" in str(gpu_rnn.explain(states, x))
    if not {"dropout", "recurrent_dropout", "zoneout", "bidirectional", "heads", "num_layers"} & options.keys():
        initial = 8 * B * H * len(states.recurrence.states)
        assert saved[1] <= said.states + initial
        assert backend == "reference" or saved[0] >= said.states + said.gates


def test_explain_says_what_is_saved() -> None:
    x = torch.empty(1000, 64, 512, device="meta", dtype=torch.bfloat16)
    words = {}
    for save in ("gates", "states"):
        layer = gpu_rnn.LSTM(512, 512, 2, device="meta", dtype=torch.bfloat16, save=save)
        explanation = gpu_rnn.explain(layer, x, device="H100")
        assert explanation.chosen in KERNELS and (not explanation.chunks or save == "gates")
        assert explanation.saved == (2 * 1000 * 64 * 512 * (2 + 4), 2 * 1000 * 64 * 512 * 4 * 2)
        words[save] = next(line for line in str(explanation).splitlines() if line.startswith("saved"))
    assert words["gates"] == "saved for the backward pass: states 393.2 MB, gates 524.3 MB"
    assert words["states"].startswith("saved for the backward pass: states 393.2 MB; gates, 262.1 MB a layer, are made")
    assert "saved" not in str(gpu_rnn.explain(layer.requires_grad_(False), x, device="H100")).replace("saving", "")


def test_explain_of_a_cpu_says_what_is_saved_and_no_time() -> None:
    """Nobody described a CPU's memory: what making the gates again takes there is not modelled."""
    layer = gpu_rnn.LSTM(F, H, 4, save="states")
    for device in (None, "CPU"):
        lines = str(gpu_rnn.explain(layer, device=device)).splitlines()
        assert [line[-24:] for line in lines if line.startswith("saved")] == [" a layer, are made again"]


@pytest.mark.filterwarnings("ignore:.*Profiler clears events:UserWarning")  # torch 2.11's own
def test_memory_falls() -> None:
    """Most of what a stack holds at once, at its peak in the backward pass too."""
    peaks = []
    for layer in pair("LSTM", num_layers=6, backend="step"):
        x = support.draw(60, 8, F)
        layer(x)[0].sum().backward()
        peaks.append(saving.peak(lambda layer=layer, x=x: layer(x)[0].sum().backward()))
    one = 8 * 60 * 8 * H * 4  # bytes of a layer's gates
    assert peaks[0] - peaks[1] > 4 * one


def test_second_derivatives() -> None:
    for backend in ("step", "auto"):
        _, layer = pair("GRU", backend=backend)
        x = support.draw(2, 1, F).requires_grad_()
        assert torch.autograd.gradcheck(lambda v, layer=layer: layer(v)[0], x)
        assert torch.autograd.gradgradcheck(lambda v, layer=layer: layer(v)[0], x)


def test_twice_backward_and_checkpoints() -> None:
    layers = pair("LSTM", num_layers=2)
    agree(layers, lambda layer, x: checkpoint(layer, x, use_reentrant=False))
    y = layers[1](support.draw(T, B, F))[0].sum()
    first = torch.autograd.grad(y, [*layers[1].parameters()], retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(y, [*layers[1].parameters()]), first)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own jvp
def test_transforms() -> None:
    gates, states = pair("LSTM")
    x, members = support.draw(T, B, F), support.draw(3, T, B, F)

    def of(layer: nn.Module) -> list[Tensor]:
        def loss(x: Tensor) -> Tensor:
            return layer(x)[0].square().sum()

        return [
            torch.func.grad(loss)(x),
            torch.func.vmap(torch.func.grad(loss))(members),
            torch.func.jvp(loss, (x,), (x,))[1],
            torch.func.vmap(lambda v: layer(v)[0])(members),
        ]

    torch.testing.assert_close(of(states), of(gates), **support.TOLERANCE)


def test_packed_and_all_states_and_one_step() -> None:
    def packed(layer: nn.Module, x: Tensor) -> Any:
        given = pack_padded_sequence(x, torch.tensor([5, T, 1, 9]), enforce_sorted=False)
        return pad_packed_sequence(layer(given)[0])

    def every(layer: nn.Module, x: Tensor) -> Any:
        y, _, states = layer(x, return_all_states=True)
        return (torch.cat([y.flatten(), *(state.flatten() for state in states)]),)

    for name in ("LSTM", "GRU"):
        layers = pair(name, bidirectional=True)
        agree(layers, packed)
        agree(layers, every)
        agree(layers, x=support.draw(1, B, F))


def test_parallel_in_time() -> None:
    layers = pair("GRU", backend="step")
    agree(layers, lambda layer, x: layer(x, time_parallel=1e-12), support.draw(64, 1, F))


@pytest.mark.parametrize("backend", ["step", "auto"])
def test_recorded(backend: str) -> None:
    """Under torch.compile, and in an exported program, which saves nothing at all."""
    _, layer = pair("GRU", num_layers=2, backend=backend)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    agree([layer, compiled])
    agree([layer, compiled], lambda layer, x: layer(x, mask=(x[..., 0] > 0).detach()))
    program = torch.export.export(layer, (support.draw(T, B, F),)).module()
    x = support.draw(T, B, F)
    torch.testing.assert_close(program(x), layer(x), **support.TOLERANCE)


def test_an_operation_that_saved_no_states_is_refused() -> None:
    """What rebuilds reads them, so their shapes are checked."""
    x = support.draw(T, B, F).requires_grad_()
    weights = [support.draw(1, 4, H, F), support.draw(1, 4, H, H), None, None, *[None] * 5, *[None] * 5]
    states = [torch.zeros(B, 1, H, dtype=torch.float64)] * 2
    program = gpu_rnn.cells.lstm().text()
    y, h, c, gates, recurrent, inner = torch.ops.gpu_rnn.rnn(x, *weights, states, None, program, "step 0 states y")
    assert gates.numel() == recurrent.numel() == 0 and inner.shape == (1, T, B, 1, H)
    saved = [y, gates, recurrent, inner[:, :, :, :, :-1]]
    with pytest.raises(ValueError, match="inner"):
        torch.ops.gpu_rnn.rnn_backward([y, h, c], saved, x, *weights, states, None, program, "step 0 states y")


def test_autocast() -> None:
    """What is rounded to 8 bits once more is off by no more than gates that were saved: within twice as much."""
    layers = pair("GRU", backend="step")
    exact = gradients(layers[0], lambda layer, x: layer(x), support.draw(T, B, F))
    errors = []
    for layer in layers:
        with torch.autocast("cpu", torch.bfloat16):
            found = gradients(layer.float(), lambda layer, x: layer(x), support.draw(T, B, F).float())
        errors.append([(a - b).norm() for a, b in zip(found, exact, strict=True)])
    assert all(states <= 2 * gates for gates, states in zip(*errors, strict=True)), errors


def test_the_option() -> None:
    layer = gpu_rnn.LSTM(F, H, save="states")
    assert "save=states" in repr(layer) and layer.state_dict().keys() == nn.LSTM(F, H).state_dict().keys()
    assert pickle.loads(pickle.dumps(layer)).save == copy.deepcopy(layer).save == "states"
    model = nn.Sequential(nn.LSTM(F, H))
    gpu_rnn.convert(model, save="states")
    assert model[0].save == "states"
    for wrong in ("state", None, True):
        with pytest.raises(ValueError, match="save is 'gates' or 'states'"):
            gpu_rnn.GRU(F, H, save=wrong)
        with pytest.raises(ValueError, match="save is 'gates' or 'states'"):
            layer.save = wrong
    weights = [p.detach().requires_grad_() for p in layer.parameters()]
    with pytest.raises(ValueError, match="save is 'gates' or 'states'"):
        functional.rnn(torch.randn(T, B, F), None, weights, layer.recurrence, save="all")
    with pytest.raises(ValueError, match="does not take saving states alone"):
        gpu_rnn.LSTM(F, H, save="states", backend="aten")(torch.randn(T, B, F))
    with torch.no_grad():
        assert gpu_rnn.LSTM(F, H, save="states", backend="aten")(torch.randn(T, B, F))[0].shape == (T, B, H)
