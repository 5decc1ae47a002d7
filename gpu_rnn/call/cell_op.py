# SPDX-License-Identifier: Apache-2.0
"""One step of one layer as `gpu_rnn::cell`: what torch.compile records of a cell that ATen lacks.

It is no operation to those below Dynamo: it comes apart into the reference's, which a compiler fuses with what stands
around the cell, and which have every derivative.
"""

from __future__ import annotations

from torch import Tensor

from gpu_rnn.call import heads, passes
from gpu_rnn.call.passes import Options
from gpu_rnn.call.stack_ops import STACK_LIBRARY, decode


def _step(x: Tensor, states: list[Tensor], weights: list[Tensor], program: str, words: str) -> list[Tensor]:
    """x (B, I), states (B, ·) -> the new states; `words` as `Stack.words` writes them."""
    stack, _ = decode(program, words)
    entering = [heads.apart(state.unsqueeze(1), stack.heads) for state in states]
    inputs = stack.inputs(x.unsqueeze(0), weights, 0, entering)
    primals = [primal for primal in inputs.primals if primal is not None]
    _, *leaving = passes.pure(program, Options("reference", stack.reverse), inputs)(*primals)
    return [heads.together(state, stack.heads).squeeze(1).clone() for state in leaving]


STACK_LIBRARY.define("cell(Tensor x, Tensor[] states, Tensor[] weights, str program, str options) -> Tensor[]", tags=())
STACK_LIBRARY.impl("cell", _step, "CompositeImplicitAutograd")
STACK_LIBRARY.impl("cell", _step, "FuncTorchBatchedDecomposition")  # which torch has for its own composite ones alone
