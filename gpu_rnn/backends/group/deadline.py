# SPDX-License-Identifier: Apache-2.0
"""A kernel that waits longer than its deadline gives up and says so in a word of the host's memory."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from gpu_rnn import memo
from gpu_rnn.backends.group.layout import Layout

MOST = 0xFFFF  # kernels that have a number: 16 bits of the word, and not 0

RUNNING = "a kernel that still runs may give up"

# By kernel, N and H.
_numbers: dict[tuple[Layout, int, int], int] = memo.hold(f"{__name__}._numbers", {}, MOST, stays=RUNNING)
# What a number was launched as last.
_launched: dict[int, tuple[Layout, torch.Size]] = memo.hold(f"{__name__}._launched", {}, MOST, stays=RUNNING)
_counter = itertools.count()
_errors: dict[torch.device, Tensor] = memo.hold(f"{__name__}._errors", {}, None, stays=RUNNING)


def number_of(layout: Layout, shape: torch.Size) -> int:
    """The number by which a kernel names itself where it gives up. `shape` is that of the gates, (T, B, N, G, H)."""
    key = (layout, shape[2], shape[4])
    number = _numbers.get(key)
    if number is None:
        if len(_numbers) >= MOST:
            _numbers.clear()
        number = _numbers[key] = next(_counter) % MOST + 1
    _launched[number] = layout, shape
    return number


def _name(number: int) -> str:
    """Of a kernel, with T and B of its last launch."""
    if number not in _launched:
        return "a kernel"
    layout, (steps, batch, n, _, hidden) = _launched[number]
    return (
        f"{layout.kernel} of {layout.parsed.name} (T {steps}, B {batch}, N {n}, H {hidden}, "
        f"{str(layout.dtype).removeprefix('torch.')}, {layout.members} blocks a group)"
    )


def error_word(device: torch.device) -> Tensor:
    """Where kernels on a device say that they gave up; the host reads it without waiting for them."""
    if device not in _errors:
        with torch.inference_mode(False):  # `check` writes to it, in whatever mode it is called
            _errors[device] = torch.zeros(1, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    return _errors[device]


def check() -> None:
    """Raises for a kernel that gave up waiting since the last call; all its results are NaN.

    A kernel that still runs is not waited for: synchronise the device first to be sure. The next call of the backend
    checks too.

    Raises:
        RuntimeError: a kernel passed its deadline; the message names it, its shape, the step and the group.

    Example::

        >>> import gpu_rnn
        >>> gpu_rnn.check()
    """
    for device, word in _errors.items():
        code = int(word[0]) & 0xFFFFFFFFFFFFFFFF
        if not code:
            continue
        word.zero_()
        raise RuntimeError(
            f"{_name(code >> 48)} on {device} gave up in step {code & 0xFFFFFFFF} of group {code >> 32 & 0xFFFF}: data "
            "of another block did not come within the deadline, and all its results are NaN. If the device was stopped "
            "that long (a debugger, time slicing), set GPU_RNN_DEADLINE to more seconds; else please report it."
        )
