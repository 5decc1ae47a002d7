# SPDX-License-Identifier: Apache-2.0
"""What `certify.py` found, as certificate.json, and as certificate.md for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

EMULATED = "emulated: no GPU, not a certificate, no timings"
PASSED, FAILED, INTERRUPTED, NOT_RUN = "passed", "failed", "interrupted", "not run"
FAILURES = 20  # in certificate.md; certificate.json has all


@dataclass
class Outcome:
    """How a step ended. Until it has, it was not run, so that a certificate that is cut short says so."""

    name: str
    what: str
    commands: list[str]
    status: str = NOT_RUN  # or passed, failed, interrupted
    reason: str = "not reached"  # why it was not run, or did not end by itself
    seconds: float = 0.0
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    failures: list[dict[str, str]] = field(default_factory=list)  # name, detail, repeat
    skips: dict[str, int] = field(default_factory=dict)  # by reason
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def counts(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


def verdict(outcomes: list[Outcome], emulated: bool, lacking: Sequence[str] = ()) -> str:
    """ "certified" only if every step ran and passed, on a GPU, and the commit that is named is what ran."""
    lacking = [*lacking]
    lacking += [f"{outcome.name} {outcome.status}" for outcome in outcomes if outcome.status != PASSED]
    said = ", ".join(lacking) or ("all steps passed" if outcomes else "no step")
    if emulated:
        return f"{EMULATED}; {said}"
    return "certified" if outcomes and not lacking else f"not certified: {said}"


def write(folder: Path, facts: dict[str, str], outcomes: list[Outcome], emulated: bool) -> str:
    """Writes both files and returns the verdict."""
    lacking = ["no known commit"] * (not facts["commit"]) + ["uncommitted changes"] * (facts["dirty"] == "yes")
    said = verdict(outcomes, emulated, lacking)
    content = {"verdict": said, **facts, "steps": [asdict(outcome) for outcome in outcomes]}
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / "certificate.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    _replace(folder / "certificate.md", markdown(said, facts, outcomes))
    return said


def _replace(path: Path, text: str) -> None:
    """At once: a process that is ended here leaves the certificate that was."""
    scratch = path.with_suffix(".new")
    scratch.write_text(text)
    scratch.replace(path)


def markdown(said: str, facts: dict[str, str], outcomes: list[Outcome]) -> str:
    """The certificate for people, the verdict first."""
    known = [f"| {name} | {value} |" for name, value in facts.items() if value]
    rows = [
        f"| {o.name} | {o.what} | {o.status} | {o.passed} | {o.failed} | {o.skipped} | {o.seconds:.0f} s |"
        for o in outcomes
    ]
    lines = [
        f"# {said[0].upper()}{said[1:]}",
        "",
        "| step | checks | status | passed | failed | skipped | took |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
        "| machine | |",
        "|---|---|",
        *known,
    ]
    for outcome in outcomes:
        lines += _section(outcome)
    return "\n".join(lines) + "\n"


def _section(outcome: Outcome) -> list[str]:
    """What is to be said of a step beyond its row."""
    lines = [f"- {outcome.reason}"] if outcome.reason else []
    lines += [f"- {name}: {_text(value)}" for name, value in outcome.notes.items()]
    lines += [f"- skipped {count}: {reason}" for reason, count in outcome.skips.items()]
    for failure in outcome.failures[:FAILURES]:
        lines += [f"- FAILED {failure['name']}: {failure['detail']}", f"  again: `{failure['repeat']}`"]
    more = len(outcome.failures) - FAILURES
    lines += [f"- and {more} failures more, in certificate.json"] if more > 0 else []
    commands = [f"    {command}" for command in outcome.commands]
    return ["", f"## {outcome.name}", "", *commands, *([""] if lines else []), *lines]


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {count}" for name, count in sorted(value.items())) or "nothing"
    return str(value)
