# SPDX-License-Identifier: Apache-2.0
"""pytest's plugin of ``make test-all``: a run that was broken off goes on. What passed is not run again until the
code, or a version of a package, is another.

GPU_RNN_PASSED is the file that holds the names of passed tests; `tests/__main__.py` sets it.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

NOT_CODE = {"build", "dist", "__pycache__"}


def code(root: Path) -> str:
    """A hash of what decides whether a test passes: files that lie here, and packages that are installed."""
    installed = [path.name for folder in sys.path if folder.endswith("-packages") for path in Path(folder).iterdir()]
    found = hashlib.sha256("\n".join(sorted(installed)).encode())
    folders = [path for path in root.iterdir() if path.name[0] != "." and path.suffix != ".egg-info"]
    for path in sorted(file for each in folders for file in (each, *each.rglob("*"))):
        name = path.relative_to(root)
        if path.is_file() and not NOT_CODE & {*name.parts}:
            found.update(name.as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def passed_file() -> Path:
    return Path(os.environ["GPU_RNN_PASSED"])


class Recorder:
    """Hears of all tests, as workers do not, and writes down those that passed."""

    def __init__(self, root: Path) -> None:
        head = f"{code(root)}\n"
        if not passed_file().exists() or not passed_file().read_text().startswith(head):
            passed_file().write_text(head)
        self.before = passed_file().read_text().count("\n") - 1
        # Workers collect the same, whenever they start: what passes meanwhile is none of their business.
        os.environ["GPU_RNN_PASSED_BYTES"] = str(passed_file().stat().st_size)
        self.called: set[str] = set()

    def pytest_report_header(self) -> str:
        return f"{self.before} tests have passed before, with this code; to run them again, remove {passed_file()}"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self.called.add(report.nodeid)
        if report.when == "teardown" and report.passed and report.nodeid in self.called:
            with passed_file().open("a") as file:
                file.write(f"{report.nodeid}\n")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(ROOT))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    size = int(os.environ["GPU_RNN_PASSED_BYTES"])
    passed = {*passed_file().read_bytes()[:size].decode().split("\n")}
    again = [item for item in items if item.nodeid in passed]
    items[:] = [item for item in items if item.nodeid not in passed]
    if again:
        config.hook.pytest_deselected(items=again)
