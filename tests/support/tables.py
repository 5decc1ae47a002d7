# SPDX-License-Identifier: Apache-2.0
"""Tables that a command writes into a page, between two marks that name it."""

from __future__ import annotations

from pathlib import Path

END = "<!-- end of what it writes -->\n"


def written(page: Path, command: str) -> str:
    """What stands between the marks of a command, ``python -m tests.…``."""
    return _parts(page, command)[1]


def write(page: Path, command: str, text: str) -> None:
    before, _, after = _parts(page, command)
    page.write_text(before + text + after)


def _parts(page: Path, command: str) -> tuple[str, str, str]:
    whole, mark = page.read_text(), f"<!-- {command} -->\n"
    assert whole.count(mark) == 1, f"{page.name} has no place for {command}"
    start = whole.index(mark) + len(mark)
    end = whole.index(END, start)
    return whole[:start], whole[start:end], whole[end:]
