# SPDX-License-Identifier: Apache-2.0
"""The cost models against results: the choice of each committed results folder, and the fit itself on made-up rows.

tests/data/costs_synthetic.csv holds no measurement; tests/support/synthetic_costs.py says what it holds.
"""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import gpu_rnn
from benchmarks import fit
from benchmarks.cases import problems
from benchmarks.cases.names import TORCH
from benchmarks.reporting import results
from gpu_rnn import devices, memo
from gpu_rnn.backends import rates
from gpu_rnn.backends.group import launch as group
from gpu_rnn.backends.group import nvrtc
from gpu_rnn.dispatch import choice
from tests.support import synthetic_costs as synthetic
from tests.support.paths import ROOT

pytestmark = pytest.mark.usefixtures("native_by_itself")  # as a user has it

H100 = devices.DEVICES["H100"]
FOLDERS = sorted({path.parent for path in (ROOT / "benchmarks" / "results").glob("*/*.csv")})


@pytest.fixture(autouse=True)
def any_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel is built, should CuPy be here."""
    monkeypatch.setattr(group, "prepare", lambda problem: None)


@pytest.fixture(scope="module")
def timed() -> list[fit.Timed]:
    return fit.read([synthetic.FILE])


@pytest.fixture(scope="module")
def fitted(timed: list[fit.Timed]) -> rates.Rates:
    return rates.PREDICTED.having(fit.fit(timed), "fitted")


def complaints(rows: Iterable[fit.Timed], given: rates.Rates) -> list[str]:
    return [each.complaint for each in fit.decisions(list(rows), given) if each.complaint]


@pytest.mark.parametrize("folder", FOLDERS or [None], ids=lambda folder: folder.name if folder else "made-up results")
def test_the_choice_holds_against_the_results(folder: Path | None, timed: list[fit.Timed], fitted: rates.Rates) -> None:
    """No choice is more than 5 % above the fastest of ours, nor slower than torch.nn by more than the noise.

    As long as nothing is measured the made-up results stand in, with the constants fitted to them.
    """
    if folder is not None:
        timed = fit.read(sorted(folder.glob("*.csv")))
        fitted = rates.of(timed[0].problem.device)
    assert not complaints(timed, fitted)


def test_what_says_fitted_names_results_that_are_here() -> None:
    """And what is predicted says so: all of it, as long as there are no results."""
    known = json.loads(rates.FILE.read_text())
    for key, entry in known.items():
        assert (devices.known_as(entry["device"]) or entry["device"]) == key
        assert entry["results"] and all((ROOT / path).parent in FOLDERS for path in entry["results"])
    measured = {devices.DEVICES[key].capability for key in known if key in devices.DEVICES}
    for key, device in devices.DEVICES.items():
        assert rates.of(device).fitted == (device.capability in measured)
        if key in known:
            assert rates.of(device).source == rates.source_of(known[key])
    processors = [key for key in known if key not in devices.DEVICES]
    assert rates.of(devices.CPU).fitted == bool(processors)
    for key in processors:
        assert rates.of(replace(devices.CPU, name=key)).source == rates.source_of(known[key])
    unknown = rates.of(replace(devices.CPU, name="a processor that nobody measured"))
    assert unknown.source == rates.source_of(known[processors[0]])
    assert rates.of(replace(devices.CPU, sms=2)) is rates.of(devices.CPU)


def on_a_cpu(tmp_path: Path, given: rates.Rates) -> Path:
    """Made-up results of a CPU that is as the models say with these constants."""
    path, device = tmp_path / "cpu.csv", replace(devices.CPU, sms=1)
    columns = (*results.NEEDED, "option", "threads", "stepwise", "commit", "dirty")
    facts = {"device": "Synthetic CPU", "date": "2000-01-01", "commit": "0" * 40, "dirty": "no", "threads": "1"}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        for problem in problems.SETS["cpu"]:
            for direction in () if problem.stepwise or problem.option else problem.directions:
                sizes = {name: getattr(problem, name) for name in (*results.SHAPE, "option", "stepwise")}
                case = {
                    **facts,
                    **sizes,
                    "set": "cpu",
                    "problem": problem.name,
                    "dtype": "fp32",
                    "direction": direction,
                }
                asked = fit.problem_of(results.Case((defaultdict(str, {k: str(v) for k, v in case.items()}),)), device)
                for backend in ("aten", "native", "step"):
                    us = choice.total_cost(asked, backend, (backend,), given) * 1e6
                    writer.writerow({**case, "variant": backend, "status": "ok", "median_us": us})
    return path


def test_a_cpus_constants_are_found_and_written_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = {"cpu_plain": {"step": 6e-6}, "cpu_lstm": {"back_step": 1e-5}}
    rows = fit.read([on_a_cpu(tmp_path, rates.PREDICTED.having(true, "made up"))])
    constants = fit.fit(rows)
    fitted = rates.PREDICTED.having(constants, "fitted")
    assert not complaints(rows, fitted) and complaints(rows, rates.PREDICTED)
    assert constants["cpu_plain"]["step"] == pytest.approx(6e-6, rel=0.2)
    assert {row.model for row in rows} == {f"cpu_{name}" for name in ("lstm", "gru", "rnn", "plain", "one", "step")}
    assert max(abs(row.error(fitted)) for row in rows) < 0.2
    monkeypatch.setattr(rates, "FILE", tmp_path / "rates.json")
    (tmp_path / "rates.json").write_text("{}")
    fit.write({"device": "Synthetic CPU", "results": [], "commits": [], "constants": constants})
    rates._fitted.cache_clear()
    try:
        for name in ("Synthetic CPU", devices.CPU.name):
            assert rates.of(replace(devices.CPU, name=name, sms=2)).cpu_plain.step == constants["cpu_plain"]["step"]
    finally:
        monkeypatch.undo()
        rates._fitted.cache_clear()


def test_a_fit_finds_the_constants_again(fitted: rates.Rates) -> None:
    for backend, constants in synthetic.TRUE.items():
        for name, true in constants.items():
            assert getattr(getattr(fitted, backend), name) == pytest.approx(true, rel=0.1)
    moved = [
        name
        for name in ("start", "projection")
        if abs(math.log(getattr(fitted.group, name) / getattr(rates.PREDICTED.group, name))) > 0.2
    ]
    assert not moved  # what was as predicted


def test_a_fit_makes_the_choices_right(timed: list[fit.Timed], fitted: rates.Rates) -> None:
    assert complaints(timed, rates.PREDICTED) and not complaints(timed, fitted)
    errors = [[abs(row.error(given)) for row in timed] for given in (rates.PREDICTED, fitted)]
    assert max(errors[1]) < 4 * synthetic.NOISE < sum(errors[0]) / len(timed)
    text = fit.report(timed, rates.PREDICTED, fitted)
    before, after = text.split("Choices after")
    assert before.startswith(synthetic.DEVICE) and " above " in before and ", 0 wrong." in after


@pytest.mark.parametrize("measured, regret", [(10.0, 0.0), (14.0, 0.25)])
def test_a_choice_is_credited_with_the_backward_pass_that_dispatch_takes(
    timed: list[fit.Timed], monkeypatch: pytest.MonkeyPatch, measured: float, regret: float
) -> None:
    """step was timed with its own backward pass, 4 s longer than group's, which dispatch takes."""
    step, group = (next(row for row in timed if row.backend == name) for name in ("step", "group"))
    costs = {("step", True): 6.0, ("step", False): 10.0, ("group", True): 8.0, ("group", False): 8.0}
    monkeypatch.setattr(choice, "total_cost", lambda problem, name, loops, given: costs[name, len(loops) > 1])
    rows = [replace(step, seconds=measured), replace(group, case=step.case, seconds=8.0)]
    (decision,) = fit.decisions(rows, rates.PREDICTED)
    assert (decision.chosen, decision.regret) == ("step", pytest.approx(regret))


def test_few_rows_do_not_run_away(timed: list[fit.Timed]) -> None:
    """One row that is 100 times off is not believed, and beside others it changes next to nothing."""
    aten = [row for row in timed if row.backend == "aten"]
    odd = replace(aten[0], seconds=100 * aten[0].seconds)
    alone = fit.fit([odd])
    assert alone.keys() == {"aten"}
    for name, value in alone["aten"].items():
        assert value / getattr(rates.PREDICTED.aten, name) < 3
    far = fit.fit([replace(row, seconds=100 * row.seconds) for row in aten])["aten"]
    assert max(value / getattr(rates.PREDICTED.aten, name) for name, value in far.items()) == pytest.approx(
        fit.FARTHEST, 0.01
    )
    with_it, without = fit.fit([odd, *aten[1:]])["aten"], fit.fit(aten)["aten"]
    assert with_it == {name: pytest.approx(value, rel=0.02) for name, value in without.items()}


def changed(
    tmp_path: Path, change: Callable[[dict[str, str]], None], columns: tuple[str, ...] = synthetic.COLUMNS
) -> Path:
    """The made-up results of the first cases with every row changed."""
    path = tmp_path / "rows.csv"
    with synthetic.FILE.open(newline="") as file:
        rows = list(csv.DictReader(file))[:40]
    for row in rows:
        change(row)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def of(device: str) -> Callable[[dict[str, str]], None]:
    return lambda row: row.update(device=device)


BAD: dict[str, tuple[Callable[[dict[str, str]], None], str]] = {
    "nothing timed": (lambda row: row.update(status="wrong"), r"no row of our backends has a time \(status ok\)"),
    "two devices": (lambda row: row.update(device=row["variant"]), "exactly one device"),
    "a CPU": (
        of("AMD EPYC, 1 thread"),
        r"no rates of 'AMD EPYC, 1 thread'.*describe it in gpu_rnn/devices.py, where A100",
    ),
    "a slice of a GPU": (of("NVIDIA H100 80GB HBM3 MIG 1g.10gb"), "no rates of"),
    "a relative": (of("NVIDIA H100 PCIe"), "no rates of"),
    "an older relative": (of("NVIDIA A100-PCIE-40GB"), "no rates of"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_fitted(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, message = BAD[kind]
    path = changed(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        fit.read([path])
    assert fit.main([str(path)]) == 1
    assert capsys.readouterr().err.startswith("fit.py: ")


def test_a_backend_that_was_refused_is_named(tmp_path: Path) -> None:
    """Dispatch may take it, but a choice among times cannot fall on it: regret alone would say that all is well."""
    path = changed(
        tmp_path, lambda row: row.update(status="wrong", median_us="") if row["variant"] == "group" else None
    )
    rows = fit.read([path])
    said = fit.report(rows, rates.PREDICTED, rates.PREDICTED)
    assert (
        f"No choice could fall on what has no time, though dispatch may take it:\n  {rows[0].case}: group is wrong"
        in said
    )
    everything = fit.read([changed(tmp_path, lambda row: None)])
    assert "No choice could fall" not in fit.report(everything, rates.PREDICTED, rates.PREDICTED)


def test_files_that_lack_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fewer = tuple(name for name in synthetic.COLUMNS if name not in ("median_us", "H"))
    with pytest.raises(ValueError, match="lacks the columns H, median_us"):
        fit.read([changed(tmp_path, lambda row: None, fewer)])
    assert fit.main([str(tmp_path / "nowhere.csv")]) == 1
    monkeypatch.setattr(nvrtc, "unavailable", lambda: "CuPy is not installed")  # which is not asked of another device
    assert any(each.backend == "group" for each in fit.read([synthetic.FILE]))


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        *((device.name, key) for key, device in devices.DEVICES.items()),
    ],
)  # fmt: skip
def test_a_drivers_name_means_a_described_device(name: str, key: str) -> None:
    assert devices.known_as(name) == key and fit.describe(name) is devices.DEVICES[key]


@pytest.mark.parametrize(
    "name",
    ["NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM-64GB", "GRID A100-40C", "NVIDIA H100 PCIe", "NVIDIA H100 96GB HBM3"],
)
def test_a_relative_with_other_rates_is_not_taken_for_it(name: str) -> None:
    assert devices.known_as(name) is None


def case(**columns: str) -> results.Case:
    given = {
        "set": "s",
        "problem": "p",
        "cell": "LSTM",
        "T": "7",
        "B": "3",
        "I": "5",
        "H": "16",
        "layers": "1",
        "bidirectional": "False",
        "heads": "1",
        "option": "",
        "dtype": "bf16",
        "direction": "forward",
    } | columns
    return results.Case((defaultdict(str, given),))


def test_a_case_is_the_problem_that_a_layer_asks() -> None:
    found = fit.problem_of(case(layers="2", bidirectional="True", direction="training", dtype="ieee"), H100)
    layer = gpu_rnn.LSTM(5, 16, 2, bidirectional=True)
    asked = gpu_rnn.explain(layer, torch.empty(7, 3, 5, device="meta"), device="H100").problem
    assert found == replace(asked, precision="ieee")
    heads = fit.problem_of(case(heads="3"), H100)
    assert (heads.N, heads.transforms, heads.dtype, heads.direction) == (3, True, torch.bfloat16, "inference")
    assert fit.problem_of(case(option="resets"), H100).flags


def test_a_wrong_choice_is_found(timed: list[fit.Timed], fitted: rates.Rates) -> None:
    first = [row for row in timed if row.case is timed[0].case]
    chosen = fit.decisions(first, fitted)[0].chosen
    other = next(row for row in first if row.backend != chosen)
    fastest = min(row.seconds for row in first)
    faster = [replace(row, seconds=fastest / 1.06) if row is other else row for row in first]
    assert complaints(faster, fitted) == [f"{first[0].case}: {chosen} is chosen, 6 % above {other.backend}"]
    near = [replace(row, seconds=fastest / 1.04) if row is other else row for row in first]
    assert not complaints(near, fitted)


def test_a_choice_slower_than_torch_is_found(timed: list[fit.Timed], fitted: rates.Rates) -> None:
    first = timed[0].case
    rows = tuple(row | {"median_us": "1.00"} if row["variant"] == TORCH else row for row in first.rows)
    (found,) = complaints([replace(row, case=results.Case(rows)) for row in timed if row.case is first][:1], fitted)
    assert "times torch.nn's speed" in found


def test_what_is_written_is_what_dispatch_counts_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rates.json").write_text('{"A100": {"device": "a", "results": [], "commits": [], "constants": {}}}')
    monkeypatch.setattr(rates, "FILE", tmp_path / "rates.json")
    assert fit.main([str(synthetic.FILE), "--write"]) == 1
    assert "constants are written from what lies in benchmarks/results" in capsys.readouterr().err
    monkeypatch.setattr(fit, "RESULTS", synthetic.FILE.parent)
    monkeypatch.setattr(fit, "ROOT", ROOT)
    monkeypatch.setattr(fit, "fit", lambda rows: {"step": {"step": 1e-6}})
    assert fit.main([str(synthetic.FILE), "--write"]) == 0
    assert "step: 6e-06 → 1e-06" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "rates.json").read_text())) == ["A100", "H100"]
    rates._fitted.cache_clear()
    try:
        assert rates.of(H100).step.step == 1e-6 and rates.of(devices.DEVICES["RTX 4090"]) is rates.PREDICTED
        text = str(gpu_rnn.explain(gpu_rnn.LSTM(8, 8), torch.empty(9, 2, 8, device="meta"), device="H100"))
        assert "; fitted to tests/data/costs_synthetic.csv (Synthetic H100 (made-up" in text
    finally:
        rates._fitted.cache_clear()
        memo.clear("gpu_rnn.dispatch")


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, float], None]]:
    """A function that writes a constant fitted to a device's made-up results."""
    (tmp_path / "rates.json").write_text("{}")
    monkeypatch.setattr(rates, "FILE", tmp_path / "rates.json")
    for name in ("RESULTS", "ROOT"):
        monkeypatch.setattr(fit, name, tmp_path)

    def write(device: str, value: float) -> None:
        monkeypatch.setattr(fit, "fit", lambda rows: {"step": {"step": value}})
        assert fit.main([str(changed(tmp_path, of(device))), "--write"]) == 0
        rates._fitted.cache_clear()

    yield write
    rates._fitted.cache_clear()
    memo.clear("gpu_rnn.dispatch")


def test_devices_of_one_capability_have_each_their_own_constants(written: Callable[[str, float], None]) -> None:
    written("NVIDIA H200", 2e-6)
    h200 = devices.DEVICES["H200"]
    sliced = replace(H100, name="NVIDIA H100 80GB HBM3 MIG 1g.10gb", sms=16)  # not described: a relative's
    assert [rates.of(each).step.step for each in (h200, H100, sliced)] == [2e-6] * 3
    written("NVIDIA H100 80GB HBM3", 1e-6)
    at_hand = replace(H100, name="NVIDIA H100 80GB HBM3")  # as the driver names it
    assert [rates.of(each).step.step for each in (h200, H100, at_hand, sliced)] == [2e-6, 1e-6, 1e-6, 1e-6]
    written("NVIDIA H200", 3e-6)
    assert [rates.of(each).step.step for each in (h200, H100)] == [3e-6, 1e-6]
    assert rates.of(devices.DEVICES["A100"]) is rates.PREDICTED


def test_what_no_commit_has_is_not_written(timed: list[fit.Timed], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "RESULTS", synthetic.FILE.parent)
    rows = tuple(row | {"dirty": "yes"} for row in timed[0].case.rows)
    with pytest.raises(ValueError, match="changes that no commit has"):
        fit.entry([replace(timed[0], case=results.Case(rows))], [synthetic.FILE], {})
