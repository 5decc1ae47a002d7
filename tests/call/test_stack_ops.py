# SPDX-License-Identifier: Apache-2.0
"""Plain calls under torch.compile: one operation, which runs as an eager call does."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._functorch.config
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import tree_leaves

import gpu_rnn
from gpu_rnn import cells
from gpu_rnn.call import stack_ops

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

I, H = 3, 5  # noqa: E741
LAYERS: dict[str, Any] = {
    "aten": lambda: gpu_rnn.LSTM(I, H, 2, bidirectional=True, backend="aten"),
    "aten with the batch first": lambda: gpu_rnn.GRU(I, H, batch_first=True, backend="aten"),
    "two products": lambda: gpu_rnn.GRU(I, H, reset_after=False),
    "step": lambda: gpu_rnn.LSTM(I, H, proj_size=2, bias=False, backend="step"),
    "own choice": lambda: gpu_rnn.Recurrent(cells.slstm(), I, H, 2),
    "normalised": lambda: gpu_rnn.LSTM(I, H, layer_norm=True),
}


def values_and_gradients(call: Any, layer: nn.Module, x: Tensor) -> list[Tensor]:
    outputs = tree_leaves(call(x))
    total = sum((out * torch.arange(1.0, out.numel() + 1).view(out.shape).sin()).sum() for out in outputs)
    return [*outputs, *torch.autograd.grad(total, [x, *layer.parameters()])]


def compiled(layer: nn.Module, backend: str = "aot_eager") -> Any:
    torch._dynamo.reset()
    return torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)


@pytest.mark.parametrize("kind", LAYERS)
def test_it_is_the_eager_call(kind: str) -> None:
    layer = LAYERS[kind]()
    fast = compiled(layer)
    # ATen takes the products of a batch that comes first in another order than of one that is turned outside.
    close = {"rtol": 1e-4, "atol": 1e-6} if layer.batch_first else {"rtol": 0, "atol": 0}
    for sizes in ((6, 4), (9, 2)):
        x = torch.randn(*sizes, I, requires_grad=True)
        expected = values_and_gradients(layer, layer, x)
        torch.testing.assert_close(values_and_gradients(fast, layer, x), expected, **close)
        with torch.no_grad():
            torch.testing.assert_close(tree_leaves(fast(x)), tree_leaves(layer(x)), **close)
    assert not stack_ops._calls


def test_only_what_is_wanted() -> None:
    """Frozen weights get no gradient, and what has none yet needs none."""
    layer = gpu_rnn.GRU(I, H)
    layer.weight_ih_l0.requires_grad_(False)
    fast, x, h = compiled(layer), torch.randn(4, 2, I), torch.randn(1, 2, H, requires_grad=True)
    wanted = [h, layer.weight_hh_l0, layer.bias_hh_l0]
    for number in (0, 1):  # of y alone, of the final state alone
        expected = torch.autograd.grad(layer(x, h)[number].square().sum(), wanted)
        torch.testing.assert_close(torch.autograd.grad(fast(x, h)[number].square().sum(), wanted), expected)


def test_a_backward_pass_that_runs_twice() -> None:
    layer = gpu_rnn.LSTM(I, H)
    with torch._functorch.config.patch(donated_buffer=False):  # torch asks for it
        total = compiled(layer)(torch.randn(4, 2, I))[0].square().sum()
        first, second = (torch.autograd.grad(total, [*layer.parameters()], retain_graph=True) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["aten", "two products"])
def test_second_derivatives_where_nothing_is_compiled_below(kind: str) -> None:
    """Under Dynamo alone, as in an exported call of ATen's, autograd meets the operation itself."""
    layer, x = LAYERS[kind](), torch.randn(4, 2, I, requires_grad=True)
    found = []
    for call in (layer, compiled(layer, "eager")):
        y, wanted = tree_leaves(call(x))[0], [x, *layer.parameters()]
        first = torch.autograd.grad(y.square().sum(), wanted, create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(d.square().sum() for d in first), wanted)])
    torch.testing.assert_close(found[1], found[0])


def test_what_nobody_comes_for_goes() -> None:
    layer = gpu_rnn.LSTM(I, H)
    fast, x = compiled(layer), torch.randn(4, 2, I)
    y = fast(x)[0]
    assert len(stack_ops._calls) == 1
    del y
    gc.collect()
    assert not stack_ops._calls
    fast(x)[0].sum().backward()
    assert not stack_ops._calls


@pytest.mark.parametrize("kind", LAYERS)
def test_a_compiler_may_write_to_what_it_was_handed(kind: str) -> None:
    """Inductor puts a result where an operand lay that nobody wants any more, and no version tells of it."""
    layer, x = LAYERS[kind](), torch.randn(6, 4, I)
    stack = replace(layer._stack(), batch_first=False)
    given = x, None, list(layer._weights()), stack.recurrence.text(stack.recurrence.identity), stack.words("xw")
    found = []
    for value in (None, 7.0):
        *outputs, token = torch.ops.gpu_rnn.stack_forward(*given)
        incoming = [torch.ones_like(output) for output in outputs]
        for output in outputs if value else ():
            output.data.fill_(value)
        found.append(torch.ops.gpu_rnn.stack_backward(incoming, token, *given))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


@pytest.mark.parametrize("place", ["x", "states"])
def test_a_graph_may_make_operands_again(place: str) -> None:
    """Under a budget of memory it keeps neither x nor states, writes where they lay, and makes them anew."""
    layer, x, states = gpu_rnn.LSTM(I, H), torch.randn(6, 4, I), [torch.randn(1, 4, H) for _ in "hc"]
    stack, found = layer._stack(), []
    text, words = stack.recurrence.text(stack.recurrence.identity), stack.words("xsw")
    for again in (False, True):
        given = [x.clone(), [state.clone() for state in states], list(layer._weights()), text, words]
        *outputs, token = torch.ops.gpu_rnn.stack_forward(*given)
        if again:
            for lost in given[:1] if place == "x" else given[1]:
                lost.data.fill_(7.0)
            given[:2] = x, states
        incoming = [torch.ones_like(output) for output in outputs]
        found.append(torch.ops.gpu_rnn.stack_backward(incoming, token, *given))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_an_exported_call_of_aten() -> None:
    layer = gpu_rnn.LSTM(I, H, 2, backend="aten").eval()
    steps, batch = torch.export.Dim("steps"), torch.export.Dim("batch")
    x = torch.randn(6, 4, I, requires_grad=True)
    module = torch.export.export(layer, (x,), dynamic_shapes=({0: steps, 1: batch},)).module()
    for sizes in ((6, 4), (9, 2)):
        x = torch.randn(*sizes, I, requires_grad=True)
        expected = values_and_gradients(layer, layer, x)
        own = dict(module.named_parameters())
        outputs = tree_leaves(module(x))
        torch.testing.assert_close(outputs, expected[: len(outputs)])
        total = sum((out * torch.arange(1.0, out.numel() + 1).view(out.shape).sin()).sum() for out in outputs)
        given = torch.autograd.grad(total, [x, *(own[name] for name, _ in layer.named_parameters())])
        torch.testing.assert_close(list(given), expected[len(outputs) :])


@pytest.mark.parametrize("words", ["auto", "auto 1 0 1 bias", "auto 1 0 1 bias kept:q", "none 1 0 1 kept:"])
def test_words_that_are_none(words: str) -> None:
    with pytest.raises(ValueError, match=r"read like|backend"):
        stack_ops.decode(cells.lstm().text(), words)


PACKED: dict[str, Any] = {
    "two directions": lambda: gpu_rnn.LSTM(I, H, 2, bidirectional=True),
    "aten": lambda: gpu_rnn.GRU(I, H, backend="aten"),
    "options": lambda: gpu_rnn.LSTM(I, H, layer_norm=True, batch_first=True, backend="step"),
}
LENGTHS = (6, 4, 2), (2, 6, 4), (5, 3, 3, 1), (1, 7, 7)  # sorted, and not


def packed_values_and_gradients(call: Any, layer: nn.Module, lengths: tuple[int, ...], hx: Any) -> list[Tensor]:
    x = torch.randn(
        max(lengths), len(lengths), I, generator=torch.Generator().manual_seed(len(lengths)), requires_grad=True
    )
    y, states = call(pack_padded_sequence(x, lengths, enforce_sorted=sorted(lengths, reverse=True) == [*lengths]), hx)
    assert isinstance(y, PackedSequence)
    outputs = [y.data, *tree_leaves(states)]
    total = sum((out * torch.arange(1.0, out.numel() + 1).view(out.shape).sin()).sum() for out in outputs)
    return [*outputs, *torch.autograd.grad(total, [x, *layer.parameters()])]


def check_packed(layer: nn.Module, fast: Any, hx: Any = None) -> None:
    for lengths in LENGTHS if hx is None else LENGTHS[:2]:
        found, expected = (packed_values_and_gradients(call, layer, lengths, hx) for call in (fast, layer))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, as it looks at what a graph takes
@pytest.mark.parametrize("kind", PACKED)
def test_packed(kind: str) -> None:
    """In one graph, which knows no lengths."""
    layer = PACKED[kind]()
    fast = compiled(layer)
    check_packed(layer, fast)
    if kind == "aten":
        check_packed(layer, fast, torch.randn(1, 3, H))
        with pytest.raises(RuntimeError, match="Expected states of batch 3"):
            fast(pack_padded_sequence(torch.randn(6, 3, I), LENGTHS[0]), torch.randn(1, 2, H))


def over_members(layer: nn.Module) -> Any:
    def of_each(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, weights, (x,))[0]

    return lambda x, weights: torch.vmap(of_each, in_dims=(0, 0 if weights else None))(x, weights)


@pytest.mark.parametrize("ensemble", [False, True])
def test_vmap_inside(ensemble: bool) -> None:
    """Over inputs, and over weights too."""
    torch._dynamo.reset()
    layer = gpu_rnn.LSTM(I, H, layer_norm=True)
    weights = {name: torch.stack([w.detach(), 2 * w.detach()]) for name, w in layer.named_parameters()}
    x, members = torch.randn(2, 6, 4, I), over_members(layer)
    fast = torch.compile(members, fullgraph=True, backend="aot_eager")
    results = [function(x, weights if ensemble else {}) for function in (members, fast)]
    torch.testing.assert_close(*results)
    if not ensemble:
        expected, found = (torch.autograd.grad(y.square().sum(), [*layer.parameters()]) for y in results)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wanted", ["", "xw"])
def test_opcheck(wanted: str) -> None:
    layer = gpu_rnn.LSTM(I, H, 2)
    arguments = (
        torch.randn(4, 2, I),
        None,
        [*layer.parameters()],
        layer.recurrence.text(),
        f"auto 2 0 1 bias kept:{wanted}",
    )
    # The number of a call is another one each time: the tests that compare results know no such thing.
    torch.library.opcheck(torch.ops.gpu_rnn.stack.default, arguments, test_utils=["test_schema", "test_faketensor"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # Inductor's own
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor(mode: str) -> None:
    torch._dynamo.reset()
    layer = nn.Sequential(nn.Linear(I, I), gpu_rnn.LSTM(I, H, 2))
    fast = torch.compile(layer, fullgraph=True, mode=mode)
    for sizes in ((6, 4), (9, 2)):
        x = torch.randn(*sizes, I, requires_grad=True)
        torch.testing.assert_close(values_and_gradients(fast, layer, x), values_and_gradients(layer, layer, x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")
def test_inductor_writes_where_x_lay() -> None:
    torch._dynamo.reset()
    layer, x = gpu_rnn.LSTM(8, 8), torch.randn(6, 4, 1, requires_grad=True)

    def wide(x: Tensor) -> tuple[Tensor, ...]:
        y, _ = layer(2 * x.expand(6, 4, 8) + 1)
        return y.sin(), y.cos(), y.exp()

    expected = values_and_gradients(wide, layer, x)
    with torch._functorch.config.patch(activation_memory_budget=0.5):
        torch.testing.assert_close(
            values_and_gradients(torch.compile(wide, fullgraph=True), layer, x), expected, rtol=1e-4, atol=1e-4
        )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")
def test_inductor_writes_where_y_lay() -> None:
    torch._dynamo.reset()
    layer, x = gpu_rnn.LSTM(I, H), torch.randn(6, 4, I, requires_grad=True)

    def scaled(x: Tensor) -> Tensor:
        return 2 * layer(x)[0] + 1

    fast = torch.compile(scaled, fullgraph=True)
    torch.testing.assert_close(values_and_gradients(fast, layer, x), values_and_gradients(scaled, layer, x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("kind", PACKED)
def test_packed_by_inductor(kind: str) -> None:
    layer = PACKED[kind]()
    check_packed(layer, compiled(layer, "inductor"))
