# SPDX-License-Identifier: Apache-2.0
"""What the launchers of the persistent kernels, resident and group, share: limits and forms of arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gpu_rnn.backends.problem import OF_ALL_LOOPS, Problem
from gpu_rnn.backends.tensors import Call, LoopGradients
from gpu_rnn.memo import memoize

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# The first architecture with bfloat16 products, asynchronous copies, and a maximum that passes NaN on.
OLDEST = (8, 0)
ALIGNMENT = 16  # bytes: kernels are compiled for tensors that begin at a multiple


def unsupported(problem: Problem, *more: str) -> list[str]:
    """What speaks against both kernels; `more`: options that one of them takes."""
    device, program, reasons = problem.device, problem.program, []
    if problem.proj_size and not program.h_only_enters_the_product:
        reasons.append(f"projects h (proj_size) where it enters the product alone, and {program.name} reads it itself")
    if device.is_gpu and device.capability < OLDEST:
        reasons.append(f"needs compute capability {OLDEST[0]}.{OLDEST[1]} or newer, which {device.name} has not")
    if problem.dtype not in DTYPES:
        reasons.append(f"takes float16, bfloat16 and float32, not {str(problem.dtype).removeprefix('torch.')}")
    return reasons + problem.without(*OF_ALL_LOOPS, *more)


def summed(call: Call, grads: LoopGradients) -> LoopGradients:
    """The gradients, those of per-unit parameters summed over the kernel's shares (shares, N, P, H)."""
    shares = grads.d_params if call.program.params else None
    return grads._replace(d_params=None if shares is None else shares.sum(0))


def beside(call: Call, gates: Tensor) -> tuple[Tensor, Tensor]:
    """The saved gates as a backward kernel reads them, and where their gradients go, with the same strides, gaps too:
    the kernels have one set of offsets for both. Gates that share memory, as vmap makes them, are copied: gradients do
    not."""
    gates = rows(gates)
    if call.d_gates is not None and call.d_gates.stride() == gates.stride():
        return gates, call.d_gates
    gates = gates.contiguous() if not gates.is_contiguous() and may_overlap(gates) else gates
    return gates, torch.empty_strided(gates.shape, gates.stride(), dtype=gates.dtype, device=gates.device)


def may_overlap(tensor: Tensor) -> bool:
    """Whether two elements may lie at one place, as those of an expanded tensor do; by strides alone, so true of some
    that interleave as well."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


@memoize(64)
def bits(reverse: str) -> tuple[int, int]:
    """`reverse` as a bit mask over its shortest period, and that period."""
    lengths = (p for p in range(1, len(reverse) + 1) if reverse[:p] * (len(reverse) // p) == reverse)
    period = next(lengths, 1)
    return int(reverse[:period][::-1] or "0", 2), period


def rows(tensor: Tensor) -> Tensor:
    """The tensor with its last dimension contiguous, which is all that the kernels ask of it."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


# Which build of a kernel runs depends on how its tensors lie. What comes from outside is brought to one form, so that a
# user's CUDA graph, which cannot load another build while it is captured, needs the one that the call before it had.


def whole(tensor: Tensor) -> Tensor:
    """The tensor contiguous and at a multiple of 16 bytes, which an allocation is and a part of one need not be."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def all_whole(tensors: Sequence[Tensor | None]) -> Sequence[Any]:
    """`whole` of each; where all are so already they are asked at once, as a frame for each is part of a short call."""
    lie_well = [t is None or (t.is_contiguous() and t.data_ptr() % ALIGNMENT == 0) for t in tensors]
    return tensors if False not in lie_well else [t if t is None else whole(t) for t in tensors]


def even_rows(tensor: Tensor) -> Tensor:
    """As `rows`, with rows that all lie at the multiples at which those of a contiguous tensor lie, up to 16
    elements."""
    apart, (*strides, last) = math.gcd(16, tensor.shape[-1]), tensor.stride()
    even = last == 1 and tensor.data_ptr() % ALIGNMENT == 0 and True not in [stride % apart != 0 for stride in strides]
    return tensor if even else tensor.clone(memory_format=torch.contiguous_format)
