# SPDX-License-Identifier: Apache-2.0
"""What the launchers of the persistent kernels share: forms of their arguments, and the rates that their models count with."""

from __future__ import annotations

from torch import Tensor

# Rates of a multiprocessor, per cycle: CUDA C++ programming guide, table of arithmetic throughput.
SHARED_BYTES = 128  # from shared memory
LANES, SPECIAL = 128, 16  # fp32 operations, and exponentials or roots
FUNCTIONS = ("tanh", "sigmoid", "exp", "expm1", "log", "log1p", "sqrt", "erf", "sin", "cos")  # an exponential and a root each
TENSOR_SHARE = 0.6  # of the tensor cores' peak rate that 16-row instructions reach; by others, on an H100


def bits(reverse: str) -> tuple[int, int]:
    """`reverse` as a bit mask over its shortest period, and that period."""
    lengths = (p for p in range(1, len(reverse) + 1) if reverse[:p] * (len(reverse) // p) == reverse)
    period = next(lengths, 1)
    return int(reverse[:period][::-1] or "0", 2), period


def rows(tensor: Tensor) -> Tensor:
    """The tensor with its last dimension contiguous, which is all that the kernels ask of it."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
