# SPDX-License-Identifier: Apache-2.0
"""What a step of `certify.py` did, a JSON line for each thing checked, so that a crash leaves all that came before.

As a plugin of pytest (PYTEST_PLUGINS=certifying.record, and GPU_RNN_RECORD names the file) it writes such lines for
tests, and with GPU_RNN_SHARD, "k/n", it keeps only every n-th test, so that n processes share a suite.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

RECORD, SHARD = "GPU_RNN_RECORD", "GPU_RNN_SHARD"
LONGEST = 300  # characters of a failure: its first line, for a table


class Writer:
    """Appends lines to a file; without one, nothing."""

    def __init__(self, path: str | Path | None) -> None:
        self.path = Path(path) if path else None

    def line(self, **values: Any) -> None:
        if self.path:
            with self.path.open("a") as file:
                file.write(json.dumps(values) + "\n")

    def begin(self, name: str) -> None:
        self.line(name=name, outcome="begun")

    def end(self, name: str, outcome: str, detail: str = "", repeat: str = "") -> None:
        """`outcome` is passed, failed or skipped; `repeat` the command that does it again."""
        self.line(name=name, outcome=outcome, detail=detail[:LONGEST], repeat=repeat)

    def total(self, count: int) -> None:
        self.line(total=count)

    def note(self, **values: Any) -> None:
        """Facts for the certificate."""
        self.line(note=values)


@dataclass
class Record:
    """The lines of one or more files, read."""

    total: int = 0
    ends: dict[str, dict[str, str]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def count(self, outcome: str) -> int:
        return sum(end["outcome"] == outcome for end in self.ends.values())

    def of(self, outcome: str) -> list[dict[str, str]]:
        return [{"name": name, **end} for name, end in self.ends.items() if end["outcome"] == outcome]

    @property
    def reasons(self) -> dict[str, int]:
        """Why things were skipped, and how many."""
        return dict(Counter(end["detail"] for end in self.of("skipped")))


def read(*paths: Path) -> Record:
    found = Record()
    for line in _lines(*paths):
        name = line.pop("name", None)
        if name is not None:
            found.ends[name] = line
        found.total += line.get("total", 0)
        found.notes |= line.get("note", {})
    return found


def _lines(*paths: Path) -> Iterator[dict[str, Any]]:
    for path in paths:
        for text in path.read_text().split("\n")[:-1] if path.exists() else ():  # the last may be half written
            yield json.loads(text)


writer = Writer(os.environ.get(RECORD))


@pytest.hookimpl(trylast=True)  # after conftest.py has left out what other processes run
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    k, n = map(int, os.environ.get(SHARD, "0/1").split("/"))
    config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % n != k])
    items[:] = items[k::n]


def pytest_collection_finish(session: pytest.Session) -> None:
    writer.total(len(session.items))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if not report.passed:
        _write(report, report.nodeid)


def pytest_runtest_logstart(nodeid: str) -> None:
    writer.begin(nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A test's setup, call and end come one by one; only the call can pass, and any can fail."""
    if report.when == "call" or not report.passed:
        _write(report, report.nodeid)


def _write(report: pytest.CollectReport | pytest.TestReport, name: str) -> None:
    if report.skipped and isinstance(report.longrepr, tuple):
        detail = report.longrepr[2].removeprefix("Skipped: ")
    else:
        crash = getattr(report.longrepr, "reprcrash", None)
        detail = crash.message if crash else str(report.longrepr or "")
    first = next(iter(detail.strip().splitlines()), "")
    writer.end(name, report.outcome, first, f"python -m pytest '{name}'")
