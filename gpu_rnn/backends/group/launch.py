# SPDX-License-Identifier: Apache-2.0
"""Groups of blocks share a tile of the batch and keep W_hh on chip between them (`kernels/cuda/group_*.cu`).

Any recurrence with one product a step; `choose` and `cost` are those of `group_choice`. The members of a group wait for
each other, so all blocks of a launch are resident at once, unless a group has one member only.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from gpu_rnn import devices, environment
from gpu_rnn.backends import persistent
from gpu_rnn.backends.group import cubin, nvrtc
from gpu_rnn.backends.group.choice import Choice, choose, cost, largest
from gpu_rnn.backends.group.layout import Layout, source
from gpu_rnn.backends.persistent import bits, even_rows, rows, whole
from gpu_rnn.backends.problem import Problem
from gpu_rnn.backends.tensors import Call, LoopGradients, Result

__all__ = ["Launch", "backward", "check", "choose", "cost", "forward", "prepare", "unsupported"]

NAMES = 1024  # kernels that `check` can name: T and B are in a name
LONGEST_PATTERN = 64  # bits of the argument that holds the directions


@dataclass(frozen=True)
class Launch:
    """A kernel with all its arguments; tests run it on a CPU."""

    layout: Layout
    grid: int
    arguments: tuple[Tensor | int, ...]

    def __call__(self, device: torch.device) -> None:
        """Runs it on the current stream of a device.

        Raises:
            RuntimeError: the blocks of its groups are not resident at once, so they would wait for ever.
        """
        if self.grid == 0:
            return
        refusal = _refusal(self.layout, self.grid, device)
        if refusal:
            raise RuntimeError(f"{refusal}; choose another backend")
        _loaded(self.layout, device)(self.grid, self.layout.threads, self.arguments, device)


def _loaded(layout: Layout, device: torch.device) -> nvrtc.Function:
    return _function(layout, nvrtc.architecture(torch.cuda.get_device_capability(device)))


def _refusal(layout: Layout, blocks: int, device: torch.device) -> str:
    """Why so many blocks would wait for ever; empty where they would not."""
    function = _loaded(layout, device)
    if layout.members == 1 or blocks <= _resident(function, device, layout.threads):
        return ""
    return f"{layout.kernel}: its {blocks} blocks are not all resident on {device}, of which others may hold a part"


@lru_cache(maxsize=256)
def _function(layout: Layout, arch: str) -> nvrtc.Function:
    fitted = fit(layout, arch)
    return nvrtc.Function(source(fitted), fitted.kernel, arch, fitted.shared_bytes, cooperative=fitted.members > 1)


@lru_cache(maxsize=256)
def _resident(function: nvrtc.Function, device: torch.device, threads: int) -> int:
    return function.resident(device, threads)


@lru_cache(maxsize=256)
def fit(layout: Layout, arch: str) -> Layout:
    """The layout with as many weights in registers as the compiler finds room for, so that nothing goes to a stack.

    Raises:
        CompileError: as `nvrtc.compile_cubin`.
    """
    limits = {nvrtc.architecture(d.capability): d.shared_memory for d in devices.DEVICES.values()}
    limit = limits.get(arch, min(limits.values()))
    while cubin.usage(nvrtc.compile_cubin(source(layout), arch)).stack and layout.held:
        fewer = replace(layout, held=layout.held - 1)
        if fewer.shared_bytes > limit:
            break
        layout = fewer
    return layout


def _pointer(tensor: Tensor | None) -> Tensor | int:
    return 0 if tensor is None else whole(tensor)


def exchange(layout: Layout, groups: int, left: Tensor, error: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the members of `groups` groups talk through: empty slots, `left`, counters, and the word for a failure."""
    words = torch.int32 if layout.half else torch.int64
    slots = torch.full((groups * layout.ring * layout.slot,), -1, dtype=words, device=left.device)
    return slots, left, left.new_zeros(1 + groups * layout.tiles), error


_names: OrderedDict[str, int] = OrderedDict()  # of the kernels that were launched last
_counter = itertools.count()
_errors: dict[torch.device, Tensor] = {}


def name_of(layout: Layout, steps: int, batch: int, n: int, hidden: int) -> int:
    """The number by which a kernel names itself where it gives up: 16 bits, not 0."""
    text = (
        f"{layout.kernel} of {layout.parsed.name} (T {steps}, B {batch}, N {n}, H {hidden}, "
        f"{str(layout.dtype).removeprefix('torch.')}, {layout.members} blocks a group)"
    )
    number = _names.get(text)
    if number is None:
        number = _names[text] = next(_counter) % 0xFFFF + 1
        if len(_names) > NAMES:
            _names.popitem(last=False)
    return number


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

        >>> gpu_rnn.check()
    """
    for device, word in _errors.items():
        code = int(word[0]) & 0xFFFFFFFFFFFFFFFF
        if not code:
            continue
        word.zero_()
        names = {number: text for text, number in _names.copy().items()}  # another thread may add one meanwhile
        name = names.get(code >> 48, "a kernel")
        raise RuntimeError(
            f"{name} on {device} gave up in step {code & 0xFFFFFFFF} of group {code >> 32 & 0xFFFF}: data of another "
            "block did not come within the deadline, and all its results are NaN. If the device was stopped "
            "that long (a debugger, time slicing), set GPU_RNN_DEADLINE to more seconds; else please report it."
        )


def _launches(
    choice: Choice, tensors: list[Tensor | int], strides: list[int], reverse: str, shape: torch.Size, error: Tensor
) -> list[Launch]:
    """The launches that together run all of N; `shape` is that of the gates."""
    layout, groups = choice.layout, choice.groups
    steps, batch, n, _, hidden = shape
    like = tensors[0]
    assert isinstance(like, Tensor)
    pattern, period = bits(reverse)
    sizes, name = (steps, batch, n, hidden, period), name_of(layout, steps, batch, n, hidden)
    left = torch.zeros(1, dtype=torch.int32, device=like.device)  # one for all: who gives up spoils the whole call
    launches = []
    for first in range(0, n, choice.at_once):
        count = min(choice.at_once, n - first) * groups
        slots = exchange(layout, count, left, error)
        arguments = (
            *tensors,
            *slots,
            round(environment.deadline() * 1e9),
            pattern,
            *strides,
            *sizes,
            first,
            groups,
            name,
        )
        launches.append(Launch(layout, count * layout.members if batch else 0, arguments))
    return launches


def _paired(layout: Layout, hidden: int, strides: list[int], tensors: Sequence[Tensor | int]) -> Layout:
    """The layout, told whether two units can be loaded and stored as one word."""
    even = hidden % 2 == 0 and all(stride % 2 == 0 for stride in strides)
    aligned = all(t.data_ptr() % layout.word == 0 for t in tensors if isinstance(t, Tensor))
    return replace(layout, paired=even and aligned)


def _steered(layout: Layout, call: Call) -> tuple[Layout, list[Tensor | int]]:
    """The layout with the call's options, and their tensors as both kernels take them."""
    controls, values = call.controls, call.reset_values
    drop = 0 if controls.drop is None else min(controls.drop.shape[2], 2)
    per_step = 1 + (len(values[0]) > 1) if values else 0
    layout = replace(
        layout, flags=controls.flags is not None, values=per_step, drop=drop, zone=controls.zone is not None
    )
    scalars = [torch.stack(values) if values else None, controls.drop]
    given, drops = (None if t is None else t.to(layout.dtype) for t in scalars)
    return layout, [_pointer(t) for t in (controls.lengths, controls.flags, given, drops, controls.zone)]


def prepare_forward(
    call: Call,
    gates: Tensor,  # (T, B, N, G, H), the input projection; overwritten when `save`
    save: bool,
    all_states: bool,
    choice: Choice,
    error: Tensor,  # (1,) int64 in the host's memory
) -> tuple[list[Launch], Result]:
    """The launches and the result that they fill."""
    program, weights, states = call.program, call.weights, call.states
    steps, batch, n, _, hidden = gates.shape
    gates = rows(gates)
    y = gates.new_empty(steps, batch, n, hidden)
    final = gates.new_empty(len(states), batch, n, hidden)
    recurrent = gates.new_empty(steps, batch, n, len(program.split) if save else 0, hidden)
    others = len(states) - 1 if save or all_states else 0
    inner = gates.new_empty(others, steps, batch, n, hidden, dtype=torch.float32)
    strides = list(gates.stride()[:4])
    layout, control_pointers = _steered(choice.layout, call)
    vectors = [gates, recurrent, y, final, _pointer(weights.b_hh), _pointer(weights.params)]
    layout = _paired(layout, hidden, strides, [*vectors, *control_pointers[2:4]])
    layout = replace(layout, save=save, inner=save or all_states)
    tensors = [
        gates,
        recurrent,
        inner,
        y,
        torch.stack(states),
        final,
        whole(weights.w_hh),
        *vectors[4:],
        *control_pointers,
    ]
    launches = _launches(replace(choice, layout=layout), tensors, strides, call.reverse, gates.shape, error)
    return launches, Result(y, list(final), gates if save else gates.new_empty(0), recurrent, inner)


def prepare_backward(
    call: Call,
    saved: Result,
    d_y: Tensor,  # (T, B, N, H)
    d_final: list[Tensor],  # each (B, N, H)
    d_inner: Tensor | None,  # (S - 1, T, B, N, H)
    choice: Choice,
    error: Tensor,  # (1,) int64 in the host's memory
) -> tuple[list[Launch], LoopGradients]:
    """The launches and the gradients that they fill; those of the parameters (shares, N, P, H) are to be summed."""
    program, weights, states = call.program, call.weights, call.states
    _, batch, n, _, hidden = saved.gates.shape
    (gates, d_gates), d_y = persistent.beside(call, saved.gates), even_rows(d_y)
    d_recurrent = gates.new_empty(saved.recurrent.shape)
    d_initial = gates.new_empty(len(states), batch, n, hidden)
    shares = choice.groups * choice.layout.along if program.params else 0
    d_params = gates.new_zeros(shares, n, len(program.params), hidden, dtype=torch.float32)
    each = [len(value) for value in call.reset_values]
    d_values = gates.new_zeros(len(each), *each[:1], *d_initial.shape[1:], dtype=torch.float32)
    strides = [*gates.stride()[:4], *d_y.stride()[:3]]
    layout, control_pointers = _steered(choice.layout, call)
    tensors = [
        gates,
        whole(saved.recurrent),
        whole(saved.inner),
        whole(saved.y),
        torch.stack(states),
        whole(weights.w_hh),
        _pointer(weights.params),
        *control_pointers,
        0 if d_inner is None else whole(d_inner.float()),
        d_y,
        torch.stack(d_final),
        d_gates,
        d_recurrent,
        d_initial,
        d_params,
        d_values,
    ]
    scalars = [t for t in tensors if isinstance(t, Tensor) and t.dtype == gates.dtype and t is not tensors[5]]
    layout = replace(_paired(layout, hidden, strides, scalars), inner=d_inner is not None)
    launches = _launches(replace(choice, layout=layout), tensors, strides, call.reverse, gates.shape, error)
    return launches, LoopGradients(d_gates, d_recurrent, list(d_initial), d_params, d_resets=list(d_values))


def forward(call: Call, gates: Tensor, save: bool, all_states: bool) -> Result:
    """The forward loop; see `reference.forward`, whose results it gives. Shapes: `prepare_forward`.

    Raises:
        RuntimeError: an earlier call gave up waiting, see `check`.
    """
    check()
    choice = choose(call.problem)
    assert choice is not None
    launches, result = prepare_forward(call, gates, save, all_states, choice, error_word(gates.device))
    for launch in launches:
        launch(gates.device)
    return result


def backward(call: Call, saved: Result, d_y: Tensor, d_final: list[Tensor], d_inner: Tensor | None) -> LoopGradients:
    """The backward loop. Shapes: `prepare_backward`.

    Raises:
        RuntimeError: an earlier call gave up waiting, see `check`.
    """
    check()
    choice = choose(call.problem)
    assert choice is not None
    launches, found = prepare_backward(call, saved, d_y, d_final, d_inner, choice, error_word(d_y.device))
    for launch in launches:
        launch(d_y.device)
    return persistent.summed(call, found)


_failures: dict[tuple[Choice, devices.Device], str] = {}


def _wanted(problem: Problem) -> tuple[Choice, str]:
    """What a problem is compiled for, as far as it is known before its tensors are."""
    choice = choose(problem)
    assert choice is not None
    layout = replace(choice.layout, save=problem.direction == "training", paired=problem.H % 2 == 0)
    return replace(choice, layout=layout), nvrtc.architecture(problem.device.capability)


def prepare(problem: Problem) -> None:
    """Builds the kernel of a problem that is supported so far; where that fails, `unsupported` has a reason more."""
    choice, arch = _wanted(problem)
    try:
        fit(choice.layout, arch)
        blocks = choice.layout.members * choice.groups * choice.at_once
        failure = "".join(_refusal(choice.layout, blocks, device) for device in devices.at_hand(problem.device))
    except nvrtc.CompileError as error:
        failure = str(error)
    if failure:
        _failures[choice, problem.device] = failure


def unsupported(problem: Problem) -> list[str]:
    """Why this kernel cannot run a problem."""
    program, device = problem.program, problem.device
    reasons = []
    if not device.is_gpu:
        reasons.append(f"needs an NVIDIA GPU, not {problem.device_type}")
    elif device.capability >= persistent.OLDEST:
        missing = nvrtc.no_driver() if torch.cuda.is_available() else nvrtc.unavailable()
        reasons += [missing] if missing else []
    if len(program.stages) > 1:
        reasons.append(f"takes one product a step, {program.name} has {len(program.stages)}")
    reasons += persistent.unsupported(problem)
    if bits(problem.reverse)[1] > LONGEST_PATTERN:
        reasons.append(f"takes directions that repeat within {LONGEST_PATTERN} recurrences")
    if device.is_gpu and problem.dtype in persistent.DTYPES and len(program.stages) == 1 and choose(problem) is None:
        reasons.append(
            f"keeps W_hh on chip: on {device.name}, {program.name} fits up to H = {largest(problem)} in this dtype and "
            f"direction, not {problem.H}"
        )
    if not reasons and (_wanted(problem)[0], device) in _failures:
        reasons.append(_failures[_wanted(problem)[0], device])
    return reasons
