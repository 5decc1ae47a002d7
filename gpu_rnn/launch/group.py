# SPDX-License-Identifier: Apache-2.0
"""Groups of blocks share a tile of the batch and keep W_hh on chip between them (`kernels/cuda/group_*.cu`).

Any recurrence with one product a step. The members of a group wait for each other, so all blocks of a launch are
resident at once, unless a group has one member only.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gpu_rnn.launch.group_layout import Layout
from gpu_rnn.program import Program
from gpu_rnn.reference import Result, Weights

DEADLINE = float(os.environ.get("GPU_RNN_DEADLINE", "10"))  # seconds: long beside time slicing, short beside a hang
LONGEST_PATTERN = 64  # bits of the argument that holds the directions


@dataclass(frozen=True)
class Launch:
    """A kernel with all its arguments. `device` runs it; tests put a CPU in its place."""

    layout: Layout
    grid: int
    arguments: tuple[Tensor | int, ...]


Device = Callable[[Launch], None]


def bits(reverse: str) -> tuple[int, int]:
    """`reverse` as a bit mask over its shortest period, and that period."""
    lengths = (p for p in range(1, len(reverse) + 1) if reverse[:p] * (len(reverse) // p) == reverse)
    period = next(lengths, 1)
    return int(reverse[:period][::-1] or "0", 2), period


def _rows(tensor: Tensor) -> Tensor:
    """The tensor with its last dimension contiguous, which is all that the kernels ask of it."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _pointer(tensor: Tensor | None) -> Tensor | int:
    return 0 if tensor is None else tensor.contiguous()


def exchange(layout: Layout, groups: int, error: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the members of `groups` groups talk through: empty slots, counters, and the word for a failure."""
    words = torch.int32 if layout.half else torch.int64
    slots = torch.full((groups * layout.ring * layout.slot,), -1, dtype=words, device=like.device)
    control = torch.zeros(1 + groups * layout.tiles, dtype=torch.int32, device=like.device)
    return slots, control, error


_names: dict[str, int] = {}
_errors: dict[torch.device, Tensor] = {}


def name_of(layout: Layout, steps: int, batch: int, n: int, hidden: int) -> int:
    """The number by which a kernel names itself where it gives up: 16 bits, not 0."""
    text = (
        f"{layout.kernel} of {layout.parsed.name} (T {steps}, B {batch}, N {n}, H {hidden}, "
        f"{str(layout.dtype).removeprefix('torch.')}, {layout.members} blocks a group)"
    )
    return min(_names.setdefault(text, len(_names) + 1), 0xFFFF)


def error_word(device: torch.device) -> Tensor:
    """Where kernels on a device say that they gave up; the host reads it without waiting for them."""
    if device not in _errors:
        _errors[device] = torch.zeros(1, dtype=torch.int64, pin_memory=device.type == "cuda")
    return _errors[device]


def check() -> None:
    """Raises for a kernel that gave up waiting since the last call; its results are NaN from that step on.

    A kernel that still runs is not waited for: synchronise the device first to be sure. The next call of the backend
    checks too.

    Raises:
        RuntimeError: a kernel passed its deadline; the message names it, its shape, the step and the group.
    """
    for device, word in _errors.items():
        code = int(word[0]) & 0xFFFFFFFFFFFFFFFF
        if not code:
            continue
        word.zero_()
        name = dict(zip(_names.values(), _names, strict=True)).get(code >> 48, "a kernel")
        raise RuntimeError(
            f"{name} on {device} gave up in step {code & 0xFFFFFFFF} of group {code >> 32 & 0xFFFF}: data of another "
            "block did not come within the deadline, and results are NaN from there on. If the device was stopped "
            "that long (a debugger, time slicing), set GPU_RNN_DEADLINE to more seconds; else please report it."
        )


def prepare_forward(
    program: Program,
    gates: Tensor,  # (T, B, N, G, H), the input projection; overwritten when the layout says `save`
    weights: Weights,
    states: list[Tensor],  # each (B, N, H)
    lengths: Tensor | None,  # (B,)
    reverse: str,
    layout: Layout,
    groups: int,  # for each of N
    error: Tensor,  # (1,) int64 in the host's memory
    deadline: float = DEADLINE,
) -> tuple[Launch, Result]:
    """The launch and the result that it fills."""
    steps, batch, n, _, hidden = gates.shape
    gates = _rows(gates)
    y = gates.new_empty(steps, batch, n, hidden)
    final = gates.new_empty(len(states), batch, n, hidden)
    kept = (len(states) - 1, len(program.split)) if layout.save else (0, 0)
    recurrent = gates.new_empty(steps, batch, n, kept[1], hidden)
    inner = gates.new_empty(kept[0], steps, batch, n, hidden, dtype=torch.float32)
    pattern, period = bits(reverse)
    arguments = (
        gates,
        recurrent,
        inner,
        y,
        torch.stack(states),
        final,
        weights.w_hh.contiguous(),
        _pointer(weights.b_hh),
        _pointer(weights.params),
        _pointer(lengths),
        *exchange(layout, n * groups, error, gates),
        round(deadline * 1e9),
        pattern,
        *gates.stride()[:4],
        steps,
        batch,
        n,
        hidden,
        period,
        0,
        groups,
        name_of(layout, steps, batch, n, hidden),
    )
    saved = gates if layout.save else gates.new_empty(0)
    return Launch(layout, n * groups * layout.members, arguments), Result(y, list(final), saved, recurrent, inner)


def prepare_backward(
    program: Program,
    saved: Result,
    weights: Weights,
    states: list[Tensor],  # each (B, N, H)
    lengths: Tensor | None,  # (B,)
    reverse: str,
    d_y: Tensor,  # (T, B, N, H)
    d_final: list[Tensor],  # each (B, N, H)
    layout: Layout,
    groups: int,  # for each of N
    error: Tensor,  # (1,) int64 in the host's memory
    deadline: float = DEADLINE,
) -> tuple[Launch, tuple[Tensor, Tensor, list[Tensor], Tensor]]:
    """The launch and the gradients that it fills; those of the parameters (shares, N, P, H) are to be summed."""
    steps, batch, n, _, hidden = saved.gates.shape
    gates, d_y = _rows(saved.gates), _rows(d_y)
    d_gates, d_recurrent = torch.empty_like(gates), gates.new_empty(saved.recurrent.shape)
    d_initial = gates.new_empty(len(states), batch, n, hidden)
    shares = groups * layout.along if program.params else 0
    d_params = gates.new_zeros(shares, n, len(program.params), hidden, dtype=torch.float32)
    pattern, period = bits(reverse)
    arguments = (
        gates,
        saved.recurrent.contiguous(),
        saved.inner.contiguous(),
        saved.y.contiguous(),
        torch.stack(states),
        weights.w_hh.contiguous(),
        _pointer(weights.params),
        _pointer(lengths),
        d_y,
        torch.stack(d_final),
        d_gates,
        d_recurrent,
        d_initial,
        d_params,
        *exchange(layout, n * groups, error, gates),
        round(deadline * 1e9),
        pattern,
        *gates.stride()[:4],
        *d_y.stride()[:3],
        steps,
        batch,
        n,
        hidden,
        period,
        0,
        groups,
        name_of(layout, steps, batch, n, hidden),
    )
    launch = Launch(layout, n * groups * layout.members, arguments)
    return launch, (d_gates, d_recurrent, list(d_initial), d_params)
