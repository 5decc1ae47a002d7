# SPDX-License-Identifier: Apache-2.0
"""Which of torch.func's transforms, and whether forward-mode differentiation, are going on around a call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo import eval_frame
from torch._C._functorch import TransformType, get_interpreter_stack


def active() -> bool:
    """Whether a functorch transform or forward-mode differentiation is going on."""
    # Not peek_interpreter_stack: to Dynamo that is never None.
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def leaves_graph() -> bool:
    """Whether a transform that is going on keeps this call out of what torch.compile records: only vmap has a rule
    there. A frame that Dynamo has given up calls others, which it would look into, kernels' launches too."""
    return _derives() if torch.compiler.is_dynamo_compiling() else active() and looked_into()


def looked_into() -> bool:
    """Whether Dynamo looks into what is called from here on."""
    return torch.compiler.is_dynamo_compiling() or eval_frame.get_eval_frame_callback() is not None


def _derives() -> bool:
    kinds = {level.key() for level in get_interpreter_stack() or ()}
    return (
        not kinds.isdisjoint((TransformType.Grad, TransformType.Jvp)) or torch.autograd.forward_ad._current_level >= 0
    )


_derives._dynamo_marked_constant = True  # type: ignore[attr-defined]  # a graph has guards for its levels


def outside_of_graphs(function: Callable[..., Any], *args: Any) -> Any:
    """A call that Dynamo does not look into. (As a decorator `torch.compiler.disable` would import Dynamo.)"""
    return torch.compiler.disable(function)(*args)


outside_of_graphs._torchdynamo_disable = True  # type: ignore[attr-defined]
outside_of_graphs._torchdynamo_disable_msg = (  # type: ignore[attr-defined]
    "a derivative that torch.func takes of a recurrent layer runs outside of the graph: compile without "
    "fullgraph=True, or compile the function that torch.func takes the derivative of"
)


def forward_levels() -> int:
    """How many forward-mode transforms are nested. torch takes what a Function's jvp returns for a constant of the
    outer ones, so from two on only plain operations are right."""
    return sum(level.key() == TransformType.Jvp for level in get_interpreter_stack() or ())


def functionalizes() -> bool:
    """Whether torch.func.functionalize is among the transforms that are going on."""
    return any(level.key() == TransformType.Functionalize for level in get_interpreter_stack() or ())


def only_functionalizes() -> bool:
    """Whether it is the only one: no autograd.Function passes it, but the registered operations do."""
    levels = get_interpreter_stack() or ()
    return bool(levels) and all(level.key() == TransformType.Functionalize for level in levels)


def without_views(outputs: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """What a Function returns while forward-mode differentiation goes on: to a view torch gives no tangent that is laid
    out in memory in another way than it, as one that `jvp` computes may be."""
    if torch.autograd.forward_ad._current_level < 0:
        return tuple(outputs)
    return tuple(out.clone() if out._is_view() else out for out in outputs)
