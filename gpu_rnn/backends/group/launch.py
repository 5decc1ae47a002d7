# SPDX-License-Identifier: Apache-2.0
"""Groups of blocks share a tile of the batch and keep W_hh on chip between them (`kernels/cuda/group_*.cu`).

Any recurrence with one product a step, or two; `choose` and `cost` are those of `choice`. The members of a group wait
for each other, so all blocks of a launch are resident at once, unless a group has one member only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gpu_rnn import devices, environment, memo
from gpu_rnn.backends import persistent
from gpu_rnn.backends.group import clusters, cubin, normalising, nvrtc, projecting, signature
from gpu_rnn.backends.group.choice import Choice, choose, cost, largest
from gpu_rnn.backends.group.deadline import check, error_word, number_of
from gpu_rnn.backends.group.layout import Layout, source, switches
from gpu_rnn.backends.group.projecting import Folded
from gpu_rnn.backends.persistent import bits, even_rows, rows, whole
from gpu_rnn.backends.problem import Problem
from gpu_rnn.backends.tensors import Call, LoopGradients, Result
from gpu_rnn.memo import memoize

__all__ = ["Launch", "backward", "choose", "cost", "forward", "prepare", "unsupported"]

Arguments = dict[str, Tensor | int]  # by the names of the kernel's parameters; 0 stands for no tensor

LONGEST_PATTERN = 64  # bits of the argument that holds the directions


@dataclass(frozen=True)
class Launch:
    """A kernel with all its arguments; tests run it on a CPU."""

    layout: Layout
    grid: int
    arguments: Arguments

    @property
    def ordered(self) -> tuple[Tensor | int, ...]:
        """The arguments as the kernel takes them.

        Raises:
            TypeError: one is missing or foreign.
        """
        kernel = self.layout.kernel
        return signature.ordered(kernel, signature.shipped(kernel), self.arguments)

    def __call__(self, device: torch.device) -> None:
        """Runs it on the current stream of a device; a batch without rows has no blocks.

        Raises:
            RuntimeError: the blocks of its groups are not resident at once, so they would wait for ever.
        """
        if self.grid:
            self.run(device)

    def run(self, device: torch.device) -> None:
        """What `__call__` does where there are blocks."""
        refusal = _refusal(self.layout, self.grid, device)
        if refusal:
            raise RuntimeError(f"{refusal}; choose another backend")
        _loaded(self.layout, device)(self.grid, self.layout.threads, self.ordered, device)


def _loaded(layout: Layout, device: torch.device) -> nvrtc.Function:
    return _function(layout, nvrtc.architecture(torch.cuda.get_device_capability(device)))


def _refusal(layout: Layout, blocks: int, device: torch.device) -> str:
    """Why so many blocks would wait for ever; empty where they would not."""
    function = _loaded(layout, device)
    if layout.members == 1 or blocks <= _resident(function, device, layout.threads):
        return ""
    return f"{layout.kernel}: its {blocks} blocks are not all resident on {device}, of which others may hold a part"


@memoize(256, stays="a graph that the user captured may launch them")
def _function(layout: Layout, arch: str) -> nvrtc.Function:
    fitted = fit(layout, arch)
    cluster = fitted.members if fitted.cluster else 1  # of which the driver itself has all blocks run at once
    cooperative = fitted.members > 1 and not fitted.cluster
    return nvrtc.Function(source(fitted), fitted.kernel, arch, fitted.shared_bytes, cooperative, cluster)


@memoize(256)
def _resident(function: nvrtc.Function, device: torch.device, threads: int) -> int:
    return function.resident(device, threads)


@memoize(256)
def fit(layout: Layout, arch: str) -> Layout:
    """The layout with as many weights in registers as the compiler finds room for, so that nothing goes to a stack.

    Raises:
        CompileError: as `nvrtc.compile_cubin`.
    """
    limits = {nvrtc.architecture(d.capability): d.shared_memory for d in devices.DEVICES.values()}
    limit = limits.get(arch, min(limits.values()))
    while cubin.usage(nvrtc.compile_cubin(source(layout), arch)).stack and layout.held:
        fewer = replace(layout, held=layout.held - 1).within(limit)
        if fewer.shared_bytes > limit:
            break
        layout = fewer
    return layout


def _pointer(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | int:
    """0 for None; with `dtype`, numbers are brought to it, not truth values and counts."""
    if tensor is None:
        return 0
    return whole(tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype))


def exchange(layout: Layout, groups: int, left: Tensor, error: Tensor) -> Arguments:
    """What the members of `groups` groups talk through: empty slots, `left`, counters, and the word for a failure."""
    words = torch.int32 if layout.half else torch.int64
    return {
        "p_words": torch.full((groups * layout.ring * layout.whole_slot,), -1, dtype=words, device=left.device),
        "p_left": left,
        "p_counters": left.new_zeros(1 + groups * layout.tiles),
        "p_error": error,
    }


def _launches(choice: Choice, arguments: Arguments, gates: Tensor, error: Tensor) -> list[Launch]:
    """The launches that together run all of N."""
    layout, groups = choice.layout, choice.groups
    batch, n = gates.shape[1:3]
    left = torch.zeros(1, dtype=torch.int32, device=gates.device)  # one for all: who gives up spoils the whole call
    common = arguments | {
        "limit": round(environment.deadline() * 1e9),
        "groups": groups,
        "launch": number_of(layout, gates.shape),
    }
    launches = []
    for first in range(0, n, choice.at_once):
        count = min(choice.at_once, n - first) * groups
        slots = exchange(layout, count, left, error)
        launches.append(Launch(layout, count * layout.members if batch else 0, common | slots | {"first_n": first}))
    return launches


def _sizes(gates: Tensor, reverse: str) -> Arguments:
    """The sizes and strides of gates, and which recurrences run backwards in time."""
    pattern, period = bits(reverse)
    return {
        **dict(zip(("T", "B", "N", "H"), (*gates.shape[:3], gates.shape[4]), strict=True)),
        **dict(zip(("stride_t", "stride_b", "stride_n", "stride_g"), gates.stride()[:4], strict=True)),
        "reverse": pattern,
        "period": period,
    }


def _controls(call: Call) -> Arguments:
    """The tensors of a call's options."""
    controls, values, dtype = call.controls, call.reset_values, call.weights.w_hh.dtype
    stacked = torch.stack(values) if values else None
    return {
        **{f"p_{name}": _pointer(value, dtype) for name, value in controls.of_loops.items()},
        "p_values": _pointer(stacked, dtype),
    }


def _built(layout: Layout, call: Call, arguments: Arguments, save: bool, inner: bool) -> Layout:
    """The layout as a call needs it: with its options, and told whether two units lie in one word."""
    values = call.reset_values
    return replace(
        layout,
        save=save,
        inner=inner,
        paired=_paired(arguments, layout.word),
        **switches(call.controls.described, 1 + (len(values[0]) > 1) if values else 0),
    )


def _paired(arguments: Arguments, word: int) -> bool:
    """Whether two units can be loaded and stored as one word of so many bytes. Weights are loaded one by one."""
    even = all(value % 2 == 0 for name, value in arguments.items() if name == "H" or "stride" in name)
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor) and name != "p_w"}
    dtype = tensors["p_gates"].dtype
    return even and all(t.data_ptr() % word == 0 for t in tensors.values() if t.dtype == dtype)


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
    inner_states = len(states) - 1 if save or all_states else 0
    inner = gates.new_empty(inner_states, steps, batch, n, hidden, dtype=torch.float32)
    arguments = {
        "p_gates": gates,
        "p_recurrent": recurrent,
        "p_inner": inner,
        "p_y": y,
        "p_initial": torch.stack(states),
        "p_final": final,
        "p_w": whole(weights.w_hh),
        "p_b_hh": _pointer(weights.b_hh),
        "p_params": _pointer(weights.params),
        "p_norm": _pointer(weights.norm),
        **_controls(call),
        **_sizes(gates, call.reverse),
    }
    layout = _built(choice.layout, call, arguments, save, inner=save or all_states)
    launches = _launches(replace(choice, layout=layout), arguments, gates, error)
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
    of_norm = normalising.arguments(call, saved)
    d_initial = gates.new_empty(len(states), batch, n, hidden)
    shares = choice.groups * choice.layout.along if program.params else 0
    d_params = gates.new_zeros(shares, n, len(program.params), hidden, dtype=torch.float32)
    steps_of_values = [len(value) for value in call.reset_values]
    d_values = gates.new_zeros(len(steps_of_values), *steps_of_values[:1], *d_initial.shape[1:], dtype=torch.float32)
    arguments = {
        "p_gates": gates,
        "p_recurrent": whole(saved.recurrent),
        "p_inner": whole(saved.inner),
        "p_y": whole(saved.y),
        "p_initial": torch.stack(states),
        "p_w": whole(weights.w_hh),
        "p_params": _pointer(weights.params),
        "p_norm": _pointer(weights.norm),
        **of_norm,
        **_controls(call),
        "p_d_inner": _pointer(None if d_inner is None else d_inner.float()),
        "p_d_y": d_y,
        "p_d_final": torch.stack(d_final),
        "p_d_gates": d_gates,
        "p_d_recurrent": d_recurrent,
        "p_d_initial": d_initial,
        "p_d_params": d_params,
        "p_d_values": d_values,
        **_sizes(gates, call.reverse),
        **dict(zip(("d_y_stride_t", "d_y_stride_b", "d_y_stride_n"), d_y.stride()[:3], strict=True)),
    }
    layout = _built(choice.layout, call, arguments, save=False, inner=d_inner is not None)
    launches = _launches(replace(choice, layout=layout), arguments, gates, error)
    d_products = of_norm["p_d_products"]
    return launches, LoopGradients(
        d_gates,
        d_recurrent,
        list(d_initial),
        d_params,
        d_resets=list(d_values),
        d_products=d_products if isinstance(d_products, Tensor) else None,
    )


def complete(call: Call, gradients: LoopGradients, launches: list[Launch]) -> LoopGradients:
    """With what is summed once the launches are through: the gradients of per-unit parameters and of scales."""
    gradients = persistent.summed(call, gradients)
    if call.weights.norm is None:
        return gradients
    normal = launches[0].arguments["p_normal"]
    assert isinstance(normal, Tensor)
    return gradients._replace(d_norm=normalising.of_scales(call, gradients, normal))


def forward(call: Call, gates: Tensor, save: bool, all_states: bool) -> Result:
    """The forward loop; see `reference.forward`, whose results it gives. Shapes: `prepare_forward`.

    Raises:
        RuntimeError: an earlier call gave up waiting, see `check`.
    """
    check()
    if call.weights.w_hr is None:
        return _forward(call, gates, save, all_states)
    folded = Folded(call)
    folded.enter(gates)
    return folded.leave(_forward(folded.call, gates, save, all_states))


def _forward(call: Call, gates: Tensor, save: bool, all_states: bool) -> Result:
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
    if call.weights.w_hr is None:
        return _backward(call, saved, d_y, d_final, d_inner)
    folded = Folded(call)
    saved = folded.saved(saved)
    loop = _backward(folded.call, saved, *folded.of_outputs(d_y, d_final), d_inner)
    return folded.gradients(saved, loop, d_y, d_final[0])


def _backward(call: Call, saved: Result, d_y: Tensor, d_final: list[Tensor], d_inner: Tensor | None) -> LoopGradients:
    choice = choose(call.problem)
    assert choice is not None
    launches, gradients = prepare_backward(call, saved, d_y, d_final, d_inner, choice, error_word(d_y.device))
    for launch in launches:
        launch(d_y.device)
    return complete(call, gradients, launches)


_failures: dict[tuple[Choice, devices.Device], str] = memo.hold(
    f"{__name__}._failures", {}, None, stays="asked again after `prepare`, in whatever thread"
)


def _wanted(problem: Problem) -> tuple[Choice, str]:
    """What a problem is compiled for, as far as it is known before its tensors are."""
    choice = choose(problem)
    assert choice is not None
    layout = replace(choice.layout, save=problem.saves_gates, paired=problem.H % 2 == 0)
    return replace(choice, layout=layout), nvrtc.architecture(problem.device.capability)


def prepare(problem: Problem) -> None:
    """Builds the kernel of a problem that is supported so far; where that fails, `unsupported` has a reason more.

    Where one whose groups are clusters fails, the device is taken to have none, and another is built.
    """
    if devices.is_described(problem.device) and nvrtc.unavailable():
        return
    choice, failure = _built_for(problem)
    if failure and choice.layout.cluster:
        clusters.refuse(problem.device, failure)
        choice, failure = _built_for(problem)
    if failure:
        _failures[choice, problem.device] = failure


def _built_for(problem: Problem) -> tuple[Choice, str]:
    """What a problem is compiled for, and why that cannot run; empty where it can."""
    choice, arch = _wanted(problem)
    try:
        fit(choice.layout, arch)
        blocks = choice.layout.members * choice.groups * choice.at_once
        return choice, "".join(_refusal(choice.layout, blocks, device) for device in devices.at_hand(problem.device))
    except nvrtc.CompileError as error:
        return choice, str(error)


def unsupported(problem: Problem) -> list[str]:
    """Why this kernel cannot run a problem."""
    program, device = problem.program, problem.device
    reasons = []
    if not device.is_gpu:
        reasons.append(f"needs an NVIDIA GPU, not {problem.device_type}")
    elif device.capability >= persistent.OLDEST and not devices.is_described(device):
        missing = nvrtc.no_driver() if torch.cuda.is_available() else nvrtc.unavailable()
        reasons += [missing] if missing else []
    if len(program.stages) > 2:
        reasons.append(f"takes two products a step at most, {program.name} has {len(program.stages)}")
    reasons += projecting.refused(problem) + persistent.unsupported(problem, "norm", "rms")
    if bits(problem.reverse)[1] > LONGEST_PATTERN:
        reasons.append(f"takes directions that repeat within {LONGEST_PATTERN} recurrences")
    if device.is_gpu and problem.dtype in persistent.DTYPES and len(program.stages) <= 2 and choose(problem) is None:
        reasons.append(
            f"keeps W_hh on chip: on {device.name}, {program.name} fits up to H = {largest(problem)} in this dtype and "
            f"direction, not {problem.H}"
        )
    if not reasons and (_wanted(problem)[0], device) in _failures:
        reasons.append(_failures[_wanted(problem)[0], device])
    return reasons
