# SPDX-License-Identifier: Apache-2.0
"""A report says what its rows say."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))  # a folder of scripts, which import each other by name

import report  # noqa: E402
import results  # noqa: E402
import run  # noqa: E402

SYNTHETIC = ROOT / "tests" / "data" / "benchmarks_synthetic.csv"


def test_a_report_of_synthetic_results(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip(
        "matplotlib.image", reason="matplotlib is not installed: pip install matplotlib"
    )
    assert report.main([str(SYNTHETIC), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "README.md").read_text()
    assert "made-up numbers" in text.splitlines()[0]
    row = next(line for line in text.splitlines() if line.startswith("| LSTM-H64-B32-T256 | bf16 | forward"))
    assert "| resident | 2.50× |" in row  # of the newer of its two runs, not the older's 0.01×
    assert "| resident | **0.83×** | step 1.05× |" in text
    assert "- quick/GRU-H128-B32-T256 fp32 training, resident: wrong. d_x is off" in text
    assert "| bf16 | training | ≤ 1024 | 6 | 1.42× | **0.66×** quick/LSTM-H1024-B64-T50 | 2 | 1 |" in text
    pictures = {path.stem: path.read_bytes() for path in tmp_path.glob("*.png")}
    assert pictures.keys() == {"quick", "streaming", "deepbench"}
    assert matplotlib.imread(tmp_path / "quick.png").std() > 0.1
    assert report.main([str(SYNTHETIC), "--out", str(tmp_path)]) == 0
    assert pictures == {path.stem: path.read_bytes() for path in tmp_path.glob("*.png")}
    assert text == (tmp_path / "README.md").read_text()


def test_a_report_of_what_was_just_measured(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install matplotlib")
    arguments = "--device cpu --set tiny --dtype fp32 --trials 1 --backend aten,step --direction forward"
    assert run.main([*arguments.split(), "--out", str(tmp_path / "rows.csv")]) == 0
    rows = list(csv.DictReader((tmp_path / "rows.csv").read_text().splitlines()))
    assert report.main([str(tmp_path / "rows.csv")]) == 0
    text = (tmp_path / "README.md").read_text()
    assert all(f"| {row['problem']} | fp32 | forward |" in text for row in rows)
    assert (tmp_path / "tiny.png").stat().st_size > 10_000


def test_no_results_make_no_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.main([]) == 0
    assert "no results on a GPU" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_one_report_is_of_one_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = SYNTHETIC.read_text()
    (tmp_path / "a.csv").write_text(text)
    (tmp_path / "b.csv").write_text(text.replace("Synthetic GPU", "Another GPU"))
    assert report.main([str(tmp_path)]) == 1
    assert "exactly one device" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.png"))
    assert results.read([tmp_path / "a.csv"])[0].ratio == 2.5
