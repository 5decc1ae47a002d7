# SPDX-License-Identifier: Apache-2.0
"""Cells under torch.compile and torch.export: ATen's operations, or plain ones, which a compiler fuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.utils._pytree import tree_leaves

import gpu_rnn

I, H = 3, 6  # noqa: E741
CELLS: dict[str, Any] = {
    "LSTM": lambda: gpu_rnn.LSTMCell(I, H),
    "GRU": lambda: gpu_rnn.GRUCell(I, H, bias=False),
    "RNN": lambda: gpu_rnn.RNNCell(I, H, nonlinearity="relu"),
    "peephole": lambda: gpu_rnn.LSTMCell(I, H, peephole=True),
    "other activation": lambda: gpu_rnn.GRUCell(I, H, activation="softsign"),
    "two products": lambda: gpu_rnn.GRUCell(I, H, reset_after=False),
    "heads": lambda: gpu_rnn.LSTMCell(I, H, heads=2, clip=0.5),
    "the reference": lambda: gpu_rnn.RNNCell(I, H, backend="reference"),
}


class Recorded:
    """A compiled function, and the operations of its graphs, those of the backward pass too."""

    def __init__(self, function: Any) -> None:
        self.operations: list[str] = []
        torch._dynamo.reset()
        self.call = torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=self._look))

    def _look(self, module: torch.fx.GraphModule, _: Any) -> Any:
        self.operations += [str(node.target) for node in module.graph.nodes if node.op == "call_function"]
        return make_boxed_func(module.forward)


def values_and_gradients(call: Any, cell: nn.Module, *given: Any) -> list[Tensor]:
    outputs = tree_leaves(call(*given))
    wanted = [*(tensor for tensor in tree_leaves(given) if tensor.requires_grad), *cell.parameters()]
    return [*outputs, *torch.autograd.grad(sum(out.square().sum() for out in outputs), wanted)]


@pytest.mark.parametrize("kind", CELLS)
def test_no_operation_is_ours(kind: str) -> None:
    cell = CELLS[kind]()
    fast = Recorded(cell)
    x = torch.randn(4, I, requires_grad=True)
    hx = [torch.randn(4, H, requires_grad=True) for _ in cell.recurrence.states]
    states = hx[0] if len(hx) == 1 else tuple(hx)
    for given in ((x,), (x, states)):
        torch.testing.assert_close(
            values_and_gradients(fast.call, cell, *given), values_and_gradients(cell, cell, *given)
        )
    assert fast.operations and not any("gpu_rnn" in name for name in fast.operations)


def test_another_backend_is_what_was_asked_for() -> None:
    cell = gpu_rnn.GRUCell(I, H, activation="softsign", backend="step")
    fast, x = Recorded(cell), torch.randn(4, I)
    torch.testing.assert_close(fast.call(x), cell(x))
    assert "gpu_rnn.stack_forward.default" in fast.operations


def test_transforms_inside() -> None:
    """Of plain operations torch.compile takes them all."""
    cell = gpu_rnn.LSTMCell(I, H, peephole=True)

    def loss(x: Tensor) -> Tensor:
        return cell(x)[0].square().sum()

    x = torch.randn(5, 2, I)
    each = torch.vmap(torch.func.grad(loss))
    torch.testing.assert_close(Recorded(each).call(x), each(x))


def test_autocast() -> None:
    cell, x = gpu_rnn.GRUCell(I, H, activation="softsign"), torch.randn(4, I)
    fast = Recorded(cell)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = cell(x), fast.call(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_standard_cells_are_exported_as_atens_operations(kind: str) -> None:
    program = torch.export.export(CELLS[kind](), (torch.randn(4, I),))
    assert not any("gpu_rnn" in str(node.target) for node in program.graph.nodes)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # Inductor's own
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_loop_that_inductor_compiles(mode: str) -> None:
    cell = gpu_rnn.LSTMCell(I, H, peephole=True)

    def loop(xs: Tensor) -> Tensor:
        state = None
        for x in xs.unbind(0):
            state = cell(x, state)
        return state[0]

    torch._dynamo.reset()
    xs = torch.randn(3, 4, I, requires_grad=True)
    fast = torch.compile(loop, fullgraph=True, mode=mode)
    torch.testing.assert_close(values_and_gradients(fast, cell, xs), values_and_gradients(loop, cell, xs))
