# SPDX-License-Identifier: Apache-2.0
"""kernels/triton/fast_math.py as bad as PTX lets it be, for the interpreter: tanh off by its whole relative error."""

import triton
import triton.language as tl
from gpu_rnn.kernels.triton import math
from gpu_rnn.kernels.triton.math import clamp, expm1, log1p, maximum, minimum, sign

__all__ = ["ERROR", "clamp", "expm1", "log1p", "maximum", "minimum", "sigmoid", "sign", "tanh"]

LARGEST = 2.0**-11  # PTX ISA, tanh.approx.f32
ERROR = tl.constexpr(LARGEST)  # a test turns its sign


@triton.jit
def tanh(x):
    return math.tanh(x) * (1.0 + ERROR)


@triton.jit
def sigmoid(x):
    return 0.5 * tanh(0.5 * x) + 0.5
