# SPDX-License-Identifier: Apache-2.0
"""Random combinations of every option, values and gradients, beside the loops by hand of `options_by_hand`."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.certifying import random_calls
from benchmarks.certifying.given import Given
from benchmarks.certifying.random_calls import OPTIONS, leaves, sensible, values_and_gradients
from gpu_rnn import cells
from gpu_rnn.recurrence import Recurrence
from tests.support import native
from tests.support import options_by_hand as by_hand
from tests.support.cuda.machines import NEEDS_COMPILER
from tests.support.group import pretend

CELLS = frozenset(by_hand.CELLS)
TIGHT, SINGLE = 1e-9, 2e-5  # float64 and float32, sums in another order

# Each cell, and each with its values clipped, is two builds.
FEW_BUILDS = frozenset({"lstm", "gru", "gru_reset_before", "rnn"})
WITHOUT = {
    "native": {"clip", *CELLS - FEW_BUILDS},
    "resident": {"layer_norm", "rms_norm"},
}

counted: dict[str, Counter[str]] = defaultdict(Counter)  # of each backend


@pytest.fixture(scope="module", autouse=True)
def every_option_is_drawn() -> Iterator[None]:
    """By each of the tests that ran: one that draws an option never says nothing of it. Memory that nobody wrote is
    NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    for backend, found in counted.items():
        if backend == "group":  # its tests may be shared out between processes: see test_the_builds_have_every_option
            continue
        assert not {*OPTIONS, *by_hand.CELLS} - WITHOUT.get(backend, set()) - found.keys(), (backend, found)


@st.composite
def calls(draw: Any, without: frozenset[str] = frozenset(), among: frozenset[str] = CELLS) -> dict[str, Any]:
    """A combination of options that makes sense, and sizes."""
    cell = draw(st.sampled_from(sorted(among)))
    # Each by itself, one in six: of a set Hypothesis draws the last names much less often than the first.
    chosen = {name for name in OPTIONS if name not in without and draw(st.integers(0, 5)) == 3}
    if "proj_size" in chosen:
        cell = "lstm"
    least = 2 if "proj_size" in chosen else 1  # a projection makes h narrower
    sizes = {
        name: draw(st.integers(low, most))
        for name, low, most in (("T", 1, 5), ("B", 1, 3), ("I", 1, 3), ("H", least, 4))
    }
    return {"cell": cell, "options": sensible(chosen), "seed": draw(st.integers(0, 2**20)), **sizes}


def recurrence(call: dict[str, Any]) -> Recurrence:
    return cells.CELLS[call["cell"]](**random_calls.of_the_cell(call["options"]))


def tensors(call: dict[str, Any]) -> Given:
    sizes = random_calls.fitting(random_calls.Sizes(*(call[name] for name in "TBIH")), call["options"])
    return random_calls.tensors(call["cell"], recurrence(call), sizes, call["options"], call["seed"])


def compare(call: dict[str, Any], backend: str, dtype: torch.dtype, tolerance: float) -> None:
    made, options = tensors(call), call["options"]
    y, final, every = by_hand.run(made)
    outputs = [y, *final, *(every if "all_states" in options else [])]
    expected = values_and_gradients(outputs, [*leaves(made).values()])
    low = made if dtype == torch.float64 else made.to(dtype)
    outputs = random_calls.call(low, recurrence(call), options, backend)
    found = values_and_gradients(outputs, [*leaves(low).values()])
    for value, truth in zip(found, expected, strict=True):
        scale = max(1.0, truth.abs().max().item()) if truth.numel() else 1.0
        torch.testing.assert_close(value, truth, rtol=0, atol=tolerance * scale)
    counted[backend].update((*options, call["cell"]))


def combinations(count: int) -> Any:
    """The same `count` combinations at every run."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=checks)


@combinations(500)
@given(calls())
def test_reference(call: dict[str, Any]) -> None:
    compare(call, "reference", torch.float64, TIGHT)


@combinations(400)
@given(calls())
def test_step(call: dict[str, Any]) -> None:
    compare(call, "step", torch.float64, TIGHT)


@pytest.mark.interpreter
@combinations(70)
@given(calls())
def test_step_in_the_interpreter(call: dict[str, Any]) -> None:
    compare(call, "step", torch.float32, SINGLE)


@pytest.mark.interpreter
@combinations(70)
@given(calls(without=frozenset({"layer_norm", "rms_norm"})))
def test_resident_in_the_interpreter(call: dict[str, Any]) -> None:
    compare(call, "resident", torch.float32, SINGLE)


@native.NEEDS_C
@combinations(200)
@given(calls(without=frozenset({"clip"}), among=FEW_BUILDS))
def test_native(call: dict[str, Any]) -> None:
    compare(call, "native", torch.float64, TIGHT)


@native.NEEDS_C
@pytest.mark.slow
@combinations(1000)
@given(calls())
def test_native_with_every_cell(call: dict[str, Any]) -> None:
    compare(call, "native", torch.float64, TIGHT)


# Each is a build of the group kernel, with every option that it takes in one of them at least.
BUILDS = (
    ("lstm", {"mask", "all_states", "bidirectional", "heads"}),
    ("lstm", {"resets", "reset_state", "recurrent_dropout", "num_layers"}),
    ("lstm", {"zoneout", "all_states", "batch_first"}),
    ("gru", {"lengths", "recurrent_dropout_per_gate", "no_bias"}),
    ("gru", {"mask", "resets", "zoneout", "batch_first"}),
    ("peephole_lstm", {"lengths", "zoneout", "recurrent_dropout"}),
    ("peephole_lstm", {"mask", "recurrent_dropout_per_gate", "bidirectional", "num_layers"}),
    ("rnn", {"resets", "reset_state_per_step", "mask", "all_states"}),
    ("lstm", {"clip", "lengths", "all_states"}),
    ("gru_reset_before", {"mask", "all_states", "save_states"}),
    ("lstm", {"layer_norm", "lengths"}),
    ("lstm", {"proj_size", "mask", "resets", "reset_state", "bidirectional"}),
    ("lstm", {"proj_size", "rms_norm", "lengths", "all_states", "heads"}),
)


def test_the_builds_have_every_option() -> None:
    assert (
        not {*OPTIONS, *by_hand.CELLS} - {cell for cell, _ in BUILDS} - set().union(*(options for _, options in BUILDS))
    )


@pytest.mark.cuda_cpu
@NEEDS_COMPILER
@pytest.mark.parametrize(("cell", "options"), BUILDS, ids=lambda part: part if isinstance(part, str) else "")
@combinations(6)
@given(call=calls())
def test_group_on_the_cpu(cell: str, options: set[str], call: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        pretend(monkeypatch)
        monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")
        compare(call | {"cell": cell, "options": frozenset(options)}, "group", torch.float32, SINGLE)
