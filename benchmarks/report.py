# SPDX-License-Identifier: Apache-2.0
"""Turns results into Markdown and pictures: for each folder of results a README.md and a picture of each set.

python benchmarks/report.py                              every GPU under benchmarks/results
python benchmarks/report.py FILE.csv --out FOLDER        these results, wherever they are from
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from statistics import geometric_mean

import picture
from results import NOISE, Case, Row, per_step, read

RESULTS = Path(__file__).resolve().parent / "results"
LARGE = 1024  # units; larger layers are summarised apart, because their weights do not fit on a GPU's chip


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the reports. Returns 0 also where there is nothing to report, and 1 for results that cannot be read."""
    options = _parser().parse_args(arguments)
    folders = _folders(options.results or [RESULTS])
    if not folders:
        print("no results on a GPU: benchmarks/results holds no CSV file, so there is nothing to report.")
        print("They are measured by: python benchmarks/run.py --quick   on a machine with a GPU")
        return 0
    try:
        if options.out and len(folders) > 1:
            raise ValueError(f"--out takes the results of one folder, not of {len(folders)}")
        for folder, files in folders.items():
            write(read(files), options.out or folder)
    except (ValueError, ModuleNotFoundError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 1
    return 0


def write(cases: list[Case], folder: Path) -> None:
    """README.md and <set>.png for every set."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, own in groupby(cases, key=lambda case: case.set):
        picture.draw(list(own), folder / f"{name}.png")
        print(f"wrote {folder / name}.png")
    (folder / "README.md").write_text(markdown(cases))
    print(f"wrote {folder / 'README.md'}")


def markdown(cases: list[Case]) -> str:
    """The whole report but for the pictures, to which it links."""
    lines = [f"# Measured on {cases[0].theirs['device']}", "", *_provenance(cases), "", *_summary(cases)]
    for name, own in groupby(cases, key=lambda case: case.set):
        lines += [
            "",
            f"## {name}",
            "",
            f"![{name}: ratio to torch.nn and time per step]({name}.png)",
            "",
            *_table(own),
        ]
    lines += ["", *_refused(cases)]
    return "\n".join(lines).rstrip() + "\n"


def _provenance(cases: list[Case]) -> list[str]:
    """What was run, one line a run."""
    runs = {row["date"]: row for case in cases for row in case.rows}
    lines = [
        "Written by `benchmarks/report.py` from the CSV files beside it. A ratio is torch.nn's time by that of the",
        'backend that a layer takes by itself (`backend="auto"`), both of one run; above 1 ours is the faster, and',
        f"**bold** is a loss (below {NOISE}). How it was measured: [benchmarks](../../README.md).",
        "",
    ]
    for date, row in sorted(runs.items()):
        state = {"yes": " with uncommitted changes", "": " (not known whether changed)"}.get(row["dirty"], "")
        versions = [
            f"{name} {row[name]}"
            for name in ("driver", "cuda", "cudnn", "torch", "triton", "cupy")
            if row[name]
        ]
        lines.append(f"- {date}, commit {row['commit'][:12] or 'unknown'}{state}: {', '.join(versions)}")
    return lines


def _summary(cases: list[Case]) -> list[str]:
    """By dtype, direction and size: how many cases, the ratio's geometric mean, the lowest, losses and cases without."""
    lines = [
        "| dtype | direction | units | cases | geometric mean | lowest | losses | no ratio |",
        "|---|---|---|--:|--:|---|--:|--:|",
    ]
    groups: dict[tuple[str, str, str], list[Case]] = {}
    for case in cases:
        size = f"≤ {LARGE}" if case.hidden <= LARGE else f"> {LARGE}"
        groups.setdefault((case.dtype, case.direction, size), []).append(case)
    for key, group in sorted(groups.items()):
        found = [(case.ratio, f"{case.set}/{case.problem}") for case in group if case.ratio is not None]
        low, where = min(found, default=(None, ""))
        mean = f"{geometric_mean(ratio for ratio, _ in found):.2f}×" if found else ""
        losses = sum(ratio < NOISE for ratio, _ in found)
        cells = [*key, len(group), mean, f"{_ratio(low)} {where}", losses, len(group) - len(found)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def _table(cases: Iterable[Case]) -> list[str]:
    lines = [
        "| problem | dtype | direction | torch.nn, µs a step | ours, µs a step | backend | ratio | fastest of ours | MiB, torch.nn | MiB, ours |",
        "|---|---|---|--:|--:|---|--:|---|--:|--:|",
    ]
    for case in cases:
        ours, fastest = case.ours, case.fastest
        cells = [case.problem, case.dtype, case.direction, _time(case.theirs), _time(ours)]
        cells += [ours["variant"] if ours else "", _ratio(case.ratio)]
        if fastest is None or (ours is not None and fastest["variant"] == ours["variant"]):
            cells.append("")
        else:
            cells.append(f"{fastest['variant']} {_ratio(float(fastest['ratio'] or 'nan'))}")
        cells += [case.theirs["peak_mib"], ours["peak_mib"] if ours else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _refused(cases: list[Case]) -> list[str]:
    """Everything that has no time, with the reason."""
    lines = []
    for case in cases:
        lines += [
            f"- {case}, {row['variant']}: {row['status']}. {row['detail']}".rstrip()
            for row in case.rows
            if row["status"] != "ok"
        ]
    return ["## Not timed", "", *lines] if lines else []


def _time(row: Row | None) -> str:
    """The median with the 20th and 80th percentile."""
    if row is None:
        return "not measured"
    if row["status"] != "ok":
        return row["status"]
    low, middle, high = per_step(row)
    return f"{middle:.3g} ({low:.3g}-{high:.3g})"


def _ratio(ratio: float | None) -> str:
    if ratio is None or ratio != ratio:
        return ""
    return f"{ratio:.2f}×" if ratio >= NOISE else f"**{ratio:.2f}×**"


def _folders(given: Iterable[Path]) -> dict[Path, list[Path]]:
    """The results files below the given files and folders, by the folder they lie in."""
    files = [file for path in given for file in (sorted(path.rglob("*.csv")) if path.is_dir() else [path])]
    return {
        folder: [file for file in files if file.parent == folder]
        for folder in {file.parent: 0 for file in files}
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "results", type=Path, nargs="*", metavar="RESULTS", help="CSV files, or folders of them"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: beside the results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
