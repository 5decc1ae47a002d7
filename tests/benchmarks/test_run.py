# SPDX-License-Identifier: Apache-2.0
"""The benchmarks at sizes that a CPU runs: what is wrong is never timed."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gpu_rnn
from benchmarks import run
from benchmarks.cases import comparison, options, problems, variants
from benchmarks.emulating import h100
from benchmarks.measuring import machine, timing
from gpu_rnn.backends import reference
from gpu_rnn.backends.step import launch as step
from gpu_rnn.dispatch import choice
from tests.support.paths import ROOT
from tests.support.waiting import PATIENCE

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
    compared = comparison.build(case, torch.device("cpu"), ["aten", "step"])
    (side,) = compared.sides
    for variant in (*side.variants, side.truth):
        variant.results(side.inputs.to(next(iter(variant.weights.values()))[0].dtype))
    assert modes == [direction == "training"] * 4


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_option_is_checked_against_the_truth_with_the_option(dtype: str, tmp_path: Path) -> None:
    arguments = (
        f"--device cpu --set tiny-options --dtype {dtype} --trials 1 --backend step,reference --direction training"
    )
    status, rows = measured(tmp_path, *arguments.split())
    assert status == 0, [row for row in rows if row["status"] != "ok"]
    assert {row["option"] for row in rows} == {"", *options.OPTIONS}
    assert all(row["median_us"] for row in rows)
    assert not any(row["floor_us"] or row["of_floor"] for row in rows)  # which only a GPU has


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
        f"sys.argv = ['run.py', *{ON_CPU}, '--seconds', '0.05', '--out', {str(out)!r}];"
        "runpy.run_path('benchmarks/run.py', run_name='__main__')"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    assert "[1/11] tiny/" in done.stdout
    assert f"left out for want of time: 10 of 11 cases; go on with --resume {out}\n  tiny: 10 in fp32" in done.stdout
    assert len(out.read_text().splitlines()) == 5  # the header; the first case's torch.nn, aten, step, reference


@pytest.mark.usefixtures("two_problems")
def test_a_run_goes_on_where_one_of_the_same_commit_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, again = tmp_path / "rows.csv", [*ON_CPU, "--backend", "step", "--commit"]
    monkeypatch.setattr(machine, "_commit", lambda: ("", ""))
    assert run.main([*again, "one", "--resume", str(out), "--seconds", "1e-6"]) == 0
    first = out.read_text()
    assert first.count("torch.nn") == 1
    assert run.main([*again, "one", "--resume", str(out)]) == 0
    assert "1 of 4 cases are in" in capsys.readouterr().out
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert out.read_text().startswith(first)
    assert len({tuple(row[n] for n in ("problem", "direction", "variant")) for row in rows}) == len(rows) == 8
    assert run.main([*again, "two", "--resume", str(out)]) == 0  # all of it anew
    assert out.read_text().count("\n") == 1 + 8 + 8
    assert run.main([*again[:-1], "--resume", str(out)]) == 2
    assert "give --commit" in capsys.readouterr().err
    out.write_text(first[:-9])
    assert run.main([*again, "one", "--resume", str(out)]) == 2
    assert "ends within a row" in capsys.readouterr().err
    out.write_text(first.replace("floor_us", "ground_us"))
    assert run.main([*again, "one", "--resume", str(out)]) == 2
    assert "other columns" in capsys.readouterr().err


def test_what_was_measured_of_other_code_or_versions_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, case = tmp_path / "rows.csv", variants.Case("tiny", problems.SETS["tiny"][0], "fp32", "forward")
    monkeypatch.setattr(machine, "_commit", lambda: ("one", "no"))
    facts = machine.columns(torch.device("cpu"), "two")
    assert facts["commit"] == "one"  # git knows better
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, run.table.COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerow({"seed": 0, **run.table.empty(case), **facts})
    assert run.table.finished(path, facts | {"date": "later"}) == {case.key}
    for name in ("device", "driver", "cudnn", "torch", "triton", "flashrnn", "commit"):
        assert not run.table.finished(path, facts | {name: "another"}), name
    with pytest.raises(ValueError, match="commit the changes"):
        run.table.finished(path, facts | {"dirty": "yes"})


def test_no_other_package_is_measured_under_this_commit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_rnn, "__file__", "/usr/lib/python3/site-packages/gpu_rnn/__init__.py")
    assert run.main(ON_CPU) == 2
    assert "gpu_rnn is imported from /usr/lib/python3/site-packages" in capsys.readouterr().err


def test_what_a_user_prefers_or_tuned_is_not_what_a_layer_takes_by_itself(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GPU_RNN_BACKEND", "reference")
    assert run.main(ON_CPU) == 2
    assert "GPU_RNN_BACKEND chooses" in capsys.readouterr().err
    for nothing in ("", " auto "):
        monkeypatch.setenv("GPU_RNN_BACKEND", nothing)
        machine.check_nothing_chooses(torch.device("cpu"))
    gpu_rnn.tune(gpu_rnn.GRU(3, 4), torch.randn(2, 1, 3), seconds=1e-3)
    assert run.main(ON_CPU) == 2
    assert "gpu_rnn.tuning.forget()" in capsys.readouterr().err


def test_a_cpus_cases_have_each_number_of_threads(tmp_path: Path) -> None:
    asked = ["--device", "cpu", "--set", "cpu", "--quick", "--trials", "1", "--backend", "native,step,by-hand"]
    before = torch.get_num_threads()
    status, rows = measured(tmp_path, *asked, "--only", "RNN-H64-B1-T1 *forward")
    assert status == 0 and torch.get_num_threads() == before
    names = ("torch.nn", "native", "step", "by-hand")
    assert [(row["threads"], row["variant"]) for row in rows] == [(t, name) for t in "12" for name in names]
    assert {row["device"] for row in rows} == {gpu_rnn.devices.cpu_model()} and all(row["compiler"] for row in rows)
    _, rows = measured(tmp_path, *asked, "--only", "RNNCell-H64-B1-T20*", "--threads", "1", "--limit", "1")
    assert {row["problem"] for row in rows} == {"RNNCell-H64-B1-T20"} and {row["status"] for row in rows} == {"ok"}
    assert {row["direction"] for row in rows} == {"forward"}  # the first of two
    for name, folder in ({"cpu"}, "results"), ({"tiny"}, "build"), ({"cpu", "tiny"}, "build"):
        there = machine.folder(torch.device("cpu"), name <= {*problems.FOR_A_CPU})
        assert there.relative_to(ROOT).parts[0] == {"results": "benchmarks"}.get(folder, folder)


def test_the_reference_and_inductor_are_measured_where_they_are_asked_for() -> None:
    parse = run.arguments.parser("").parse_args
    assert {"reference", "torch.compile"}.isdisjoint(run.arguments.names(parse([]), on_a_cpu=True))
    assert "reference" in run.arguments.names(parse([]), on_a_cpu=False)
    assert run.arguments.names(parse(["--backend", "torch.compile"]), on_a_cpu=True) == ["torch.compile"]


def test_all_sets_in_the_order_of_their_value() -> None:
    asked = run.arguments.parser("").parse_args(["--all"])
    cases = run.arguments.cases(asked, torch.device("cuda"))
    order = list(dict.fromkeys((case.set, case.dtype) for case in cases))
    assert order[:5] == [("quick", "bf16"), ("rl", "bf16"), ("rl", "fp16"), ("rl", "fp32"), ("rl", "ieee")]
    assert {case.set for case in cases} == problems.SETS.keys() - {"tiny", "tiny-options", *problems.FOR_A_CPU}
    assert len({case.key for case in cases}) == len(cases)
    with pytest.raises(ValueError, match="--all"):
        run.arguments.cases(run.arguments.parser("").parse_args(["--all", "--set", "rl"]), torch.device("cuda"))


@pytest.mark.skipif(h100.unavailable() != "", reason=h100.unavailable() or "all is here")
def test_the_gpus_kernels_are_checked_on_the_cpu(tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    command = [sys.executable, "benchmarks/run.py", "--emulate", "--dtype", "bf16", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert {row["status"] for row in rows} == {"emulated"}
    assert {row["variant"] for row in rows} >= {"resident", "group", "step"}
    assert all(row["device"].startswith("emulated GPU on ") and row["error"] for row in rows)
    of_time = ("median_us", "p20_us", "p80_us", "us_per_step", "floor_us", "of_floor", "predicted_us", "ratio")
    assert not any(row[name] for row in rows for name in of_time)


@pytest.mark.parametrize(
    ("more", "times"),
    [({}, 1), ({"layers": 3}, 1.2), ({"layers": 3, "bidirectional": True}, 3), ({"H": 1024, "layers": 3}, 3)],
)
def test_rows_have_the_floor_of_all_layers_and_the_predictions(
    more: dict[str, Any], times: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = problems.named("LSTM", **{"T": 10, "B": 128, "H": 32} | more)
    case = variants.Case("scaling", problem, "bf16", "training")
    monkeypatch.setattr(choice, "device_of", lambda device: gpu_rnn.devices.describe("H100"))
    compared = comparison.build(case, torch.device("cpu"), ["step"])
    rows = run.table.begin(case, compared, predictions=True)
    one = compared.explanation.floor_us
    # Three layers of 32 units have room side by side, each a step behind: 12 steps instead of 10. Of 1,024 not.
    assert one is not None and float(rows["step"]["floor_us"]) == pytest.approx(times * one, abs=1e-3)
    assert float(rows["step"]["predicted_us"]) > times * one and rows["torch.nn"]["predicted_us"] == ""
    run.table.enter(rows, {"step": timing.Timing("clock", 1, [1e-3])}, problem.T)
    assert float(rows["step"]["of_floor"]) == pytest.approx(times * one / 100, rel=0.01)  # 1 ms / 10 steps


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
            assert set(p.dtypes) <= variants.DTYPES.keys() and set(p.directions) <= set(problems.BOTH) and p.note


def test_the_table_of_sets_counts_their_cases() -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text()
    table = [line.split("|")[1:3] for line in text.split("| set |")[1].split("\n\n")[0].splitlines()[2:]]
    counts = {tuple(re.findall(r"`(.+?)`", names)): int(count) for names, count in table}
    assert {name for names in counts for name in names} == problems.SETS.keys()
    for names, count in counts.items():
        found = (p for name in names for p in problems.SETS[name])
        assert sum(len(p.dtypes) * len(p.directions) for p in found) == count


def test_the_tables_of_files_name_each_of_them() -> None:
    folder = ROOT / "benchmarks"
    table = (folder / "README.md").read_text().split("## What is compared")[0]
    named = set()
    for line in table.splitlines():
        first, *others = re.findall(r"`([\w/]+(?:\.py|/))`", line.split("|")[1]) if line.startswith("| `") else [""]
        named |= {folder / name for name in (first, *(Path(first).parent / other for other in others)) if name}
    parts = {path for path in folder.rglob("*.py") if path.name != "__init__.py" and path.parent.name != "pictures"}
    assert named == parts | {folder / "reporting" / "pictures"}


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
