# SPDX-License-Identifier: Apache-2.0
"""`explain`: which backend a call runs on, why not the others, and what each is predicted to take."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from gpu_rnn import devices, environment
from gpu_rnn.backends import rates, rebuilding, triton_interpreter
from gpu_rnn.backends.group import clusters, nvrtc
from gpu_rnn.backends.group.choice import floor
from gpu_rnn.backends.problem import Problem
from gpu_rnn.backends.rebuilding import SavedBytes
from gpu_rnn.call import arguments, autocast
from gpu_rnn.call.controls import StackControls
from gpu_rnn.diagnostics import refusals
from gpu_rnn.dispatch import choice, relaxation_plan
from gpu_rnn.dispatch.choice import Row
from gpu_rnn.dispatch.relaxation_plan import TimePlan
from gpu_rnn.layers import jagged, options
from gpu_rnn.spelling import meant

if TYPE_CHECKING:
    from gpu_rnn.layers.base import LayerBase


LINES = 4  # of a reason that are printed
SHOWN = 0.005  # microseconds: less would be printed as none
BOUND = "no loop that keeps W_hh on chip takes less: its products and words, nothing else"
IN_WORDS = {
    "measured": "by tune on this device",
    "fitted": "cost models",
    "simulated": "of the time loop from its machine code, on no GPU",
    "published": "by others of cuDNN with 768 units and 16 rows",
    "modelled": "by each backend's arithmetic",
}


@dataclass(frozen=True)
class Explanation:
    """The verdict on every backend for one call; ``str()`` of it is a table."""

    problem: Problem
    rows: tuple[Row, ...]
    backend: str = "auto"
    """What the layer was made with."""
    time_parallel: float = 0.0
    """The tolerance of a call whose chunks of steps are to run side by side."""

    @property
    def chosen(self) -> str | None:
        """The backend that the call runs on; None where the one asked for cannot run it."""
        return next((row.backend for row in self.rows if row.chosen), None)

    @property
    def chunks(self) -> tuple[int, ...]:
        """The steps that a stack's layers run together, forward and in training backward; none where each runs alone.

        Where it is all steps, the layers of that pass run one after the other.
        """
        problem = self.problem
        if self.chosen not in choice.KERNELS or not choice.staggers(problem, self.backend):
            return ()
        return tuple(choice.wavefront(replace(problem, direction=d), self.backend)[1] for d in _passes(problem))

    @property
    def saved(self) -> SavedBytes | None:
        """Bytes of the states and of the gates, of all layers, that training saves for its backward pass, or with
        ``save="states"`` makes again; None where that is ATen's own matter, autograd's, or nothing."""
        known = self.chosen in choice.KERNELS or (self.chosen is not None and self.problem.rebuilds)
        return SavedBytes.of(self.problem) if known and self.problem.training else None

    @property
    def floor_us(self) -> float | None:
        """The least microseconds per time step of one layer's loop with W_hh on chip: a bound, by what multiplying and
        moving it takes, below which no kernel gets and which none may reach. None where W_hh does not fit."""
        if not self.problem.device.is_gpu:
            return None
        floors = [floor(replace(self.problem, direction=direction)) for direction in _passes(self.problem)]
        return None if None in floors else 1e6 * sum(seconds or 0.0 for seconds in floors)

    def __str__(self) -> str:
        what = "forward and backward" if self.problem.training else "inference"
        head = f"{sizes(self.problem)}, {what}, on {self.problem.device.name}"
        lines = [head, f"{'backend':10} {'verdict':8} {'µs/step':>8}  {'which is':10} why not".rstrip()]
        for row in self.rows:
            lines += self._lines(row)
        if self.chunks:
            each = [str(steps) if steps < self.problem.T else "all" for steps in self.chunks]
            chunks = ", ".join(f"{steps} {way}" for steps, way in zip(each, ("forward", "backward"), strict=False))
            lines.append(f"layers run as a wavefront, steps at a time: {chunks}")
        lines += [*self._parallel, *self._saved]
        if self.floor_us is not None and self.floor_us >= SHOWN:
            lines.append(f"{'bound':10} {'':8} {self.floor_us:8.2f}  {BOUND}")
        refusal = clusters.refusal(self.problem.device)
        lines += [f"group exchanges through L2, not in clusters: {refusal.splitlines()[0]}"] if refusal else []
        return "\n".join([*lines, *self._asked, f"µs/step: {self._origin}", *self._elsewhere])

    def _lines(self, row: Row) -> list[str]:
        """A backend's lines of the table."""
        verdict = "chosen" if row.chosen else "can run" if row.runs else "no"
        figure = row.predicted_us if row.measured_us is None else row.measured_us
        notes: tuple[str, ...] = ()
        if figure == math.inf:
            figure, notes = None, ("not predicted: runs where it is named, or where tune finds it the fastest",)
        elif not self.problem.device.is_gpu and row.source not in ("measured", "fitted"):
            figure = None  # such models of a CPU only rank
        known = (f"{figure:.2f}", row.source) if figure is not None else ("", "")
        first, *further = [line for reason in (*notes, *row.reasons) for line in _short(reason)] or [""]
        start = f"{row.backend:10} {verdict:8} {known[0]:>8}  {known[1]:10} {first}"
        return [start.rstrip(), *(f"{'':41}{line}" for line in further)]

    @property
    def _saved(self) -> list[str]:
        if self.saved is None:
            return []
        states, gates = (f"{size / 1e6:.1f} MB" for size in self.saved)
        words, problem = f"saved for the backward pass: states {states}", self.problem
        if not problem.rebuilds:
            return [f"{words}, gates {gates}"]
        of_a_layer = f"{self.saved.gates / problem.layers / 1e6:.1f} MB"
        words += f"; gates, {of_a_layer} a layer, are made again"
        if not problem.device.is_gpu:
            return [words]
        return [f"{words}, {1e6 * rebuilding.seconds(problem) / problem.T:.2f} µs/step more, modelled"]

    @property
    def time_plans(self) -> tuple[TimePlan, ...]:
        """How each pass of a layer runs parallel in time; none where the call does not."""
        asked = self.problem, self.backend, self.time_parallel
        if not self.time_parallel or relaxation_plan.against(*asked):
            return ()
        return tuple(relaxation_plan.of_passes(*asked))

    @property
    def _parallel(self) -> list[str]:
        """Whether chunks of steps run side by side, and what became of it in the last such call of this process."""
        if not self.time_parallel:
            return []
        against = relaxation_plan.against(self.problem, self.backend, self.time_parallel)
        if against:
            return [f"not parallel in time: {against}"]
        return [
            f"{'backward' if direction == 'backward' else 'forward'} {self._in_time(plan, direction)}"
            for plan, direction in zip(self.time_plans, _passes(self.problem), strict=True)
        ]

    def _in_time(self, plan: TimePlan, direction: str) -> str:
        if plan.against:
            return f"not parallel in time: {plan.against}"
        us = 1e6 * plan.seconds / self.problem.T
        words = f"parallel in time: {plan.chunks} chunks of {plan.steps} steps, {us:.2f} µs/step of a layer predicted"
        last = relaxation_plan.outcome(relaxation_plan.of_one_layer(self.problem, direction), self.time_parallel)
        if last is None:
            return f"{words}; after {plan.passes} passes that do not settle, one step after the other"
        if last.settled:
            return f"{words}; settled in {last.passes} passes when it last ran"
        return f"{words}; not settled after {last.passes} passes when it last ran, which was one step after the other"

    @property
    def _asked(self) -> list[str]:
        """Whether one backend was asked for, and what a call does then."""
        if self.backend == "auto":
            preferred = environment.backend(choice.BACKENDS)
            return [f"GPU_RNN_BACKEND prefers {preferred}, where it can run"] if preferred else []
        does = "the call runs on it" if self.chosen else "the call raises ValueError"
        return [f"backend={self.backend!r} was asked for: {does}"]

    @property
    def _elsewhere(self) -> list[str]:
        """What a described device is taken to have, where it is missing here."""
        if not devices.is_described(self.problem.device):
            return []
        triton = "" if find_spec("triton") else triton_interpreter.NOT_INSTALLED
        missing = [reason for reason in (triton, nvrtc.unavailable()) if reason]
        return [f"A described device has Triton and CuPy. Here {'; '.join(missing)}"] if missing else []

    @property
    def _origin(self) -> str:
        """Where the figures come from."""
        known = rates.of(self.problem.device).source
        sources = {row.source for row in self.rows if row.runs}
        words = [f"{source} {IN_WORDS[source]}" for source in IN_WORDS if source in sources]
        if not self.problem.device.is_gpu:
            where = "such a" if f"({devices.cpu_model()}, " in known else "another"
            models = f"{known}, on {where} processor" if "fitted" in known else "models of a CPU only rank the backends"
            measured = f"measured {IN_WORDS['measured']}"
            if sources == {"measured"}:
                return measured
            return "; ".join([*[measured] * ("measured" in sources), f"{models}; gpu_rnn.tune measures this one"])
        return "; ".join([*words, known if "fitted" in known else "products and launches beside a loop are modelled"])


def _short(reason: str) -> list[str]:
    """A reason in a few lines, as a compiler may give many."""
    lines = [line.rstrip() for line in reason.splitlines() if line.strip()]
    return (
        [*lines[:LINES], f"… and {len(lines) - LINES} lines more in rows[…].reasons"] if len(lines) > LINES else lines
    )


def _passes(problem: Problem) -> tuple[str, ...]:
    """The directions of the passes that a call makes."""
    return ("training", "backward") if problem.direction == "training" else (problem.direction,)


def sizes(p: Problem) -> str:
    """What a problem computes, in a line."""
    both = ", both directions" if "1" in p.reverse else ""
    heads = f" in {p.heads} heads" if p.heads > 1 else ""
    projected = f" projected to {p.proj_size * p.heads}" if p.proj_size else ""
    words = [str(p.dtype).removeprefix("torch."), *["packed"] * p.packed, *p.options.values()]
    shape = f"T {p.T}, B {p.B}, input {p.I}, hidden {p.H * p.heads}{heads}{projected}, layers {p.layers}{both}"
    return f"{p.recurrence.name}: {shape}, {', '.join(words)}"


NO_INPUT = "{} takes a tensor or a PackedSequence as x, not {}"


def explain(
    layer: LayerBase,
    x: Tensor | PackedSequence | None = None,
    *,
    device: str | torch.device | None = None,
    **call: Any,
) -> Explanation:
    """Which backend ``layer(x)`` runs on, with the reasons against the others and the predicted time of each.

    Args:
        layer: any layer of this package.
        x: the input, or a tensor of its shape and dtype on any device ("meta" too): (T, B, input_size), with
            batch_first (B, T, input_size), unbatched (T, input_size), a PackedSequence, or a jagged nested tensor
            (B, j, input_size). None: 100 steps of one sample.
        device: a described device to answer for, such as "H100" (`gpu_rnn.devices.DEVICES`), with Triton and CuPy
            whether they are installed here or not; or one that is here, such as torch.device("cpu"), for a layer on
            "meta", which takes no memory; None: x's own.
        call: the layer's other arguments that would come with x: hx, mask, lengths, resets, reset_state,
            return_all_states, time_parallel. True stands for any of them; a tensor's shape and dtype are
            checked, its values do not matter.

    Raises:
        TypeError: not a layer of this package, x is no tensor, or the device no name; an unknown argument of the call.
        ValueError: no description of that device, or it is not here; x is neither 2D nor 3D; the call exceeds the
            device's memory.
        Exception: what the layer itself raises of such an x, states and controls: there is no plan for such a call.

    Example::

        >>> import gpu_rnn, torch
        >>> layer = gpu_rnn.LSTM(64, 64, dtype=torch.bfloat16)
        >>> x = torch.empty(100, 32, 64, dtype=torch.bfloat16, device="meta")
        >>> print(gpu_rnn.explain(layer, x, device="H100"))
    """
    problem = problem_of(layer, x, call, "explain")
    if device is not None:
        place = devices.pick(str(device)) if isinstance(device, torch.device) else device
        problem = choice.described(problem, place)
    is_this_cpu = isinstance(device, torch.device) and not problem.device.is_gpu
    refusals.check_memory(problem, devices.main_memory() if is_this_cpu else problem.device.memory)
    within = arguments.tolerance("time_parallel", call.get("time_parallel"))
    return Explanation(problem, tuple(choice.verdicts(problem, layer.backend)), layer.backend, within)


def problem_of(layer: LayerBase, x: Tensor | PackedSequence | None, call: dict[str, Any], asker: str) -> Problem:
    """``layer(x, **call)`` as dispatch sees it; arguments and errors as those of `explain`, in the asker's name."""
    from gpu_rnn.layers.base import LayerBase
    from gpu_rnn.layers.cell import CellBase

    if not isinstance(layer, LayerBase):
        kind = type(layer)
        place = kind.__module__.partition(".modules.")[0]  # torch.nn.modules.rnn: as users write it
        advice = ""
        if place == "gpu_rnn.keras.layers":
            place, advice = "gpu_rnn.keras", ": give it gpu_rnn's own with the same sizes and options"
        if isinstance(layer, CellBase):
            place, advice = "gpu_rnn", ": a cell runs as its layer does with one step, so give it that layer"
        raise TypeError(
            f"{asker} takes a layer of this package, such as gpu_rnn.LSTM, not {place}.{kind.__name__}{advice}"
        )
    if not isinstance(x, Tensor | PackedSequence | None):
        raise TypeError(NO_INPUT.format(asker, type(x).__name__))
    if isinstance(x, Tensor) and x.layout is torch.jagged:
        x, call = jagged.padded_size(layer, x), {**call, "lengths": True}
    if isinstance(x, Tensor):
        arguments.tensor("x", x)
    weights, batch_sizes, has_batch = layer._flat_weights, None, not (isinstance(x, Tensor) and x.dim() == 2)
    if isinstance(x, PackedSequence):
        batch_sizes = x.batch_sizes
        x = x.data
    elif x is None:
        x = torch.empty(100, 1, layer.input_size, dtype=weights[0].dtype, device=weights[0].device)
        x = x.transpose(0, 1) if layer.batch_first else x
    elif x.dim() == 2:
        x = x.unsqueeze(0 if layer.batch_first else 1)
    elif x.dim() != 3:
        raise ValueError(f"{asker} takes x with 2 or 3 dimensions, as the layer does, not {x.dim()}")
    packed, unknown = batch_sizes is not None, call.keys() - {*options.OF_THE_CALL}
    if unknown:
        near = meant(min(unknown), (*options.OF_THE_CALL, "device"))
        raise TypeError(f"a layer's call has no argument {', '.join(sorted(unknown))}{near}")
    stack = layer._stack(packed, bool(call.get("return_all_states", False)))
    steps, batch = stack.sizes(x, batch_sizes)
    refusals.check(layer, x, batch_sizes, call, has_batch)
    nothing = torch.empty(0, device="meta")
    mask, lengths, resets, reset_state = (None if call.get(name) is None else nothing for name in refusals.CONTROLS)
    controls = StackControls(mask, lengths, resets, None if reset_state is None else (reset_state,))
    controls = layer._with_noise(controls, nothing, steps, batch)
    problem = stack.problem(x, None, weights, batch_sizes, controls)
    return replace(problem, dtype=autocast.dtype_of(weights[0]))
