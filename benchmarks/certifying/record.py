# SPDX-License-Identifier: Apache-2.0
"""What a step of `certify.py` did, a JSON line for each thing checked, so that a crash leaves what came before."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
