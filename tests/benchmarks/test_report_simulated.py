# SPDX-License-Identifier: Apache-2.0
"""What a report says is simulated: it is what the tables say, is called so, and stands beside what is measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.reporting import first_screen, results, simulated, simulated_page, summary
from benchmarks.simulating import validation
from gpu_rnn.backends import chains, rates
from gpu_rnn.dispatch import choice
from tests.benchmarks.test_report import README, synthetic_rows, tables, write
from tests.support import synthetic_benchmarks as synthetic
from tests.support.paths import ROOT

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install matplotlib")

H100 = "NVIDIA H100 80GB HBM3"
PAGES = ROOT / "docs" / "performance"


DEVICES = ("H100", "A100")


def measured(folder: Path, device: str, name: str = "gpu") -> Path:
    """Reports the synthetic results as those of a device; the folder of its pages."""
    (folder / "results" / name).mkdir(parents=True)
    write(folder / "results" / name / "rows.csv", [row | {"device": device} for row in synthetic_rows()])
    (folder / "README.md").write_text(README)
    report.publish([folder / "results"], folder / "docs", folder / "README.md", DEVICES)
    return folder / "docs" / "performance"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return measured(tmp_path_factory.mktemp("measured"), H100)


def test_measured_and_simulated_stand_in_one_table(pages: Path) -> None:
    page = (pages / "gpu.md").read_text()
    lines = {line["case"]: line for line in tables(page) if "loop, simulated, µs" in line}
    rows = {(row.hidden, row.batch, build): row for build, row in chains.rows()}
    found = 0
    for line in lines.values():
        case = re.match(r"\w+/(\w+)-H(\d+)-B(\d+)-T\d+ (\w+) (\w+)$", line["case"])
        if not case or (case[4], line["backend"]) != ("bf16", "group"):
            continue
        passes = {"forward": ("inference",), "training": ("training", "backward")}[case[5]]
        builds = [chains.Chain("H100", "group", case[1].lower(), "", "16-bit", each) for each in passes]
        exact = [rows.get((int(case[2]), int(case[3]), build)) for build in builds]
        if None not in exact:
            us = sum(row.cycles / row.clock / 1e3 for row in exact if row)
            assert float(line["loop, simulated, µs"]) == pytest.approx(us, rel=0.006)
            found += 1
        assert float(line["measured, µs"]) > 0 and float(line["torch.nn, measured, µs"]) > 0
    assert found > 10 and "gpu/simulated.svg" in page
    others = [*synthetic.OPTIONS, "-L2", "-x12"]
    assert not [name for name in lines if any(f"{other} " in name or f"{other}-" in name for other in others)]


def test_a_measured_device_has_one_page(pages: Path) -> None:
    assert {path.stem for path in pages.glob("*.md")} == {"gpu", "a100"}
    assert f"## {simulated_page.LABEL}" in (pages / "gpu.md").read_text()
    assert "(gpu.md#how-near-it-comes)" in (pages / "a100.md").read_text()
    index = (pages.parent / "performance.md").read_text()
    assert "[H100]" not in index and "[A100](performance/a100.md) | simulated from machine code | not measured" in index
    readme = (pages.parents[1] / "README.md").read_text()
    assert f"[{H100}](docs/performance/gpu.md)" in readme and first_screen.NOTHING not in readme
    assert "how fast anything is on A100." in readme


def test_every_link_of_the_pages_is_there(pages: Path) -> None:
    for page in pages.rglob("*.md"):
        links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
        assert links and not [link for link in links if not (page.parent / link).exists()]


def test_what_is_like_it_has_its_figures_and_what_is_not_has_none() -> None:
    assert simulated.device_of("NVIDIA H200") == "H100" and simulated.device_of(H100) == "H100"
    assert simulated.device_of("NVIDIA H100 PCIe") is None and simulated.device_of("AMD EPYC") is None
    assert simulated_page.without([H100, "AMD EPYC", "NVIDIA B200"], DEVICES) == ["A100"]


def test_a_report_of_other_results_has_no_page_of_what_is_not_in_them(tmp_path: Path) -> None:
    write(tmp_path / "rows.csv", synthetic_rows()[:4])
    assert report.main([str(tmp_path / "rows.csv"), "--out", str(tmp_path / "docs")]) == 0
    assert len(list((tmp_path / "docs" / "performance").glob("*.md"))) == 1


@pytest.mark.parametrize("device", simulated.known())
def test_every_picture_and_figure_says_that_it_is_simulated(device: str) -> None:
    name = simulated_page.slug(device)
    page = (PAGES / f"{name}.md").read_text()
    section = page.split(f"## {simulated_page.LABEL}")[1]
    for part in section.split("\n### ")[1:]:
        assert "imulat" in part.split("![")[0]
    pictures = re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", page)
    assert {Path(path).stem for _, path in pictures} >= {"steps-lstm", "steps-gru", "costs", "taken"}
    for words, path in pictures:
        assert "simulated" in words and "simulated" in (PAGES / path).read_text()
    assert not re.search(r"\d×", page)  # no ratio to anything that nobody ran beside it
    assert "## Measured\n\nNothing yet." in page and "benchmarks/run.py" in page


def test_every_step_of_the_chains_has_its_row() -> None:
    for device in simulated.known():
        lines = [*tables((PAGES / simulated_page.slug(device) / "steps.md").read_text())]
        expected = [(b, row) for b, row in chains.rows() if b.device == device and b.backend in simulated.LOOPS]
        assert len(lines) == len(expected) and {line["cycles, simulated"] for line in lines} == {
            str(row.cycles) for _, row in expected
        }
        bounds = [(float(line["bound, µs"]), float(line["µs, simulated"])) for line in lines if line.get("bound, µs")]
        assert bool(bounds) == (device == "H100")  # of others the bound's rates are not published
        assert all(bound <= 1.02 * us for bound, us in bounds)  # they are not the simulation's rates


def test_what_is_published_is_what_the_models_and_the_readme_have() -> None:
    cudnn = {row.direction: row.us for row in validation.read() if row.library.startswith("cuDNN")}
    assert cudnn == {
        "training": pytest.approx(1e6 * rates.PREDICTED.aten.persistent_step),
        "backward": pytest.approx(1e6 * rates.PREDICTED.aten.persistent_backward),
    }
    readme = (ROOT / "benchmarks" / "README.md").read_text()
    for row in validation.checked():
        assert row.simulated
        share = row.simulated / row.us
        assert f"| {row.hidden} | {row.heads} | {row.simulated:.2f} | {row.us:.2f} | {share:.2f} |" in readme
    low, high = validation.shares()
    assert f"{low:.2f} to {high:.2f}" in (ROOT / "README.md").read_text()


def test_the_file_of_what_is_published_is_written_as_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, rows = validation.FILE.read_text(), validation.read()
    monkeypatch.setattr(validation, "FILE", tmp_path / "validation.csv")
    validation.write(rows)
    assert validation.read() == rows and (tmp_path / "validation.csv").read_text() == text


def test_ours_beside_a_published_step_is_what_was_simulated() -> None:
    found = {(row.published.heads, row.published.direction): row.ours for row in simulated.compared("H100")}
    rows = {(build, row.hidden, row.batch): row.cycles / row.clock / 1e3 for build, row in chains.rows()}
    for direction in ("training", "backward"):
        build = chains.Chain("H100", "group", "lstm", "", "16-bit", direction)
        assert found[1, direction] == pytest.approx(rows[build, 768, 16], abs=0.006)
    page = (ROOT / "kernels" / "simulated.md").read_text()
    pattern = r"^\| group \| lstm \| bf16 \| training \| 64 \| 16 \| 12 \| \d+ \| ([\d.]+) \|"
    assert re.findall(pattern, page, re.M) == [f"{found[12, 'training']:.2f}"]


@pytest.mark.parametrize(("hidden", "batch"), [(32, 1), (1024, 64), (2048, 256)])
def test_the_backend_of_the_map_is_the_one_that_dispatch_takes(hidden: int, batch: int, with_cupy: None) -> None:
    for direction in ("inference", "training"):
        asked = simulated.problem("H100", "lstm", "bf16", direction, hidden, batch)
        assert simulated.cheapest(asked) == choice.select(asked)


def test_the_five_lines_say_beside_whom_and_what_is_not_known(tmp_path: Path) -> None:
    write(tmp_path / "rows.csv", synthetic_rows())
    gpu = summary.Measured("gpu", results.read([tmp_path / "rows.csv"]))
    lines = first_screen.lines([gpu], "docs", simulated.known())
    assert len(lines) == 5 and "torch.nn, FlashRNN, TorchRL" in lines[0] and summary.figure(gpu.ratios) in lines[1]
    assert [line[2:].split("**")[1] for line in lines if line.startswith("- ")] == [
        "Measured",
        "Simulated",
        "Not known",
    ]
    nothing = first_screen.lines([], "docs", ())
    assert len(nothing) == 5 and first_screen.NOTHING in nothing[1] and first_screen.NOT_ON_A_GPU in nothing[4]
