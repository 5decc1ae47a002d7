# SPDX-License-Identifier: Apache-2.0
"""The benchmarks at sizes that a CPU runs: what is wrong is never timed."""

from __future__ import annotations

import csv
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gpu_rnn
from gpu_rnn import reference
from gpu_rnn.launch import step

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))  # a folder of scripts, which import each other by name

import problems  # noqa: E402
import run  # noqa: E402
import timing  # noqa: E402
import variants  # noqa: E402

ON_CPU = [
    "--device",
    "cpu",
    "--set",
    "tiny",
    "--dtype",
    "fp32",
    "--trials",
    "1",
    "--backend",
    "aten,step,reference",
]


def measured(tmp_path: Path, *arguments: str) -> tuple[int, list[dict[str, str]]]:
    """run.py's exit status and the rows it wrote."""
    out = tmp_path / "rows.csv"
    status = run.main([*arguments, "--out", str(out)])
    with out.open(newline="") as file:
        return status, list(csv.DictReader(file))


@pytest.fixture
def two_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the set tiny only one problem without heads and one with."""
    kept = [problems.SETS["tiny"][0], next(p for p in problems.SETS["tiny"] if p.heads > 1)]
    monkeypatch.setitem(problems.SETS, "tiny", tuple(kept))


def test_every_variant_is_checked_and_timed(tmp_path: Path) -> None:
    status, rows = measured(tmp_path, *ON_CPU)
    assert status == 0
    assert {row["status"] for row in rows} == {"ok"}
    cases = {(p.name, d) for p in problems.SETS["tiny"] for d in p.directions}
    assert {(row["problem"], row["direction"]) for row in rows} == cases
    for row in rows:
        assert float(row["error"]) <= float(row["tolerance"])
        assert float(row["p20_us"]) <= float(row["median_us"]) <= float(row["p80_us"])
        assert row["timing"] == "clock" and row["torch"] == torch.__version__ and row["date"] and row["seed"]
    by_case: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        by_case.setdefault((row["problem"], row["direction"]), {})[row["variant"]] = float(row["median_us"])
    for row in rows:
        times = by_case[row["problem"], row["direction"]]
        aten = set() if row["heads"] != "1" else {"aten"}  # ATen has no rule for vmap, which heads are
        assert times.keys() == {"torch.nn", "step", "reference"} | aten
        assert float(row["ratio"]) == pytest.approx(
            times["torch.nn"] / times[row["variant"]], rel=0.01
        )  # both are rounded


def wrong_output(*arguments: Any, forward: Callable[..., Any] = step.forward) -> Any:
    result = forward(*arguments)
    return result._replace(y=result.y * 1.01)


def unwritten_output(*arguments: Any, forward: Callable[..., Any] = step.forward) -> Any:
    result = forward(*arguments)
    y = result.y.new_empty(result.y.shape)
    # Memory that still holds the right values of the call before, as an allocator hands it out, unless it is poisoned.
    y[:-1], y[-1] = result.y[:-1], torch.where(y[-1].isnan(), y[-1], result.y[-1])
    return result._replace(y=y)


def wrong_gradient(*arguments: Any, backward: Callable[..., Any] = step.backward) -> Any:
    found = backward(*arguments)
    return found._replace(d_gates=found.d_gates * 1.01)


def raises(*arguments: Any) -> Any:
    raise RuntimeError("the device is on fire\nand more")


@pytest.mark.usefixtures("two_problems")
@pytest.mark.parametrize(
    ("what", "replacement", "status", "directions"),
    [
        ("forward", wrong_output, "wrong", {"forward", "training"}),
        ("forward", unwritten_output, "wrong", {"forward", "training"}),
        ("backward", wrong_gradient, "wrong", {"training"}),
        ("forward", raises, "failed", {"forward", "training"}),
    ],
)
def test_a_wrong_backend_is_refused(
    what: str,
    replacement: Callable[..., Any],
    status: str,
    directions: set[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(step, what, replacement)
    code, rows = measured(tmp_path, *ON_CPU)
    assert code == 1
    for row in rows:
        bad = row["variant"] == "step" and row["direction"] in directions
        assert row["status"] == (status if bad else "ok"), row
        assert bool(row["median_us"]) is bool(row["ratio"]) is not bad
        assert bool(row["detail"]) is bad


@pytest.mark.usefixtures("two_problems")
def test_a_wrong_reference_refuses_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = reference.forward

    def wrong(*arguments: Any, **options: Any) -> Any:
        result = forward(*arguments, **options)
        return result._replace(y=result.y * 1.01)

    monkeypatch.setattr(reference, "forward", wrong)
    code, rows = measured(tmp_path, *ON_CPU)
    assert code == 1
    assert {row["status"] for row in rows if row["variant"] == "torch.nn"} == {"wrong"}


@pytest.mark.parametrize("direction", problems.BOTH)
def test_layers_are_in_the_mode_of_the_direction(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    for library in (torch.nn, gpu_rnn):
        forward = library.LSTM.forward

        def noted(self: Any, x: torch.Tensor, forward: Callable[..., Any] = forward) -> Any:
            modes.append(self.training)
            return forward(self, x)

        monkeypatch.setattr(library.LSTM, "forward", noted)
    case = variants.Case("tiny", problems.SETS["tiny"][0], "fp32", direction)
    compared = variants.build(case, torch.device("cpu"), ["aten", "step"])
    for variant in (*compared.variants, compared.truth):
        variant.results(compared.inputs.to(next(iter(variant.weights.values()))[0].dtype))
    assert modes == [direction == "training"] * 4


def test_the_check_leaves_torch_as_it_was() -> None:
    case = variants.Case("tiny", problems.SETS["tiny"][0], "fp32", "training")
    before = torch.backends.cudnn.rnn.fp32_precision
    with variants.products_as(case):
        inputs, compared, truth, _ = variants.build(case, torch.device("cpu"), ["step"])
        exact = truth.results(inputs.to(torch.float64))
        assert variants.errors(compared[0], inputs, exact).keys() >= {
            "y",
            "final state 1",
            "d_x",
            "d_weight_hh_l0",
        }
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.rnn.fp32_precision == before


@pytest.mark.parametrize(
    "arguments",
    [["--set", "tny"], ["--dtype", "fp8"], ["--backend", "step,warp"], ["--direction", "backward"]],
)
def test_a_name_that_is_not_there_is_named(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--device", "cpu", *arguments]) == 2
    assert f"no {arguments[0][2:]}" in capsys.readouterr().err


def test_without_tqdm_and_matplotlib_and_within_seconds(tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    code = (
        "import runpy, sys; sys.modules |= {'tqdm': None, 'matplotlib': None};"
        "sys.path.insert(0, 'benchmarks');"
        f"sys.argv = ['run.py', *{ON_CPU}, '--seconds', '0.05', '--out', {str(out)!r}];"
        "runpy.run_path('benchmarks/run.py', run_name='__main__')"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "[1/11] tiny/" in done.stdout
    assert "left out after 0.05 s: 10 of 11 cases" in done.stdout
    assert (
        len(out.read_text().splitlines()) == 5
    )  # the header and the first case's torch.nn, aten, step, reference


def test_names_are_unique_and_known() -> None:
    assert {
        "flashrnn",
        "deepbench",
        "haste",
        "rnnt",
        "gnmt",
        "nanopore",
        "rl",
        "streaming",
    } < problems.SETS.keys()
    for found in problems.SETS.values():
        assert len({p.name for p in found}) == len(found)
        for p in found:
            assert (
                set(p.dtypes) <= variants.DTYPES.keys() and set(p.directions) <= set(problems.BOTH) and p.note
            )


def test_calls_take_turns() -> None:
    order: list[str] = []

    def call(name: str, seconds: float) -> Callable[[], None]:
        def do() -> None:
            time.sleep(seconds)
            order.append(name)

        return do

    calls = {"fast": call("fast", 0.02), "slow": call("slow", 0.06)}
    limits = {"device": torch.device("cpu"), "seconds": 0.3, "deadline": time.monotonic() + 60}
    found = timing.interleave(calls, trials=4, **limits)
    assert order[: 2 * timing.WARM_UP] == ["fast"] * timing.WARM_UP + ["slow"] * timing.WARM_UP
    assert order[6:10] == ["fast", "slow", "slow", "fast"]
    assert len(found["slow"].samples) == timing.FEWEST  # 3 × 0.06 s are more than its half of 0.3 s
    assert len(found["fast"].samples) == 4
    assert found["slow"].median > 1.5 * found["fast"].median
    late = timing.interleave(calls, trials=4, **limits | {"deadline": 0})
    assert [len(t.samples) for t in late.values()] == [1, 1]


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    status, rows = measured(tmp_path, "--set", "tiny", "--dtype", "bf16,ieee", "--trials", "2")
    assert status == 0, [row for row in rows if row["status"] != "ok"]
    assert {row["timing"] for row in rows if row["T"] != "1"} == {"events"}
    assert all(float(row["peak_mib"]) > 0 and row["driver"] for row in rows)
