# SPDX-License-Identifier: Apache-2.0
"""``python tests [-m MARKERS] [pytest's arguments]``: the suite in its three runs, and one closing line.

Triton reads TRITON_INTERPRET when it is imported, so one run's processes interpret kernels and another's compile
them, each on all cores. What measures time runs by itself then. conftest.py leaves each run the tests that belong to it.
"""

import importlib.util
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
NO_TESTS = 5  # pytest's exit status where nothing was selected
MOST_WORKERS = 4  # each holds torch, Keras and its tests: some 2 GB


def run(name: str, interpret: bool = False, alone: bool = False) -> tuple[int, Counter[str]]:
    """pytest in processes of its own: its exit status, and what it counted."""
    report = ROOT / "build" / f"tests-{name}.xml"
    report.parent.mkdir(exist_ok=True)
    report.unlink(missing_ok=True)
    # A worker that has done its half takes from the other's: no core idles while one file lasts.
    spread = ["-n", str(min(os.cpu_count() or 1, MOST_WORKERS)), "--dist", "worksteal"]
    command = [sys.executable, "-m", "pytest", f"--junitxml={report}"]
    command += [] if alone or not importlib.util.find_spec("xdist") else spread  # OFFLINE borrows what there is
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "TRITON_INTERPRET": str(int(interpret))}
    environment["GPU_RNN_TESTS"] = "alone" if alone else "others"
    status = subprocess.run([*command, *sys.argv[1:]], cwd=ROOT, env=environment).returncode
    found: Counter[str] = Counter()
    for suite in ElementTree.parse(report).getroot() if report.exists() else ():
        bad, skipped = int(suite.attrib["failures"]) + int(suite.attrib["errors"]), int(suite.attrib["skipped"])
        found.update(passed=int(suite.attrib["tests"]) - bad - skipped, failed=bad, skipped=skipped)
    return status, found


def main() -> int:
    statuses, counts = zip(run("interpreter", interpret=True), run("compiled"), run("alone", alone=True), strict=True)
    total = sum(counts, Counter())
    print(f"total: {total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped")
    return max({*statuses} - {NO_TESTS}, default=NO_TESTS)  # a file may have tests of one kind only


if __name__ == "__main__":
    sys.exit(main())
