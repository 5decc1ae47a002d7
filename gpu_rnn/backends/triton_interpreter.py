# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter (TRITON_INTERPRET=1), which runs kernels on the CPU, with its faults put right.

It multiplies the bit patterns of bfloat16 as if they were integers, and rounds to bfloat16 by cutting off, or with the
carry lost (seen in Triton 3.6 and 3.7). That of 3.6 cannot count to a number of steps with numpy 2.4.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from gpu_rnn.memo import memoize

NOT_INSTALLED = "Triton is not installed (it exists for Linux only)"
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"  # Triton decides at import too


def arithmetic() -> AbstractContextManager[Any]:
    """Inside, kernels compute as a GPU does: bfloat16 is right, and overflow gives infinity without a warning."""
    if not INTERPRETING:
        return nullcontext()
    _repair()
    return np.errstate(all="ignore")


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits of fp32 values rounded to the nearest bfloat16, ties to even."""
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """fp32 values from the bits of bfloat16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


@memoize(1, stays="a deed, no answer: a second one would repair what is repaired")
def _repair() -> None:
    from triton import language as tl
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot
    patch_tensor = interpreter._patch_lang_tensor

    def convert_float(values: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if (source, target) == (tl.float32, tl.bfloat16):
            return to_bfloat16(values)
        if (source, target) == (tl.bfloat16, tl.float32):
            return from_bfloat16(values).view(np.uint32)
        return convert(values, source, target, rounding)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (interpreter.TensorHandle(from_bfloat16(side.data), tl.float32) for side in (a, b))
        return dot(self, a, b, *rest)

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor
    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot
