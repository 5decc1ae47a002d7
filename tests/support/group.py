# SPDX-License-Identifier: Apache-2.0
"""The group kernel's launches on the CPU: one problem, its layout, what it gives, and the truth beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.certifying.precisions import FLOORS, PRECISIONS, TIGHT
from benchmarks.emulating import h100
from benchmarks.emulating.h100 import run_on_cpu
from gpu_rnn.backends import linear, reference, step
from gpu_rnn.backends.group import launch as group
from gpu_rnn.backends.group.choice import Choice
from gpu_rnn.backends.group.layout import PERIOD, Layout
from gpu_rnn.backends.tensors import OF_STATES, LoopGradients, Result, state_dtype
from gpu_rnn.recurrence import Recurrence
from tests.support.layer_options import OPTIONS, with_options
from tests.support.loops import RECURRENCES as EVERY
from tests.support.loops import Inputs, draw, make, values_and_gradients
from tests.support.pairwise import pairwise


def twofold() -> Recurrence:
    """Two products a step, split gates and summed ones in both, two states, parameters, values handed on."""

    def first(x: Any, r: Any, s: Any, p: Any) -> Any:
        kept = torch.sigmoid(x.a + p.q * r.a)
        return s.h * kept + torch.tanh(x.b + r.b), kept, s.c * r.a

    def second(x: Any, r: Any, s: Any, p: Any, values: Any) -> Any:
        kept, mixed = values
        c = kept * s.c + torch.tanh(x.d + r.d) * torch.sigmoid(x.e * r.e)
        return torch.tanh(c + p.q * x.f + r.f) * kept, c + 0.1 * mixed

    stages = [(("a", "b"), first), (("d", "e", "f"), second)]
    return Recurrence(stages, states={"h": 0.0, "c": 0.5}, params=("q",), name="twofold")


RECURRENCES = {**EVERY, "twofold": twofold()}  # by the name in a case
KINKS = {"abs", "sign", "floor", "relu", "clamp", "minimum", "maximum", "where"}  # operations whose derivative jumps


@dataclass(frozen=True)
class Case:
    """A problem and how it is laid out. `held` is the part of a warp's weights in registers."""

    cell: str
    precision: str
    members: int
    T: int = 6
    B: int = 5
    H: int = 0  # 0: the members' width, less a few
    across: int = 1
    along: int = 1
    blocks: int = 1
    columns: int = 1
    tiles: int = 1
    groups: int = 1
    at_once: int = 0  # of N in a launch; 0: all
    held: float = 0.5
    lengths: bool = False
    reverse: str = "0"
    counter: bool = False
    cluster: bool = False
    period: int = 1
    joins: int = 1
    bias: bool = True
    save: bool = True
    options: tuple[str, ...] = ()  # of layer_options.OPTIONS

    def __str__(self) -> str:
        odd = {k: v for k, v in vars(self).items() if v != getattr(Case("", "", 0), k)}
        odd["options"] = "+".join(odd.get("options", ())) or None
        bare = ("cell", "precision", "options")
        return "-".join(str(v) if k in bare else f"{k}{v}" for k, v in odd.items() if v is not None)

    @property
    def hidden(self) -> int:
        return self.H or 16 * self.members * self.blocks - (5 if self.lengths else 2)

    def layout(self, backward: bool) -> Layout:
        dtype, precision = PRECISIONS[self.precision]
        share = -(-self.members * self.blocks // self.along)
        values = {"reset_values", "reset_values_per_step"}.intersection(self.options)
        options = {
            "inner": "all_states" in self.options or (self.save and not backward),
            "flags": bool(values or {"mask", "resets"}.intersection(self.options)),
            "values": 2 if "reset_values_per_step" in values else len(values),
            "drop": 2 if "drop_per_gate" in self.options else int("drop" in self.options),
            "of_states": OF_STATES if "zone" in self.options else (),
            "norm": bool({"norm", "rms"} & {*self.options}),
            "rms": "rms" in self.options,
        }
        return Layout(
            RECURRENCES[self.cell].program.text, dtype, precision, backward, self.members, self.blocks, self.across,
            self.along, self.columns, self.tiles, math.ceil(share * self.held), self.save and not backward,
            self.hidden % 2 == 0, self.counter, self.period, cluster=self.cluster, joins=self.joins, **options,
        )  # fmt: skip

    def choice(self, backward: bool) -> Choice:
        return Choice(self.layout(backward), self.groups, self.at_once or len(self.reverse), 0.0)

    def inputs(self) -> Inputs:
        """In float64, with the values that the dtype can hold."""
        lengths = tuple((3 * b) % (self.T + 1) for b in range(self.B)) if self.lengths else None
        given = make(
            RECURRENCES[self.cell], self.T, self.B, 3, self.hidden, self.reverse, self.bias, lengths=lengths,
            scale=1 / math.sqrt(self.hidden),  # as layers start: larger weights blow any rounding up
        )  # fmt: skip
        given = with_options(given, RECURRENCES[self.cell], self.options)
        return given.to(PRECISIONS[self.precision][0]).to(torch.float64)

    def plain(self, inputs: Inputs) -> Inputs:
        """As plain PyTorch takes it; tf32, which a CPU has not, keeps as many bits as float16."""
        return inputs.to(torch.float16 if self.precision == "tf32" else PRECISIONS[self.precision][0])


def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls on the CPU go to the group kernel as on an H100, with only the driver's call replaced."""
    for replaced in h100.replacements():
        monkeypatch.setattr(*replaced)


def named(result: Result) -> dict[str, Tensor]:
    """What a forward pass gave, by name; nothing for what it did not save."""
    parts = {"y": result.y, **{f"final {k}": s for k, s in enumerate(result.final)}}
    saved = {"gates": result.gates, "recurrent": result.recurrent, "inner": result.inner}
    return parts | {name: value for name, value in saved.items() if value.numel()}


@torch.no_grad()
def forward(case: Case, inputs: Inputs, **options: Any) -> tuple[Result, Tensor]:
    """The kernel's results, allocated full of NaN, and its error word."""
    program = RECURRENCES[case.cell].program
    low = inputs.to(PRECISIONS[case.precision][0])
    gates = reference.project(low.x, low.weights, program).contiguous()
    error = torch.zeros(1, dtype=torch.int64)
    call = low.call(RECURRENCES[case.cell])
    launches, result = group.prepare_forward(call, gates, case.save, low.all_states, case.choice(False), error)
    for tensor in (result.y, *result.final, result.recurrent, result.inner):
        tensor.fill_(math.nan)
    run_on_cpu(launches, **options)
    return result, error


@torch.no_grad()
def expected_forward(case: Case, inputs: Inputs) -> Result:
    """What the reference gives, in the dtype of its inputs."""
    return reference.forward(inputs.call(RECURRENCES[case.cell]), inputs.x, case.save, inputs.all_states)


@torch.no_grad()
def gradients(case: Case, inputs: Inputs, saved: Result | None = None, **options: Any) -> dict[str, Tensor]:
    """The gradients of `values_and_gradients` by the two kernels, or the second alone, and the products after them."""
    saved = forward(case, inputs, **options)[0] if saved is None else saved
    low = inputs.to(PRECISIONS[case.precision][0])
    error = torch.zeros(1, dtype=torch.int64)
    call = low.detached().call(RECURRENCES[case.cell])
    launches, loop = group.prepare_backward(call, saved, *_of_outputs(low, saved), case.choice(True), error)
    for tensor in (loop.d_gates, loop.d_recurrent, *loop.d_states):
        tensor.fill_(math.nan)
    run_on_cpu(launches, **options)
    assert not error.item()
    return _of_inputs(case, low, saved, group.complete(call, loop, launches))


def _of_outputs(inputs: Inputs, saved: Result) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """The gradients that `values_and_gradients` gives the outputs: of y, of the final states, of the inner ones."""
    outputs = [saved.y, *saved.final, *([saved.inner] if inputs.all_states else [])]
    d_y, *d_final = (draw(*out.shape, seed=90 + k).to(inputs.x.dtype) for k, out in enumerate(outputs))
    return d_y, d_final, d_final.pop() if inputs.all_states else None


def _of_inputs(case: Case, inputs: Inputs, saved: Result, loop: LoopGradients) -> dict[str, Tensor]:
    """By name, with the products over all steps that follow a backward loop."""
    call = inputs.detached().call(RECURRENCES[case.cell])
    d_x, d_weights = linear.gradients(call, inputs.x, saved, loop)
    found = inputs._replace(x=d_x, weights=d_weights, states=loop.d_states, reset_values=loop.d_resets).named()
    return {f"d {name}": value for name, value in found.items()}


@torch.no_grad()
def gradients_at(case: Case, inputs: Inputs, saved: Result) -> dict[str, Tensor]:
    """What plain PyTorch gives in the dtype of its inputs, at the pre-activations and states that a forward pass saved.

    A decision such as max(a, b) falls there as it falls in a kernel that reads the same numbers.
    """
    dtype = inputs.x.dtype
    saved = saved._replace(
        y=saved.y.to(dtype),
        final=[state.to(dtype) for state in saved.final],
        gates=saved.gates.to(dtype),
        recurrent=saved.recurrent.to(dtype),
        inner=saved.inner.to(state_dtype(dtype)),
    )
    loop = step.backward(inputs.detached().call(RECURRENCES[case.cell]), saved, *_of_outputs(inputs, saved))
    return _of_inputs(case, inputs, saved, loop)


def expected_gradients(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """What the reference gives, in the dtype of its inputs."""
    found = values_and_gradients(RECURRENCES[case.cell], inputs, "reference")
    return {name: value for name, value in found.items() if name.startswith("d ")}


def has_kinks(case: Case) -> bool:
    """Whether the derivative of the cell's step jumps somewhere."""
    return any(op.name in KINKS for stage in RECURRENCES[case.cell].program.stages for op in stage.ops)


def truth_and_plain(case: Case, inputs: Inputs, saved: Result) -> list[dict[str, Tensor]]:
    """The gradients that the kernels' are compared with, and plain PyTorch's.

    Where a step has kinks, rounding may move a unit across one, either way, in the kernel as in plain PyTorch: half an
    ulp of bf16 on sLSTM's inputs changes its float64 gradient by a quarter. Rounded kernels are then judged at the
    values that their forward pass saved, which has a test of its own.
    """
    plain = case.plain(inputs)
    if case.precision == "fp32" or not has_kinks(case):
        return [expected_gradients(case, given) for given in (inputs, plain)]
    return [gradients_at(case, given, saved) for given in (inputs, plain)]


def relative_error(found: Tensor, exact: Tensor) -> float:
    """The largest, relative to the largest value; an infinity equals itself."""
    if not exact.numel():
        return 0.0
    difference = torch.where(found == exact, 0, found.double() - exact)
    return difference.abs().max().item() / max(exact[exact.isfinite()].abs().max().item(), 1.0)


def assert_close(case: Case, actual: dict[str, Tensor], truth: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    """fp32 within a tight tolerance; else at most twice plain PyTorch's error, and a small floor."""
    assert actual.keys() == truth.keys() == plain.keys()
    for name, exact in truth.items():
        error, allowed = relative_error(actual[name], exact), TIGHT
        if case.precision != "fp32":
            allowed = 2 * relative_error(plain[name], exact) + FLOORS[case.precision]
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def only_where_used(values: dict[str, Tensor], inputs: Inputs) -> dict[str, Tensor]:
    """Pre-activations and products of steps beyond a row's length may be anything; they are set to 0."""
    if inputs.lengths is None:
        return values
    steps = next(iter(values.values())).shape[0]
    used = torch.arange(steps)[:, None] < inputs.lengths  # (T, B)
    masked = {
        n: torch.where(used[..., None, None, None], v, 0) for n, v in values.items() if n in ("gates", "recurrent")
    }
    return values | masked


GEOMETRIES: list[dict[str, Any]] = [
    {},
    {"along": 2, "columns": 2, "B": 19, "joins": 4},
    {"tiles": 2, "B": 21, "held": 0, "period": 2, "T": 9},
    {"blocks": 2, "across": 2, "held": 1},
    {"along": 3, "tiles": 2, "groups": 2, "B": 33, "period": 2, "joins": 2},
]
SETS: list[tuple[str, ...]] = [*((name,) for name in OPTIONS), ("mask", "resets", "drop"), tuple(OPTIONS)]
STEERED = ("lstm", "gru", "rnn", "minimal", "slstm", "gru_reset_before")


def cases() -> tuple[list[Case], list[Case]]:
    """Every group size with every cell and precision; the other options take turns so that pairs of them meet. First
    those in which every two of size, cell and precision meet, then the rest."""
    options: list[dict[str, Any]] = [
        {},
        {"lengths": True},
        {"reverse": "01", "lengths": True},
        {"reverse": "010", "at_once": 2},
        {"reverse": "1", "bias": False},
        {"counter": True, "lengths": True},
        {"T": 1},
        {"T": 3 * PERIOD + 3, "period": PERIOD},  # as it ships: more steps than slots
    ]
    found, rest = [], []
    for m, members in enumerate((1, 2, 3, 8)):
        for c, cell in enumerate(("lstm", "gru", "rnn", "minimal")):
            for p, precision in enumerate(PRECISIONS):
                geometry = GEOMETRIES[(m + 2 * c + 3 * p) % len(GEOMETRIES)]
                chosen = found if m ^ c == p else rest  # a Latin square
                option = options[(len(chosen) + m) % len(options)]
                chosen.append(Case(cell, precision, members, **{**geometry, **option}))
    found += [replace(found[0], cell=cell, precision="bf16", members=2) for cell in ("peephole_lstm", "coupled_lstm")]
    found += [  # two products a step
        Case("gru_reset_before", "bf16", 3, **(GEOMETRIES[4] | {"T": 2 * PERIOD, "period": PERIOD})),
        Case(
            "twofold", "fp32", 2, T=9, along=2, options=("mask", "reset_values", "drop_per_gate", "zone", "all_states")
        ),
        Case("twofold", "tf32", 2, bias=False, counter=True, **GEOMETRIES[2]),
        Case("twofold", "fp16", 3, cluster=True, along=3, columns=2),
    ]
    found += [  # layer normalisation
        Case("lstm", "fp32", 1, across=2, blocks=2, along=2, lengths=True, reverse="01", options=("norm",)),
        Case("gru", "bf16", 3, along=3, columns=2, B=35, T=2 * PERIOD, period=PERIOD, options=("norm", "drop")),
        Case("twofold", "tf32", 2, counter=True, options=("norm", "drop_per_gate", "mask", "resets")),
        Case("lstm", "bf16", 2, along=2, lengths=True, reverse="01", options=("rms",)),
    ]
    return found, rest


def steered_cases() -> tuple[list[Case], list[Case]]:
    """Every option alone and all together, twice, the second time apart; cells, precisions, group sizes and geometries
    take turns."""
    found = []
    for k, options in enumerate([*SETS, *SETS]):
        cell, precision = STEERED[k % len(STEERED)], list(PRECISIONS)[(k + k // len(SETS)) % 4]
        more = GEOMETRIES[k % len(GEOMETRIES)] | {"reverse": ("0", "01", "10")[k % 3], "counter": k % 7 == 0}
        found.append(Case(cell, precision, 1 + k % 3, options=options, **more))
    once = [
        *found[: len(SETS)],
        Case("gru", "fp32", 3, lengths=True, reverse="01", options=("drop_per_gate", "zone", "all_states")),
        Case("slstm", "fp32", 2, options=("mask", "resets")),  # to initial values, of which one is infinite
    ]
    return once, found[len(SETS) :]


def pairs_of_options() -> list[Case]:
    """Every two values of cell, precision, group size, geometry and options."""
    axes = pairwise(STEERED, list(PRECISIONS), (1, 2, 3), range(len(GEOMETRIES)), SETS, ("0", "1", "01"))
    return [Case(c, p, m, options=o, reverse=r, **GEOMETRIES[g]) for c, p, m, g, o, r in axes]
