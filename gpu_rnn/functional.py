# SPDX-License-Identifier: Apache-2.0
"""From a layer's call to a backend: describe the call, choose, and run the whole stack or layer by layer."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from gpu_rnn import autograd, dispatch, second_order
from gpu_rnn.launch import aten
from gpu_rnn.recurrence import Recurrence
from gpu_rnn.stack import Stack, States


def rnn(
    x: Tensor,
    hx: States | None,
    weights: Sequence[Tensor],
    recurrence: Recurrence,
    *,
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    proj_size: int = 0,
    backend: str = "auto",
) -> tuple[Tensor, States]:
    """Runs a stack of recurrent layers.

    Args:
        x: (T, B, I); (B, T, I) with `batch_first`; packed data (sum of batch_sizes, I) with `batch_sizes`.
        hx: one tensor per state of the recurrence, (D·num_layers, B, H); h has proj_size features with a projection.
            None: the recurrence's initial values.
        weights: for each layer and direction in torch's order: w_ih (G·H, I), w_hh (G·H, P), then b_ih and b_hh (G·H)
            with `bias`, w_hr (P, H) with `proj_size`, and (params, H) if the recurrence has per-unit parameters.
        recurrence: the cell.
        dropout, training: dropout between layers, in training.
        batch_sizes: (T,) int64 on the CPU, as in PackedSequence.
        backend: "auto" or a name from `gpu_rnn.dispatch.BACKENDS`.

    Returns:
        The h of every step, like x with D·P features, and the final states, shaped like hx.

    Raises:
        ValueError: a backend that does not exist or cannot run this call, with every reason.
        RuntimeError: no time steps; tensors on different devices.

    Example::

        >>> weights = [torch.randn(32, 3), torch.randn(32, 8), torch.zeros(32), torch.zeros(32)]
        >>> y, (h, c) = functional.rnn(torch.randn(5, 2, 3), None, weights, cells.lstm())
        >>> y.shape, c.shape
        (torch.Size([5, 2, 8]), torch.Size([1, 2, 8]))
    """
    stack = Stack(
        recurrence, bias, num_layers, dropout if training else 0.0, bidirectional, batch_first, proj_size, backend
    )
    return run(stack, x, hx, weights, batch_sizes)


def run(
    stack: Stack, x: Tensor, hx: States | None, weights: Sequence[Tensor], batch_sizes: Tensor | None
) -> tuple[Tensor, States]:
    """`rnn` with the arguments that do not change between a layer's calls in one."""
    steps, batch = stack.sizes(x, batch_sizes)
    if not torch.compiler.is_compiling():
        if x.is_cpu and _certainly_aten(stack, x):
            return stack.aten(x, hx or stack.initial(x, weights, batch), weights, batch_sizes)
        problem = stack.problem(x, hx, weights, steps, batch, batch_sizes is not None)
        if dispatch.select(problem, stack.backend) == "aten":
            states = hx or stack.initial(x, weights, batch)
            if x.is_cuda and problem.training and not stack.dropout:
                return _with_second_order(stack, x, states, weights, batch_sizes)
            return stack.aten(x, states, weights, batch_sizes)
    return stack.loops(x, hx or stack.initial(x, weights, batch), weights, batch_sizes)


def _certainly_aten(stack: Stack, x: Tensor) -> bool:
    """On a CPU ATen is the cheapest wherever it runs: no Problem is needed, and to make one takes 5 µs of a short call."""
    return (
        stack.recurrence.aten is not None
        and stack.backend in ("auto", "aten")
        and "GPU_RNN_BACKEND" not in os.environ
        and not x.is_complex()
        and not autograd.transforms_active()
    )


def _with_second_order(
    stack: Stack, x: Tensor, states: States, weights: Sequence[Tensor], batch_sizes: Tensor | None
) -> tuple[Tensor, States]:
    """ATen's kernels on a GPU, whose backward pass cannot be differentiated, with the loops for that."""
    count = 1 + len(states)

    def fast(*tensors: Tensor) -> tuple[Tensor, ...]:
        y, final = stack.aten(tensors[0], tensors[1:count], tensors[count:], batch_sizes)
        return (y, *final)

    def exact(*tensors: Tensor) -> tuple[Tensor, ...]:
        loops = stack._replace(backend="auto")
        y, final = loops.loops(tensors[0], tensors[1:count], tensors[count:], batch_sizes)
        return (y, *final)

    y, *final = second_order.differentiable(fast, exact, (x, *states, *weights))
    return y, tuple(final)


def cell(
    x: Tensor,
    hx: States | None,
    weights: Sequence[Tensor],
    recurrence: Recurrence,
    *,
    bias: bool = True,
    backend: str = "auto",
) -> States:
    """One step: x (B, I) and states (B, H) -> new states (B, H). Arguments and errors as `rnn`'s."""
    states = None if hx is None else tuple(state[None] for state in hx)
    if recurrence.aten and backend in ("auto", "aten") and not torch.compiler.is_compiling():
        if not autograd.transforms_active():
            given = hx or tuple(s[0] for s in Stack(recurrence, bias).initial(x[None], weights, x.shape[0]))
            biases = weights[2:] if bias else (None, None)
            found = aten.CELLS[recurrence.aten](x, given if len(given) > 1 else given[0], *weights[:2], *biases)
            return tuple(found) if len(given) > 1 else (found,)
    _, final = rnn(x[None], states, weights, recurrence, bias=bias, backend=backend)
    return tuple(state[0] for state in final)
