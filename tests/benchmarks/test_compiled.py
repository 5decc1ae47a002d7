# SPDX-License-Identifier: Apache-2.0
"""The table of layers under torch.compile has its rows."""

from __future__ import annotations

import pytest

from benchmarks import compiled


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # Inductor's own
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")
def test_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "SIZES", ((4, 2, 3, 5),))
    row = next(compiled.rows(0.01))
    assert row.startswith("| LSTM | 4, 2, 3, 5 | inference | ") and row.count("|") == compiled.HEAD.split("\n")[
        0
    ].count("|")
