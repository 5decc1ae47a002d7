# SPDX-License-Identifier: Apache-2.0
"""Second derivatives of a call whose backward pass has none, as cuDNN's or a loop's in C: the gradient is taken again
on another path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gpu_rnn.backends.tensors import Inputs
from gpu_rnn.call import autograd, onlookers, transforms
from gpu_rnn.call.passes import Options
from gpu_rnn.call.stack import Stack

TensorFunction = Callable[..., tuple[Tensor, ...]]


class _Twice(torch.autograd.Function):
    """(fast, exact, *tensors) -> outputs of ``fast(*tensors)``; under create_graph the gradient is that of `exact`."""

    @staticmethod
    def forward(ctx: Any, fast: TensorFunction, exact: TensorFunction, *tensors: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            ctx.leaves = [t.detach().requires_grad_(t.requires_grad) for t in tensors]
            ctx.outputs = fast(*ctx.leaves)
        ctx.exact = exact
        ctx.save_for_backward(*tensors)  # also notices when one is changed in place before backward
        return tuple(out.detach() for out in ctx.outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        if torch.is_grad_enabled():
            # Views: what one input owes to another, or to itself at another place, is not this call's to count.
            views = [t.view_as(t) for t in tensors]
            d_tensors = gradient(ctx.exact(*views), views, grads, retain_graph=True, create_graph=True)
        else:
            # Kept where the user keeps the graph: cuDNN would copy its reserve, and the memory of a call would outlive
            # it.
            keep = torch._C._autograd._get_current_graph_task_keep_graph()
            d_tensors = gradient(ctx.outputs, ctx.leaves, grads, retain_graph=keep)
            if not keep:
                del ctx.outputs, ctx.leaves
        return None, None, *d_tensors


def gradient(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], grads: Sequence[Tensor], **graph: bool
) -> list[Tensor | None]:
    """The gradients of those inputs that want one, None for the others."""
    wanted = [t for t in inputs if t.requires_grad]
    results = iter(torch.autograd.grad(outputs, wanted, grads, allow_unused=True, **graph))
    return [next(results) if t.requires_grad else None for t in inputs]


def needs_operations(grads: Sequence[Tensor | None]) -> bool:
    """Whether a backward pass must be torch's operations, which have derivatives, rules for transforms, and are seen:
    under create_graph, inside torch.func's transforms and forward-mode differentiation, of batched gradients or those
    of a class of their own, and where a mode looks on."""
    return (
        torch.is_grad_enabled()
        or transforms.active()
        or onlookers.watched(grads)
        or any(d is not None and torch._C._functorch.is_legacy_batchedtensor(d) for d in grads)
    )


def gradient_of(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], grads: Sequence[Tensor | None], create_graph: bool
) -> list[Tensor | None]:
    """`gradient` where some outputs, or all, have none that comes in; what comes in may have another shape."""
    pairs = [(out.view_as(d), d) for out, d in zip(outputs, grads, strict=True) if d is not None]
    if not pairs:
        return [None] * len(inputs)
    reached, incoming = zip(*pairs, strict=True)
    return gradient(reached, inputs, incoming, retain_graph=True, create_graph=create_graph)


def of_a_layer(
    stack: Stack,
    tensors: Sequence[Tensor],
    arranged: Callable[[Sequence[Tensor]], Inputs],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of one layer as the reference has them, which have derivatives of their own and rules for vmap.

    `arranged` makes of tensors like these what a layer takes; `grads` are those of y, the final states (B, N, ·) and,
    if they are wanted, the other states of all steps.
    """
    twice, text = torch.is_grad_enabled(), stack.recurrence.text(stack.recurrence.identity)
    options = Options("reference", stack.reverse, all_states=stack.all_states, rms=stack.rms)
    with torch.enable_grad():
        # Views: what one input owes to another, or to itself at another place, is not this call's to count.
        views = [t.view_as(t) for t in tensors]
        y, final, inner = autograd.layer(text, options, arranged(views))
        outputs = (y, *(state.transpose(0, 1) for state in final), inner)
        return gradient_of(outputs[: len(grads)], views, grads, twice)


def differentiable(fast: TensorFunction, exact: TensorFunction, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """``fast(*tensors)`` with its own first derivatives and the higher ones of `exact`, which computes the same."""
    return _Twice.apply(fast, exact, *tensors)
