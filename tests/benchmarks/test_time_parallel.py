# SPDX-License-Identifier: Apache-2.0
"""What the page on layers parallel in time shows is what the library does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import time_parallel
from gpu_rnn.dispatch import relaxation_plan


@pytest.mark.parametrize("bias", [0.0, 2.0])
def test_passes_are_those_of_the_library(bias: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture's are written out by themselves."""
    layer = time_parallel.initial("LSTM", bias, hidden=16).double()
    x = torch.randn(512, 1, time_parallel.FEATURES, dtype=torch.float64)
    passes = [*time_parallel.history(layer, x, 32)]
    layer.backend = "step"
    relaxation_plan._outcomes.clear()
    y = time_parallel.chunked(layer, x, 32)
    (outcome,) = relaxation_plan._outcomes.values()
    relaxation_plan._outcomes.clear()
    assert outcome.settled
    assert outcome.passes == time_parallel.settled(passes)
    assert abs((y - layer(x)[0]).abs().max().item() - passes[outcome.passes - 1][1]) < 1e-6


def test_the_picture_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'gpu-rnn[demo]'")
    monkeypatch.setattr(time_parallel, "PICTURE", tmp_path / "new" / "settling.svg")
    monkeypatch.setattr(time_parallel, "STEPS", 128)
    monkeypatch.setattr(time_parallel, "BIASES", (0.0, 4.0))
    monkeypatch.setattr(time_parallel, "LENGTHS", (32, 64))
    time_parallel.settling()
    assert "forget bias 4" in (tmp_path / "new" / "settling.svg").read_text()
    assert capsys.readouterr().out.count("LSTM, forget bias") == len(time_parallel.BIASES)


def test_tables(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    time_parallel.modelled("H100")
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 18
    assert {row.count("|") for row in rows} == {head.count("|")}
    assert "×" in rows[0]
    monkeypatch.setattr(time_parallel, "MEASURED", (("step", 8, 128),))
    time_parallel.measured(seconds=0.1)
    assert capsys.readouterr().out.count("| `step` | 8 | 128 |") == 1  # chunks of 64 steps alone are shorter
