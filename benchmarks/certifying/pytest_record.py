# SPDX-License-Identifier: Apache-2.0
"""A plugin of pytest (PYTEST_PLUGINS names it, GPU_RNN_RECORD the file) that writes a `record` of tests. With
GPU_RNN_SHARD, "k/n", it keeps only every n-th test, so that n processes share a suite."""

from __future__ import annotations

import os

import pytest

from benchmarks.certifying.record import RECORD, SHARD, Writer

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
