# SPDX-License-Identifier: Apache-2.0
"""A kernel's arguments by name, in the order of its own signature in CUDA C++."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.resources import files
from typing import TypeVar

from gpu_rnn.memo import memoize

A = TypeVar("A")


def parameters(text: str, kernel: str) -> tuple[str, ...]:
    """The names of a kernel's parameters, in order.

    Raises:
        ValueError: the text defines no such kernel.

    Example::

        >>> parameters('extern "C" __global__ void zero(float *p, /* of p */ int count) { }', "zero")
        ('p', 'count')
    """
    bare = re.sub(r"//.*|/\*.*?\*/", "", text)
    match = re.search(rf"__global__ .*?\b{kernel}\s*\(([^()]*)\)\s*{{", bare, re.S)
    if match is None:
        raise ValueError(f"this text defines no kernel {kernel}")
    return tuple(declared.split()[-1].lstrip("*&") for declared in match[1].split(","))


@memoize(16)
def shipped(kernel: str) -> tuple[str, ...]:
    """The names of the parameters of a kernel in `kernels/cuda`."""
    return parameters((files("gpu_rnn.kernels.cuda") / f"{kernel}.cu").read_text(), kernel)


def ordered(kernel: str, names: tuple[str, ...], arguments: Mapping[str, A]) -> tuple[A, ...]:
    """The arguments in the order of a kernel's parameters.

    Raises:
        TypeError: one is missing, or the kernel has no parameter of that name.
    """
    if arguments.keys() == set(names):
        return tuple(arguments[name] for name in names)
    missing = [name for name in names if name not in arguments]
    foreign = [name for name in arguments if name not in names]
    said = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has no {', '.join(foreign)}"] * bool(foreign)
    raise TypeError(f"{kernel} {' and '.join(said)}: its parameters are {', '.join(names)}")
