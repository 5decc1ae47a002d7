# SPDX-License-Identifier: Apache-2.0
"""Random calls and what is right of them: `options_by_hand` in float64, which uses nothing of the package.

A case follows from its seed and number alone. float64 runs on the reference, the step loop and ATen; float32 on the
kernels too: `step` and `resident` where Triton interprets, `group` as C++ on the CPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import pytest
import torch
from torch import Tensor

from benchmarks.certifying import random_calls
from benchmarks.certifying.given import Given
from benchmarks.certifying.random_calls import Sizes, leaves, with_leaves
from gpu_rnn import cells
from gpu_rnn.backends import triton_interpreter
from gpu_rnn.backends.native import building as native
from gpu_rnn.recurrence import Recurrence
from tests.support import options_by_hand as by_hand
from tests.support.cuda.machines import NEEDS_COMPILER
from tests.support.group import pretend, relative_error

from . import formulas

MOST = {"T": 7, "B": 4, "I": 4, "H": 9}
MOST_OPTIONS = 5
TIGHT, SINGLE = 1e-9, 2e-5  # float64 and float32: sums in another order, relative to the largest value
WORSE = 4  # times plain PyTorch's error in float32, where that is more
FEW = 4 * 2.0**-23  # units in the last place, to which the kernels' own functions are exact (kernels/triton/math.py)
TWICE, TIMES = 2, 8  # plain PyTorch's largest error of so many, where all that is given is off by `FEW`
WAYS = ("first derivatives", "first derivatives", "second derivatives", "no_grad", "inference_mode")
LAYOUTS = ("dense", "dense", "batch first in memory", "with gaps", "turned round")
NATIVE_EVERY = 40  # a new cell is two builds for each dtype, some half a second each
GROUP_EVERY = 8  # a build of the group kernel takes a C++ compiler seconds
# With these ATen takes a call.
PLAIN = frozenset({"bidirectional", "num_layers", "proj_size", "no_bias", "batch_first"})


@dataclass(frozen=True)
class Case:
    """One call, made on every backend that takes it."""

    number: int
    cell: str  # of options_by_hand.CELLS, or "drawn"
    formula: formulas.Formula | None
    options: frozenset[str]
    sizes: Sizes
    layout: str  # of what is given
    way: str
    seed: int  # of the tensors

    def __str__(self) -> str:
        sizes = " ".join(f"{name} {size}" for name, size in zip("TBIH", self.sizes, strict=True))
        return f"{self.cell}, {sizes}, {self.layout}, {self.way}, {' '.join(sorted(self.options)) or 'no options'}"

    @cached_property
    def recurrence(self) -> Recurrence:
        return (
            self.formula.recurrence()
            if self.formula
            else cells.CELLS[self.cell](**random_calls.of_the_cell(self.options))
        )

    @cached_property
    def given(self) -> Given:
        made = random_calls.tensors(self.cell, self.recurrence, self.sizes, self.options, self.seed)
        if self.formula is None:
            return made
        return replace(made, formula=(self.formula.by_hand, len(self.formula.gates)), initial=[*self.formula.initial])

    def backends(self) -> list[tuple[str, torch.dtype]]:
        """Those that must take the case, with the dtypes to run them in."""
        found = [("reference", torch.float64), ("step", torch.float64)]
        if self.recurrence.aten and self.options <= PLAIN and self.way != "second derivatives":
            found += [("aten", torch.float64), ("aten", torch.float32)]
        if (
            self.formula is None or self.number % 2 == 0
        ):  # drawn without kinks, which roundings may be on either side of
            found.append(("step", torch.float32))
            if triton_interpreter.INTERPRETING and not self.options & {"layer_norm", "rms_norm"}:
                found.append(("resident", torch.float32))
            if self.number % NATIVE_EVERY == 0 and HAS_C:
                found += [("native", torch.float64), ("native", torch.float32)]
            if self.number % GROUP_EVERY == 0 and self.suits_group and HAS_COMPILER:
                found.append(("group", torch.float32))
        return found

    @property
    def suits_group(self) -> bool:
        """Whether `group` takes it in a short build: with one product a step, whose projected h nothing steers."""
        steered = self.options & {"recurrent_dropout", "recurrent_dropout_per_gate", "zoneout"}
        return len(self.recurrence.program.stages) == 1 and not ("proj_size" in self.options and steered)


# Whatever it is: none of these calls may raise.
ERRORS: tuple[type[Exception], ...] = (
    ArithmeticError,
    AssertionError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
if importlib.util.find_spec("triton"):  # it exists for Linux only
    ERRORS += (importlib.import_module("triton.errors").TritonError,)
HAS_C = any(map(shutil.which, native.COMPILERS))
HAS_COMPILER = not NEEDS_COMPILER.args[0]


def draw(seed: int, number: int) -> Case:
    """The case of that number."""
    rng = random.Random(f"{seed} {number}")
    cell, formula = rng.choice([*sorted(by_hand.CELLS), *["drawn"] * 4]), None
    if cell == "drawn":
        formula = formulas.draw(rng, smooth=number % 2 == 0)
    chosen = rng.sample(random_calls.OPTIONS, rng.randint(0, MOST_OPTIONS))
    if formula is not None:
        chosen = [name for name in chosen if name != "clip"]  # an argument of the library's cells
    if cell != "lstm":
        chosen = [name for name in chosen if name != "proj_size"]
    if rng.random() < 0.2:
        chosen = [name for name in chosen if name in PLAIN]
    options = random_calls.sensible(chosen)
    sizes = random_calls.fitting(Sizes(*(rng.randint(1, most) for most in MOST.values())), options)
    return Case(number, cell, formula, options, sizes, rng.choice(LAYOUTS), rng.choice(WAYS), rng.randrange(2**31))


class Truth:
    """What is right of a case, and what plain PyTorch makes of it in float32."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.exact = results(case, by_hand_outputs(case.given), case.given)

    @cached_property
    def plain(self) -> list[float]:
        return self._errors(self.case.given.to(torch.float32))

    @cached_property
    def conditioned(self) -> list[float]:
        """Plain PyTorch's errors where what is given is off by a few roundings: they grow with the condition of a case.

        Layer normalisation over two values has an unbounded one, and later steps multiply what it gives.
        """
        given, generator = self.case.given, torch.Generator().manual_seed(self.case.seed)
        errors = []
        for _ in range(TIMES):
            off = with_leaves(given, [_off(leaf, generator) for leaf in leaves(given).values()])
            errors.append(self._errors(off.to(torch.float32)))
        return [max(each) for each in zip(*errors, strict=True)]

    def _errors(self, rounded: Given) -> list[float]:
        found = results(self.case, by_hand_outputs(rounded), rounded)
        return [relative_error(f, e) for f, e in zip(found, self.exact, strict=True)]

    def wrong(self, backend: str, dtype: torch.dtype) -> str:
        """What is wrong of a backend's results, in words; empty where all is right."""
        found = run(self.case, backend, dtype)
        for k, (value, exact) in enumerate(zip(found, self.exact, strict=True)):
            if value.shape != exact.shape:
                return f"result {k} is {tuple(value.shape)}, should be {tuple(exact.shape)}"
            error, allowed = relative_error(value, exact), TIGHT
            if dtype != torch.float64:
                allowed = max(SINGLE, WORSE * self.plain[k])
                allowed = allowed if error <= allowed else max(allowed, TWICE * self.conditioned[k])
            if not error <= allowed:
                return f"result {k} of {len(found)} is off by {error:.1e}, {allowed:.1e} is allowed"
        return ""


def check(case: Case) -> Iterator[tuple[str, str]]:
    """Each backend that takes a case, and what is wrong with its results; empty where all is right."""
    truth = Truth(case)
    for backend, dtype in case.backends():
        name = f"{backend} {str(dtype).removeprefix('torch.')}"
        try:
            said = truth.wrong(backend, dtype)
        except ERRORS as error:
            said = f"{type(error).__name__}: {error}"
        yield name, f"case {case.number}, {case}\n    {name}: {said}" if said else ""


def repeat(seed: int, number: int) -> str:
    """The command that runs one case again."""
    return f".venv/bin/python tests/fuzzing --seed {seed} --case {number}"


def by_hand_outputs(given: Given) -> tuple[list[Tensor], list[Tensor]]:
    """y with the final states, and all states."""
    y, final, every = by_hand.run(given)
    return [y, *final], every


def results(case: Case, outputs: tuple[list[Tensor], list[Tensor]], given: Given) -> list[Tensor]:
    """Outputs and, if the case asks for them, derivatives, in float64."""
    wanted, all_states = outputs
    found = [*wanted, *(all_states if "all_states" in case.options else [])]
    of, derivatives = [*leaves(given).values()], []
    if "derivatives" in case.way:
        twice = case.way == "second derivatives"
        derivatives = random_calls.gradients(found, of, create_graph=twice)
        if twice:
            derivatives += random_calls.gradients(derivatives, of)
    return [value.detach().double() for value in (*found, *derivatives)]


def run(case: Case, backend: str, dtype: torch.dtype) -> list[Tensor]:
    """The library's results."""
    given = case.given if dtype == torch.float64 else case.given.to(dtype)
    laid = with_leaves(given, [_laid(leaf, case.layout) for leaf in leaves(given).values()])
    context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(case.way, torch.enable_grad)
    with pytest.MonkeyPatch.context() as monkeypatch, context():
        if backend == "group":
            pretend(monkeypatch)
            monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")
        found = random_calls.call(laid, case.recurrence, case.options, backend)
        count = 1 + len(case.recurrence.states)
        return results(case, (found[:count], found[count:]), given)


def _off(leaf: Tensor, generator: torch.Generator) -> Tensor:
    """Values off by up to `FEW`, each by its own."""
    return leaf.detach() * (1 + FEW * (2 * torch.rand(leaf.shape, generator=generator, dtype=leaf.dtype) - 1))


def _laid(leaf: Tensor, layout: str) -> Tensor:
    """The same values with other strides."""
    if layout == "batch first in memory" and leaf.dim() > 1:
        return leaf.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "with gaps":
        return torch.stack([leaf, torch.full_like(leaf, torch.nan)], -1)[..., 0]
    if layout == "turned round":
        return leaf.movedim(0, -1).contiguous().movedim(-1, 0)
    return leaf
