# SPDX-License-Identifier: Apache-2.0
"""The functions of math.py with the hardware's tanh, of a relative error of 2^-11 at most (PTX ISA, `tanh.approx.f32`):
one instruction, where an exponential and a root take six and more. The interpreter has no such instruction.

A value near 1 is off by 2^-11 then, and rounds to bfloat16 by up to 2^-9, to float16 by up to 2^-12.
"""

import triton
import triton.language as tl
from gpu_rnn.kernels.triton.math import clamp, expm1, log1p, maximum, minimum, sign

__all__ = ["clamp", "expm1", "log1p", "maximum", "minimum", "sigmoid", "sign", "tanh"]


@triton.jit
def tanh(x):
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def sigmoid(x):
    """Off by 2^-12 at most, far down its left tail too, where it becomes 0."""
    return 0.5 * tanh(0.5 * x) + 0.5
