# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/soak.py`: a broken backend is found, whatever is drawn, and its case comes again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import soak
from benchmarks.certifying import record, soak_cases
from gpu_rnn.backends.step import launch as step


def scaled(*arguments: Any, forward: Callable[..., Any] = step.forward) -> Any:
    result = forward(*arguments)
    return result._replace(y=result.y * 1.05)


def unwritten(*arguments: Any, forward: Callable[..., Any] = step.forward) -> Any:
    result = forward(*arguments)
    y = result.y.new_empty(result.y.shape)  # full of NaN in the soak
    y[:-1] = result.y[:-1]
    return result._replace(y=y)


def wrong_gradient(*arguments: Any, backward: Callable[..., Any] = step.backward) -> Any:
    found = backward(*arguments)
    return found._replace(d_gates=found.d_gates * 1.05)


def raises(*arguments: Any) -> Any:
    raise RuntimeError("the device is on fire\nand more")


@pytest.mark.parametrize(
    ("what", "replacement", "said"),
    [
        ("forward", scaled, "step alone: "),
        ("forward", unwritten, "is off by inf"),
        ("backward", wrong_gradient, "step alone: d "),
        ("forward", raises, "step: RuntimeError: the device is on fire"),
    ],
)
def test_the_soak_finds_a_broken_backend(
    what: str, replacement: Callable[..., Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak, "BACKENDS", ("step",))
    path = tmp_path / "record"
    monkeypatch.setenv(record.RECORD, str(path))
    arguments = ["--device", "cpu", "--seed", "1", "--cases", "4"]
    assert soak.main(arguments) == 0
    assert record.read(path).count("passed") >= 3
    path.unlink()
    monkeypatch.setattr(step, what, replacement)
    assert soak.main(arguments) == 1
    failures = record.read(path).of("failed")
    assert len(failures) >= 0.8 * len(record.read(path).ends)  # a case without gates' gradients may hide one
    assert said in failures[0]["detail"]
    path.unlink()
    again = failures[-1]["repeat"].split("soak.py ")[1].split()
    assert soak.main(again) == 1
    assert record.read(path).of("failed") == failures[-1:]


def test_a_backend_that_never_ran_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record"
    monkeypatch.setenv(record.RECORD, str(path))
    monkeypatch.setattr(soak, "BACKENDS", ("step", "group"))  # group finds no GPU
    monkeypatch.setattr(soak, "_pretending", lambda run, backend, device: run)
    assert soak.main(["--device", "cpu", "--cases", "1"]) == 1
    found = record.read(path)
    assert found.notes["compared"].keys() == {"step alone"}
    assert [end["name"] for end in found.of("failed")] == ["group"]
    monkeypatch.setattr(soak, "BACKENDS", ("step", "aten"))
    assert soak.main(["--device", "cpu", "--cases", "1"]) == 0  # at once, whatever the seed


def test_asking_again_excuses_no_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """A case whose gradients plain PyTorch gets less and less right, the more roundings it is asked for."""
    case, exact = soak_cases.draw(11, 24, "cpu"), {"y": torch.ones(4), "d x": torch.ones(4)}
    compared = soak.Comparison(case, torch.device("cpu"))
    compared.exact, compared.plain, compared.known = exact, {"y": 0.0, "d x": 0.01}, {"y", "d x"}

    def less_right(members: Any) -> None:
        compared.plain["d x"] += soak.MOST * compared.floor

    monkeypatch.setattr(compared, "_ask", less_right)
    (said,) = compared.wrong("step", "alone", exact | {"d x": torch.full((4,), torch.nan)}, Counter())
    assert said.startswith("step alone: d x is off by inf")


def test_the_soak_sees_one_wrong_element_of_many() -> None:
    case = soak_cases.draw(11, 24, "cpu")
    compared = soak.Comparison(case, torch.device("cpu"))
    exact = {name: torch.randn(1000, 1000, dtype=torch.float64) for name in ("y", "final h")}
    compared.exact, compared.asked = exact, True
    compared.plain = soak.errors(exact, exact)
    compared.known = {*compared.plain}
    assert compared.wrong("step", "alone", exact, Counter()) == []
    for name, value in exact.items():
        found = value.clone()
        found[500, 500] += 2
        (said,) = compared.wrong("step", "alone", exact | {name: found}, Counter())
        assert said.startswith(f"step alone: an element of {name} is off by 2.0e+00")


def test_a_case_follows_from_its_seed_and_number() -> None:
    cases = [soak_cases.draw(5, number, "cuda") for number in range(300)]
    assert cases == [soak_cases.draw(5, number, "cuda") for number in range(300)]
    assert cases != [soak_cases.draw(6, number, "cuda") for number in range(300)]
    assert {name for case in cases for name in case.options} == set(soak_cases.random_calls.OPTIONS)
    assert {case.precision for case in cases} == set(soak.PRECISIONS)
    assert {case.heads for case in cases} == {1, 2, 3} and {case.captured for case in cases} == {False, True}
    for case in cases:
        assert case.recurrence.gates  # every combination of cell and activations exists
        assert case.sizes.H > 1 or "proj_size" not in case.options


@pytest.mark.gpu
def test_the_soak_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record"
    monkeypatch.setenv(record.RECORD, str(path))
    assert soak.main(["--seconds", "10"]) == 0, record.read(path).of("failed")
    ways = record.read(path).notes["compared"]
    assert any(name.endswith("replayed") for name in ways) or any(name.endswith("stream") for name in ways)
