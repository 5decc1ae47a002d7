# SPDX-License-Identifier: Apache-2.0
"""A report says what its rows say, and what is committed says what the committed results say."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import geometric_mean

import pytest

from benchmarks import report, run
from benchmarks.reporting import first_screen, results, simulated, summary
from tests.support import synthetic_benchmarks as synthetic
from tests.support.paths import ROOT

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install matplotlib")

README = f"# A project\n\n{summary.BEGIN}\n{summary.END}\n\nThe rest.\n"
PICTURES = {"ratio-lstm", "ratio-lstm-few-steps", "ratio-gru", "floor", "scaling", "memory", "options", "peers"}
Rows = list[dict[str, str]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the synthetic results, README.md and docs that report them."""
    folder = tmp_path_factory.mktemp("report")
    publish(folder, {"synthetic-gpu": synthetic_rows()})
    return folder


def synthetic_rows() -> Rows:
    with synthetic.FILE.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: Rows) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def publish(folder: Path, gpus: dict[str, Rows]) -> str:
    """Writes results and reports them; the page of the last GPU."""
    (folder / "README.md").write_text(README)
    for name, rows in gpus.items():
        (folder / "results" / name).mkdir(parents=True, exist_ok=True)
        write(folder / "results" / name / "rows.csv", rows)
    report.publish([folder / "results"], folder / "docs", folder / "README.md")
    return (folder / "docs" / "performance" / f"{[*gpus][-1]}.md").read_text()


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tables(text: str) -> Iterator[dict[str, str]]:
    """The lines of a page's tables, by the heads of their columns."""
    heads: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")] if line.startswith("|") else []
        if not cells or not heads:
            heads = cells
        elif not set("".join(cells)) <= set("- :|"):
            yield dict(zip(heads, cells, strict=True))


def newest(rows: Rows) -> Rows:
    return [row for row in rows if row["date"] == max(row["date"] for row in rows)]


def ours(rows: Rows) -> Rows:
    return [row for row in newest(rows) if row["chosen"]]


def with_ratio(rows: Rows) -> Rows:
    return [row for row in ours(rows) if row["status"] == "ok" and not row["option"]]


def test_the_synthetic_file_is_what_its_script_writes_and_says_what_it_is() -> None:
    assert synthetic.FILE.read_text() == synthetic.text()
    assert all("made-up" in row["device"] for row in synthetic_rows())


def test_what_is_committed_is_what_the_results_say(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text((ROOT / "README.md").read_text())
    report.publish([report.RESULTS], tmp_path / "docs", tmp_path / "README.md", simulated.known())
    there = {name: text for name, text in files(ROOT / "docs").items() if name.startswith("performance")}
    there = {f"docs/{name}": text for name, text in there.items()} | {"README.md": (ROOT / "README.md").read_bytes()}
    made = files(tmp_path)
    assert made.keys() == there.keys(), "run: make report"
    pinned = re.search(r"^matplotlib==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned
    same = matplotlib.__version__ == pinned[1]  # another version may draw the same picture in other bytes
    stale = [name for name in made if made[name] != there[name] and (same or not name.endswith(".svg"))]
    assert not stale, "run: make report"


def test_results_of_a_cpu_speak_of_no_gpu(tmp_path: Path) -> None:
    rows = [
        row | {"device": "Synthetic CPU (made-up numbers)", "driver": "", "cuda": "", "cudnn": ""}
        for row in synthetic_rows()
    ]
    (tmp_path / "results" / "synthetic-cpu").mkdir(parents=True)
    (tmp_path / "results" / "synthetic-cpu" / "certificate.md").write_text("of an emulated GPU")
    for row in rows:
        row["variant"] = {"flashrnn": "by-hand", "torchrl": "onnxruntime"}.get(row["variant"], row["variant"])
        row["floor_us"] = row["of_floor"] = row["peak_mib"] = ""
    page = publish(tmp_path, {"synthetic-cpu": rows})
    assert "Than something else (by-hand, onnxruntime)" in page and "FlashRNN" not in page
    assert "Not measured." not in page and "## Memory" not in page
    assert "times on a CPU. They say nothing of a GPU." in page
    pages = [page, *(path.read_text() for path in (tmp_path / "docs" / "performance" / "synthetic-cpu").glob("*.md"))]
    assert not list((tmp_path / "docs").rglob("certificate.md"))
    assert not [text for text in pages if re.search("(this|the) GPU|floor", text)]
    assert "| device | figures |" in (tmp_path / "docs" / "performance.md").read_text()


@pytest.mark.parametrize(("threads", "said"), [("1", "| layer |"), ("2", "Not measured on one thread.")])
def test_a_cpu_of_which_little_was_measured_has_no_empty_table(threads: str, said: str, tmp_path: Path) -> None:
    rows = [row | {"driver": "", "threads": threads} for row in synthetic_rows() if not row["option"]]
    page = publish(tmp_path, {"cpu": [row for row in rows if row["variant"] == "torch.nn" or row["chosen"]]})
    assert said in page and not re.search(r"^\| +\|", page, re.M)


def test_streams_have_a_page_and_are_in_no_figure(tmp_path: Path) -> None:
    rows = [row | {"driver": "", "threads": "1", "stepwise": "False"} for row in synthetic_rows() if not row["option"]]
    streams = [row | {"set": "streaming", "stepwise": "streams", "ratio": "1000"} for row in rows[:40]]
    for name in "ab":
        (tmp_path / name).mkdir()
    alone = publish(tmp_path / "a", {"cpu": rows})
    both = publish(tmp_path / "b", {"cpu": [*rows, *streams]})
    added = [line for line in both.splitlines() if line not in alone.splitlines()]
    assert "## Streams" in added and "![Streams: streams.svg](cpu/streams.svg)" in added
    rows_added = [line for line in added if line.startswith("|")]
    assert len(rows_added) == 1 and rows_added[0].startswith("| [streams](cpu/streams.md) | 1000.00× ")
    assert (tmp_path / "b" / "docs" / "performance" / "cpu" / "streams.md").read_text().count("1000") > 1
    for name in ("README.md", "docs/performance.md"):
        assert (tmp_path / "a" / name).read_text() == (tmp_path / "b" / name).read_text()


def test_the_same_results_make_the_same_bytes(made: Path, tmp_path: Path) -> None:
    before = files(made)
    report.publish([made / "results"], made / "docs", made / "README.md")
    assert files(made) == before
    publish(tmp_path, {"synthetic-gpu": synthetic_rows()})  # nor does the folder's name matter
    assert files(tmp_path) == before


def test_every_picture_has_something_to_show(made: Path) -> None:
    pictures = {path.stem: path.read_text() for path in (made / "docs" / "performance" / "synthetic-gpu").glob("*.svg")}
    assert pictures.keys() == PICTURES
    assert all(len(text) > 10_000 and "<dc:date>" not in text for text in pictures.values())
    page = (made / "docs" / "performance" / "synthetic-gpu.md").read_text()
    assert "Not measured." not in page
    place = {"cell": "LSTM", "H": "256", "B": "32", "layers": "1", "direction": "forward"}
    shared = [row for row in with_ratio(synthetic_rows()) if place.items() <= row.items() and int(row["T"]) > 2]
    lowest, *others = sorted(float(row["ratio"]) for row in shared)  # of several T: one cell of the heat map
    assert others and f">{lowest:.2f}</text>" in pictures["ratio-lstm"]
    assert not any(f">{ratio:.2f}</text>" in pictures["ratio-lstm"] for ratio in others)


def test_every_link_and_picture_of_the_pages_is_there(made: Path) -> None:
    pages = [made / "README.md", *(made / "docs").rglob("*.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())]
    assert len(links) > len(PICTURES)
    assert not [(page.name, link) for page, link in links if not (page.parent / link).exists()]


def test_each_number_of_the_tables_is_the_files(made: Path) -> None:
    rows = synthetic_rows()
    lines = {
        (path.stem, line["problem"], line["dtype"], line["direction"]): line
        for path in (made / "docs" / "performance" / "synthetic-gpu").glob("*.md")
        for line in tables(path.read_text())
    }
    expected = {(r["set"], r["problem"], r["dtype"], r["direction"]) for r in rows}
    assert lines.keys() == expected
    for row in newest(rows):
        line = lines[row["set"], row["problem"], row["dtype"], row["direction"]]
        if row["variant"] == "torch.nn":
            times, memory = line["torch.nn, µs"], line["torch.nn, MiB"]
        elif row["chosen"]:
            times, memory = line["ours, µs"], line.get("ours, MiB")
        else:
            text = re.search(rf"(\**){row['variant']} ([\d.]+)", line["others, µs"])
            assert text and float(text[2]) == pytest.approx(float(row["us_per_step"]), rel=0.01)
            mine = float(line["ours, µs"].split()[0])
            assert bool(text[1]) == (float(row["us_per_step"]) < results.NOISE * mine)
            continue
        if row["status"] != "ok":
            assert times == row["status"] and not line.get("ratio")
            continue
        found = [float(number) for number in re.findall(r"[\d.]+", times)]
        steps = [float(row[name]) / int(row["T"]) for name in ("median_us", "p20_us", "p80_us")]
        assert found == pytest.approx(steps, rel=0.006) and memory == row["peak_mib"]  # three digits
        if row["chosen"] and not row["option"]:
            assert float(line["ratio"].strip("*×")) == pytest.approx(float(row["ratio"]), abs=0.0051)
            assert line["ratio"].startswith("**") == (float(row["ratio"]) < results.NOISE)
            assert float(line["of it"].strip("* %")) == pytest.approx(100 * float(row["of_floor"]), abs=0.51)
            assert float(line["floor, µs"]) == pytest.approx(float(row["floor_us"]), rel=0.006)


def test_the_means_are_of_all_that_has_a_ratio_and_of_nothing_else(made: Path) -> None:
    rows = synthetic_rows()
    page = (made / "docs" / "performance" / "synthetic-gpu.md").read_text()
    found = {(line["dtype"], line["direction"], line["size"]): line for line in tables(page) if "size" in line}
    groups: dict[tuple[str, str, str], list[float]] = {}
    for row in with_ratio(rows):
        size = "H > 1024" if int(row["H"]) > 1024 else "H ≤ 1024"
        for key in ((row["dtype"], row["direction"], size), ("all", "", "")):
            groups.setdefault(key, []).append(float(row["ratio"]))
    assert found.keys() == groups.keys()
    readme = (made / "README.md").read_text()
    for key, ratios in groups.items():
        lost = sum(ratio < results.NOISE for ratio in ratios)
        low, high = min(ratios), max(ratios)
        text = f"{geometric_mean(ratios):.2f}× ({low:.2f} to {high:.2f}), {lost} of {len(ratios)} slower"
        assert text in found[key].values()
        assert key[0] == "all" or text in readme


def test_losses_are_bold_counted_and_listed_in_one_place(made: Path) -> None:
    rows = synthetic_rows()
    page = (made / "docs" / "performance" / "synthetic-gpu.md").read_text()
    section = page.split("## Where it is slower")[1].split("\n## ")[0]
    lost = [row for row in with_ratio(rows) if float(row["ratio"]) < results.NOISE]
    assert lost and f"**{len(lost)} of {len(with_ratio(rows))}** cases" in section
    listed = [(line["case"], line["ratio"]) for line in tables(section) if "ratio" in line]
    name = "{set}/{problem} {dtype} {direction}"
    assert set(listed) == {(name.format(**row), f"**{float(row['ratio']):.2f}×**") for row in lost}
    assert [value for _, value in listed] == sorted(value for _, value in listed)  # the worst first
    assert "| flashrnn | **0.80×** |" in section  # another library's
    dear = {line["case"]: line["time by the default's"] for line in tables(section) if "time by the default's" in line}
    assert {case.split()[0].rpartition("-")[2] for case in dear} == {
        option for option, cost in synthetic.OPTIONS.items() if cost > results.OPTION_LIMIT
    }
    readme = (made / "README.md").read_text()
    assert (
        f"**Slower** in {len(lost)} of {len(with_ratio(rows))} cases, at worst {listed[0][0]} {listed[0][1]}" in readme
    )


def test_what_has_no_time_is_listed_with_its_reason(made: Path) -> None:
    page = (made / "docs" / "performance" / "synthetic-gpu.md").read_text()
    section = page.split("## Not timed")[1]
    for row in newest(synthetic_rows()):
        if row["status"] != "ok":
            line = next(line for line in section.splitlines() if f"{row['variant']}: {row['status']}" in line)
            assert row["detail"] in line and f"{row['set']}/{row['problem']} {row['dtype']}" in line


def without(rows: Rows, *columns: str) -> Rows:
    """As a file from before the columns were there, when options were not measured either."""
    return [{name: row[name] for name in row if name not in columns} for row in rows if not row["option"]]


ABSENT: dict[str, tuple[Callable[[Rows], Rows], set[str]]] = {
    "old file": (lambda rows: without(rows, "option", "floor_us", "of_floor"), {"floor", "options"}),
    "no memory": (lambda rows: without(rows, "peak_mib", "detail", "commit", "dirty", "driver"), {"memory", "options"}),
    "no LSTM": (lambda rows: [r for r in rows if r["cell"] == "GRU"], PICTURES - {"ratio-gru", "floor", "memory"}),
    "no time": (lambda rows: [r for r in rows if r["status"] != "ok"], PICTURES),
    "not torch.nn": (lambda rows: [r for r in rows if r["variant"] != "torch.nn"],
                     PICTURES - {"floor", "options", "peers"}),
}  # fmt: skip


@pytest.mark.parametrize("name", ABSENT)
def test_what_is_absent_is_called_not_measured(name: str, tmp_path: Path) -> None:
    change, gone = ABSENT[name]
    page = publish(tmp_path, {"gpu": change(synthetic_rows())})
    pictures = {path.stem for path in (tmp_path / "docs" / "performance" / "gpu").glob("*.svg")}
    assert pictures == PICTURES - gone
    assert ("Not measured." in page) == (name != "no memory")  # nor has it a driver: of a CPU that is not said
    assert not re.search(r"\b(nan|None)\b", page)


def test_two_gpus_make_two_pages_and_what_is_gone_is_removed(tmp_path: Path) -> None:
    rows = synthetic_rows()
    other = [row | {"device": "Another GPU (made-up numbers)"} for row in rows if row["dtype"] == "fp32"]
    publish(tmp_path, {"one": rows, "two": other})
    pages = tmp_path / "docs" / "performance"
    assert {path.stem for path in pages.glob("*.md")} == {"one", "two"}
    assert "# Another GPU (made-up numbers)" in (pages / "two.md").read_text()
    index, readme = (tmp_path / "docs" / "performance.md").read_text(), (tmp_path / "README.md").read_text()
    for text in (index, readme):
        assert synthetic.DEVICE in text and "Another GPU" in text
    assert readme.index(synthetic.DEVICE) < readme.index("Another GPU")  # that with the most cases first
    (tmp_path / "results" / "two" / "rows.csv").unlink()
    report.publish([tmp_path / "results"], tmp_path / "docs", tmp_path / "README.md")
    assert {path.stem for path in pages.rglob("*.md")} >= {"one", "grid"} and not list(pages.glob("two*"))
    assert "Another GPU" not in (tmp_path / "README.md").read_text()


def test_the_certificate_is_a_page_of_its_own(made: Path, tmp_path: Path) -> None:
    (tmp_path / "results" / "gpu").mkdir(parents=True)
    (tmp_path / "results" / "gpu" / "certificate.md").write_text("# Certificate\n")
    page = publish(tmp_path, {"gpu": synthetic_rows()[:3]})
    assert "[certificate](gpu/certificate.md)" in page
    assert (tmp_path / "docs" / "performance" / "gpu" / "certificate.md").read_text() == "# Certificate\n"
    assert "No certificate" in (made / "docs" / "performance" / "synthetic-gpu.md").read_text()


def test_without_results_it_says_that_nothing_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "README.md").write_text(README)
    report.publish([tmp_path], tmp_path / "docs", tmp_path / "README.md")
    said = {"README.md": first_screen.NOTHING, "docs/performance.md": "**Nothing has been measured on a GPU yet.**"}
    for name, words in said.items():
        assert words in (tmp_path / name).read_text()
        assert "`python benchmarks/run.py`" in (tmp_path / name).read_text()
    assert "no results on a GPU" in capsys.readouterr().out
    assert (tmp_path / "README.md").read_text().endswith(f"{summary.END}\n\nThe rest.\n")


def test_the_figures_stand_in_the_first_45_lines_of_the_readme(tmp_path: Path) -> None:
    every = [row | {"dtype": dtype} for dtype in results.DTYPES for row in synthetic_rows() if row["dtype"] == "bf16"]
    write(tmp_path / "rows.csv", every)
    measured = [summary.Measured("gpu", results.read([tmp_path / "rows.csv"]))]
    first, lines = first_screen.lines(measured, "docs", simulated.known()), summary.block(measured, "docs")
    assert all(any(line.startswith(f"| {dtype} |") for line in lines) for dtype in results.DTYPES)
    before = (ROOT / "README.md").read_text().split(summary.BEGIN)[0].count("\n")
    assert before <= 29 and len(first) == 5 and before + 1 + len(first) + len(lines) <= 45


@pytest.mark.parametrize("text", ["", f"{summary.BEGIN}\n", f"{summary.END}\n{summary.BEGIN}\n", 2 * README])
def test_a_readme_without_its_two_markers_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(ValueError, match=re.escape(summary.BEGIN)):
        report.publish([tmp_path], tmp_path / "docs", tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text() == text and not (tmp_path / "docs").exists()


def test_one_page_is_of_one_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = synthetic.text()
    (tmp_path / "a.csv").write_text(text)
    (tmp_path / "b.csv").write_text(text.replace(synthetic.DEVICE, "Another GPU"))
    assert report.main([str(tmp_path), "--out", str(tmp_path / "docs")]) == 1
    assert "exactly one device" in capsys.readouterr().err
    assert not (tmp_path / "docs").exists()


def test_a_file_that_is_none_of_the_benchmarks_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.csv").write_text("set,problem\nquick,one\n")
    assert report.main([str(tmp_path), "--out", str(tmp_path)]) == 1
    assert "a.csv is no file of run.py: it lacks the columns dtype," in capsys.readouterr().err
    (tmp_path / "a.csv").write_bytes(b"\x7fELF\xd0\x00")
    assert report.main([str(tmp_path), "--out", str(tmp_path)]) == 1
    assert "a.csv is no file of run.py: it is no text" in capsys.readouterr().err
    assert report.main([str(tmp_path / "b.csv"), "--out", str(tmp_path)]) == 1
    assert "b.csv" in capsys.readouterr().err


@pytest.mark.parametrize("more", ["grid,LSTM-H64", "grid,LSTM-H64" + synthetic.text().splitlines()[1]])
def test_a_row_that_was_cut_off_is_refused(more: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that was killed while it wrote; and one that went on behind it."""
    lines = synthetic.text().splitlines()[:3]
    (tmp_path / "a.csv").write_text("\n".join([*lines, more]))
    assert report.main([str(tmp_path), "--out", str(tmp_path)]) == 1
    assert "a.csv, line 4: a row that was cut off" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["median_us", "ratio"])
@pytest.mark.parametrize("value", ["nan", "inf", "0", "quick"])
def test_what_is_no_time_is_in_no_mean(
    name: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = synthetic_rows()
    rows[5][name] = value
    write(tmp_path / "a.csv", rows)
    assert report.main([str(tmp_path), "--out", str(tmp_path)]) == 1
    assert f"a.csv, line 7: status is ok, and {name} is '{value}'" in capsys.readouterr().err


def test_a_newer_run_replaces_an_older_one() -> None:
    first = results.read([synthetic.FILE])[0]
    older = next(row for row in synthetic_rows() if row["chosen"])
    assert older["ratio"] == "99" and str(first) == "grid/LSTM-H64-B1-T100 bf16 forward"
    assert first.ratio == synthetic.RATIOS[0]


def test_a_report_of_what_was_just_measured(tmp_path: Path) -> None:
    arguments = "--device cpu --set tiny --dtype fp32 --trials 1 --backend aten,step --direction forward"
    assert run.main([*arguments.split(), "--out", str(tmp_path / "rows.csv")]) == 0
    rows = list(csv.DictReader((tmp_path / "rows.csv").read_text().splitlines()))
    assert report.main([str(tmp_path / "rows.csv"), "--out", str(tmp_path / "docs")]) == 0
    page = next((tmp_path / "docs" / "performance").glob("*/tiny.md")).read_text()
    assert all(f"| {row['problem']} | fp32 | forward |" in page for row in rows)
