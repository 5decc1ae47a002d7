# SPDX-License-Identifier: Apache-2.0
"""`tune`: measures every backend on a call of one's own, and has the fastest chosen from then on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from gpu_rnn import cache, devices
from gpu_rnn.backends.problem import Problem
from gpu_rnn.call import onlookers, transforms
from gpu_rnn.diagnostics.explanation import NO_INPUT, problem_of, sizes
from gpu_rnn.diagnostics.timing import TRIALS, Timing, interleave
from gpu_rnn.dispatch import choice
from gpu_rnn.dispatch.choice import forget
from gpu_rnn.dispatch.measured import Question, Times, ranked

if TYPE_CHECKING:
    from gpu_rnn.layers.base import LayerBase

__all__ = ["Pass", "Tuned", "forget", "tune"]

TITLES = {"inference": "forward", "training": "forward and backward"}


@dataclass(frozen=True)
class Pass:
    """What was measured of one kind of call: forward alone, or forward and backward.

    Attributes:
        problem: the call as dispatch sees it; its direction is "inference" or "training".
        us_per_step: 20th percentile, median and 80th percentile of the microseconds a time step, all layers together,
            by backend, the fastest first.
        left_out: why the other backends were not measured.
        before, now: the backend that "auto" took before, and takes from now on. It stays where the fastest is ahead by
            less than the spread: where its 80th percentile is not below the other's 20th.
    """

    problem: Problem
    us_per_step: dict[str, tuple[float, float, float]]
    left_out: dict[str, str]
    before: str
    now: str

    def __str__(self) -> str:
        lines = [f"{TITLES[self.problem.direction]:20} {'µs/step':>9}  {'20 % to 80 %':22} chosen"]
        for name, (low, middle, high) in self.us_per_step.items():
            chosen = [word for word, backend in (("before", self.before), ("now", self.now)) if backend == name]
            lines.append(f"  {name:18} {middle:9.2f}  {f'{low:.2f} to {high:.2f}':22} {' and '.join(chosen)}".rstrip())
        left_out = [f"  {name:18} {'-':>9}  not measured: {reason}" for name, reason in self.left_out.items()]
        stays = self.now == self.before != next(iter(self.us_per_step))
        noise = [f"  {self.now} stays: what is faster is so by less than the spread"] * stays
        return "\n".join([*lines, *left_out, *noise])


@dataclass(frozen=True)
class Tuned:
    """What `tune` found; ``str()`` of it is a table.

    Attributes:
        device: the name of the device it was measured on.
        passes: forward, and in training forward and backward.
        path: the file in the cache folder that the choice is kept in.
        lasting: whether other processes find it. False where nothing can be written to the cache folder: `path` is then
            in a temporary one, which goes when this process ends.
    """

    device: str
    passes: tuple[Pass, ...]
    path: Path
    lasting: bool = True

    def __str__(self) -> str:
        problem = self.passes[-1].problem  # in training it names regularization too
        ranges = ", ".join(f"{name} {_alike(getattr(problem, name))}" for name in ("T", "B"))
        head = f"{sizes(problem)}, measured on {self.device}"
        where = f"kept for {ranges} in {self.path}"
        if not self.lasting:
            where = f"holds for {ranges} in this process only, as the cache folder cannot be used:\n"
            where += "to keep it, set GPU_RNN_CACHE to a folder that you, and nobody else, can write to, and tune again"
        return "\n".join([head, *map(str, self.passes), where])


def _alike(size: int) -> str:
    """The sizes that a choice made at one of them stands for."""
    most = 1 << (size - 1).bit_length()
    return str(size) if most <= 2 else f"{most // 2 + 1} to {most}"


def tune(layer: LayerBase, x: Tensor | PackedSequence, *, seconds: float = 2.0, **call: Any) -> Tuned:
    """Measures every backend that can run ``layer(x)`` on the device that x lies on; "auto" takes the fastest from then
    on, unless it is ahead of what "auto" takes now by less than the spread of the rounds.

    Forward is measured in evaluation mode without gradients; if the layer is in training mode and gradients are wanted,
    forward and backward in training mode too. Backends take turns. The choice is kept in the cache folder
    (GPU_RNN_CACHE) for this device and these versions of torch, Triton and gpu_rnn, so other processes go by it. It
    stands for calls that differ from this one in values, and in T and B up to the next power of two: what was tuned at
    T = 100 is chosen for T from 65 to 128. A backend asked for by name, and GPU_RNN_BACKEND, come first. Weights,
    gradients, modes, buffers and random generators are left as they are.

    Args:
        layer: a layer of this package.
        x: an input such as the layer will get, on the device it will get it on; only its shape, dtype and lengths
            matter.
        seconds: for the samples of each kind of call, about, more than 0; every backend is run three times and more,
            whatever that takes.
        call: the layer's other arguments that come with x: hx, mask, lengths, resets, reset_state, return_all_states.

    Raises:
        TypeError: not a layer of this package, x is no tensor, an argument that its call does not have, or True for one
            that is a tensor; seconds is no number.
        ValueError: x is neither on a CPU nor on a CUDA device, or without samples; seconds is not more than 0; autocast
            is on.
        RuntimeError: under torch.compile or a torch.func transform, where there is no time to measure.

    Example::

        >>> import gpu_rnn, torch
        >>> layer = gpu_rnn.GRU(8, 16, activation="softsign")
        >>> tuned = gpu_rnn.tune(layer, torch.randn(10, 4, 8), seconds=0.1)
        >>> print(tuned)
        >>> tuned.passes[1].now == gpu_rnn.explain(layer, torch.empty(10, 4, 8)).chosen
        True
        >>> gpu_rnn.tuning.forget()             # back to the cost models
    """
    if onlookers.recorded(x) or transforms.active():
        raise RuntimeError(
            "tune measures calls: run it before torch.compile and whatever else records, and outside of torch.func "
            "transforms"
        )
    _check(x, call, seconds)
    device = x.data.device
    _check_place(device)
    with _left_as_it_is(layer, device):
        runs = _runs(layer, x, call)
        problems = [run.problem for run in runs]
        before = [choice.select(problem) for problem in problems]
        measured = [_measure(run, device, seconds) for run in runs]
    times: dict[Question, Times] = {}
    for each, was in zip(measured, before, strict=True):
        times |= each.by_question(was)
    path = choice.remember(problems[0].device, times)
    passes = [each.result(was) for each, was in zip(measured, before, strict=True)]
    name = problems[0].device.name if device.type == "cuda" else devices.cpu_name()
    return Tuned(name, tuple(passes), path, cache.outlives_the_process(path))


def _check(x: object, call: dict[str, Any], seconds: object) -> None:
    """Refuses what `problem_of`, which needs no values, takes."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise TypeError(f"seconds is a number, such as 2.0, not {seconds!r}")
    if not seconds > 0:
        raise ValueError(f"seconds must be more than 0, not {seconds}")
    if not isinstance(x, Tensor | PackedSequence):
        raise TypeError(NO_INPUT.format("tune", type(x).__name__))
    for name, value in call.items():
        if isinstance(value, bool) and name != "return_all_states":
            raise TypeError(
                f"tune runs the layer: it takes a tensor as {name}, as the layer does; explain takes {value} for it"
            )


def _check_place(device: torch.device) -> None:
    """Refuses where what is measured would say nothing of other calls."""
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"tune measures on a CPU or a CUDA device, and x is on {device}: move the layer and x there")
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        raise ValueError(
            f"tune does not measure under autocast: leave it, and give the layer and x in its dtype, .to({dtype})"
        )


class _Run(NamedTuple):
    """A call to measure."""

    problem: Problem
    call: Callable[[], object]

    def answers_on(self, backend: str) -> dict[Question, str]:
        """What dispatch is asked in a call on a backend, and answers."""
        with choice.trial(backend) as answers:
            self.call()
        return dict(answers)


class _Measured(NamedTuple):
    """The times of a call on each backend, and what dispatch was asked meanwhile."""

    problem: Problem
    timings: dict[str, Timing]
    answers: dict[str, dict[Question, str]]
    left_out: dict[str, str]

    def us(self, seconds: float) -> float:
        return 1e6 * seconds / max(self.problem.T, 1)

    def by_question(self, before: str) -> dict[Question, Times]:
        """For each question that a call asks (of the stack, of its layers, of their backward passes), the least time of
        a call that was answered so; first comes the answer of the call that is to be taken."""
        all_times: dict[Question, Times] = {}
        for name, timing in self.timings.items():
            for question, answer in self.answers[name].items():
                times = all_times.setdefault(question, {})
                times[answer] = min(times.get(answer, math.inf), self.us(timing.median))
        taken = self.answers[self._taken(before)]
        return {question: ranked(times, taken.get(question, "")) for question, times in all_times.items()}

    def _taken(self, before: str) -> str:
        """The fastest, unless noise may be all that lies between it and the one before."""
        fastest = min(self.timings, key=lambda name: self.timings[name].median)
        if before in self.timings and self.timings[before].spread[0] <= self.timings[fastest].spread[1]:
            return before
        return fastest

    def result(self, before: str) -> Pass:
        ranked = sorted(self.timings.items(), key=lambda item: item[1].median)
        spreads = {name: (t.spread[0], t.median, t.spread[1]) for name, t in ranked}
        figures = {name: tuple(map(self.us, spread)) for name, spread in spreads.items()}
        selected = choice.select(self.problem)
        return Pass(self.problem, figures, self.left_out, before, selected)  # type: ignore[arg-type]


def _measure(run: _Run, device: torch.device, seconds: float) -> _Measured:
    """Times a call on every backend that can run it."""
    answers: dict[str, dict[Question, str]] = {}
    left_out = {row.backend: row.reasons[0] for row in choice.verdicts(run.problem) if not row.runs}
    bar, able = _bar(TITLES[run.problem.direction]), [name for name in choice.BACKENDS if name not in left_out]
    for place in bar(range(len(able))):
        name = able[place]
        try:
            asked = run.answers_on(name)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            left_out[name] = "no memory"
            continue
        if asked.get((run.problem, tuple(choice.BACKENDS)), name) == name:
            answers[name] = asked
        else:  # a kernel that does not build is a reason from now on
            left_out[name] = choice.BACKENDS[name].unsupported(run.problem)[0]
    calls = {name: _on(name, run.call) for name in answers}
    timings = interleave(calls, device, trials=TRIALS, seconds=seconds, progress=bar, fewest=1)
    return _Measured(run.problem, timings, answers, left_out)


def _on(name: str, call: Callable[[], object]) -> Callable[[], object]:
    def on_trial() -> None:
        with choice.trial(name):
            call()

    return on_trial


def _bar(title: str) -> Callable[[range], Iterable[int]]:
    """Goes through the rounds with a bar, where tqdm is installed and there is a terminal."""
    if find_spec("tqdm") is None:
        return iter
    from tqdm import tqdm

    return lambda rounds: tqdm(
        rounds, desc=title, unit="round", leave=False, disable=None
    )  # None: not without a terminal


def _runs(layer: LayerBase, x: Tensor | PackedSequence, call: dict[str, Any]) -> list[_Run]:
    """Forward in evaluation and, where it is wanted, forward and backward in training."""
    wanted = problem_of(layer, x, call, "tune")
    if wanted.B == 0:
        raise ValueError("tune needs samples to measure, and x has none: B is 0")
    leaf = x.data.detach().requires_grad_(x.data.requires_grad)
    detached = x._replace(data=leaf) if isinstance(x, PackedSequence) else leaf
    weights = [weight.detach().requires_grad_(weight.requires_grad) for weight in layer._weights()]

    def mode(training: bool) -> LayerBase:
        """The layer in a mode, over the same memory: its hooks and parametrizations see nothing of what is measured."""
        other: LayerBase = object.__new__(type(layer))
        changed = {"training": training, "backend": "auto", "_weights": lambda: weights}
        other.__dict__.update(layer.__dict__, **changed, _stacks={})  # which hold the layer's own mode and backend
        return other

    evaluated, trained = mode(False), mode(True)

    @torch.no_grad()
    def inference() -> None:
        evaluated.forward(detached, **call)

    primals = [tensor for tensor in (leaf, *weights) if tensor.requires_grad]
    ones: list[Tensor] = []

    def training() -> None:
        outputs = [tensor for tensor in _tensors(trained.forward(detached, **call)) if tensor.requires_grad]
        ones.extend(torch.ones_like(output) for output in outputs[len(ones) :])  # at the first call
        torch.autograd.grad(outputs, primals, ones, allow_unused=True)

    with torch.no_grad():
        runs = [_Run(problem_of(evaluated, detached, call, "tune"), inference)]
    if layer.training and wanted.training:
        runs.append(_Run(problem_of(trained, detached, call, "tune"), training))
    return runs


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)


@contextmanager
def _left_as_it_is(layer: LayerBase, device: torch.device) -> Iterator[None]:
    """Puts the generators and the layer's buffers back; backward passes stay in this thread, as `dispatch.trial`
    does."""
    buffers = [(buffer, buffer.clone()) for buffer in layer.buffers()] if isinstance(layer, torch.nn.Module) else []

    @torch.no_grad()
    def restore() -> None:
        for buffer, was in buffers:
            buffer.copy_(was)

    gpu = [device] if device.type == "cuda" else []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(gpu))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.callback(restore)
        yield
