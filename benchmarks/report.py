# SPDX-License-Identifier: Apache-2.0
"""Turns results into docs/performance.md, a page with pictures for each device, and the figures in README.md.

What is simulated of a GPU stands beside what was measured on it, or on a page of its own.

python benchmarks/report.py                              from every folder of benchmarks/results
python benchmarks/report.py RESULTS ... --out FOLDER     from these files or folders, into another folder of pages
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

if not __package__:  # as a script, which knows its own folder only
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.reporting import first_screen, page, simulated, simulated_page, summary
from benchmarks.reporting.results import read
from benchmarks.reporting.summary import Measured

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the report. Returns 0 also where nothing was measured, and 1 for results that cannot be read."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.results and not options.out:
        parser.error("results from elsewhere need --out FOLDER: docs/ and README.md are made of benchmarks/results")
    try:
        if options.out:
            publish(options.results or [RESULTS], options.out)
        else:
            publish([RESULTS], ROOT / "docs", ROOT / "README.md", simulated.known())
    except (OSError, ValueError, ModuleNotFoundError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 1
    return 0


def publish(results: Iterable[Path], docs: Path, readme: Path | None = None, devices: Sequence[str] = ()) -> None:
    """Writes performance.md and the folder performance in `docs`, and the figures of the README if there is one.

    Args:
        devices: of `simulated.known()`, which have a page though nothing was measured on them.

    Raises:
        ValueError: results that cannot be read, or a README without the two markers.
        ModuleNotFoundError: there is something to draw, and no matplotlib.
    """
    folders = _folders(results)
    gpus = [Measured.of(folder.name, read(files)) for folder, files in sorted(folders.items())]
    alone = simulated_page.without([gpu.device for gpu in gpus], devices)
    block = [*first_screen.lines(gpus, docs.name, alone), *summary.block(gpus, docs.name)]
    text = summary.inserted(readme.read_text(), block, readme) if readme else ""
    pages = docs / "performance"
    before = {path for path in pages.rglob("*") if path.suffix in (".md", ".svg")}
    checked_on = simulated_page.checked_on({gpu.name: gpu.device for gpu in gpus}, alone)
    written = {
        path
        for gpu, folder in zip(gpus, sorted(folders), strict=True)
        for path in _write(gpu, folder, pages, checked_on)
    }
    written |= {path for device in alone for path in _write_simulated(device, pages, checked_on)}
    for path in before - written:  # of results that are gone
        path.unlink()
        if not any(path.parent.iterdir()):
            path.parent.rmdir()
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "performance.md").write_text(summary.index(gpus, {device: simulated_page.slug(device) for device in alone}))
    if readme:
        readme.write_text(text)
    for path in (*sorted(written), docs / "performance.md", *([readme] if readme else [])):
        print(f"wrote {path}")
    if not gpus:
        print(f"no results on a GPU: to be measured by {summary.HOW}")


def _write(gpu: Measured, folder: Path, pages: Path, checked_on: str) -> list[Path]:
    """The page of a device, with its pictures, a page for each set, what is simulated of it, and the certificate that
    lies beside the results."""
    pictures = _pictures()
    images = pages / gpu.name
    images.mkdir(parents=True, exist_ok=True)
    shown = pictures.draw(pictures.PICTURES, gpu.cases, images) | pictures.draw(
        pictures.OF_STREAMS, gpu.streams, images
    )
    certificate = folder / "certificate.md"
    certified = gpu.is_gpu and certificate.exists()  # beside a CPU's results it is of an emulated GPU
    texts: dict[Path, str] = {}
    more: dict[str, list[str]] = {}
    after: list[str] = []
    drawn: dict[str, tuple[str, list[str]]] = {}
    device = simulated.device_of(gpu.device) if gpu.is_gpu else None
    if device is not None:
        found = simulated.beside(gpu.cases, device)
        shown |= (both := pictures.draw(pictures.OF_BOTH, found, images))
        more = {title: simulated_page.beside(found, device) for title in both}
        drawn = pictures.draw(pictures.SIMULATED, device, images)
        after = simulated_page.part(device, drawn, gpu.name, checked_on)
        texts[images / "steps.md"] = simulated_page.every_step(device, gpu.name)
    texts[pages / f"{gpu.name}.md"] = page.markdown(gpu, shown, certified, more, after)
    if certified:
        texts[images / certificate.name] = certificate.read_text()
    texts |= {images / f"{name}.md": page.of_set(gpu, name, own) for name, own in page.by_set(gpu).items()}
    return _written(texts, shown | drawn, pages)


def _write_simulated(device: str, pages: Path, checked_on: str) -> list[Path]:
    """The page of a device on which nothing was measured."""
    pictures, name = _pictures(), simulated_page.slug(device)
    images = pages / name
    images.mkdir(parents=True, exist_ok=True)
    drawn = pictures.draw(pictures.SIMULATED, device, images)
    texts = {
        pages / f"{name}.md": simulated_page.unmeasured(device, drawn, checked_on),
        images / "steps.md": simulated_page.every_step(device, name),
    }
    return _written(texts, drawn, pages)


def _written(texts: Mapping[Path, str], shown: Mapping[str, tuple[str, list[str]]], pages: Path) -> list[Path]:
    for path, text in texts.items():
        path.write_text(text)
    return [*texts, *(pages / name for _, paths in shown.values() for name in paths)]


def _pictures() -> ModuleType:
    try:
        from benchmarks.reporting import pictures
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"a report needs matplotlib ({error}): pip install matplotlib") from error
    return pictures


def _folders(given: Iterable[Path]) -> dict[Path, list[Path]]:
    """The results files below the given files and folders, by the folder they lie in."""
    found: dict[Path, list[Path]] = {}
    for path in given:
        for file in sorted(path.rglob("*.csv")) if path.is_dir() else [path]:
            found.setdefault(file.resolve().parent, []).append(file)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="*", metavar="RESULTS", help="CSV files, or folders of them")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: docs, and README.md besides")
    return parser


if __name__ == "__main__":
    sys.exit(main())
