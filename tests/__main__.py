# SPDX-License-Identifier: Apache-2.0
"""``python tests [-m MARKERS] [pytest's arguments]``: the suite in at most three runs, and one closing line.

Triton reads TRITON_INTERPRET when it is imported, so one run's processes compile kernels and another's interpret
them, each on all cores. What measures time runs by itself then. conftest.py leaves each run the tests that belong to
it, and a run with none is not started.

With RESUME in the environment a run that was broken off goes on: tests/support/resuming.py.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
LEFT = BUILD / "tests-left.json"  # how many tests the last run left to each other
OTHERS = ("interpreter", "alone")  # than the first, "compiled"
NO_TESTS = 5  # pytest's exit status where nothing was selected
MOST_WORKERS = 4  # each holds torch, Keras and its tests: some 2 GB


def run(name: str) -> tuple[int, Counter[str]]:
    """pytest in processes of its own: its exit status, and what it counted."""
    report = BUILD / f"tests-{name}.xml"
    report.unlink(missing_ok=True)
    # A worker that has done its half takes from the other's: no core idles while one file lasts.
    spread = ["-n", str(min(os.cpu_count() or 1, MOST_WORKERS)), "--dist", "worksteal"]
    command = [sys.executable, "-m", "pytest", f"--junitxml={report}"]
    command += (
        [] if name == "alone" or not importlib.util.find_spec("xdist") else spread
    )  # OFFLINE borrows what there is
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "TRITON_INTERPRET": str(int(name == "interpreter"))}
    environment |= {"GPU_RNN_TESTS": "alone" if name == "alone" else "others", "GPU_RNN_LEFT": str(LEFT)}
    if os.environ.get("RESUME"):
        command += ["-p", "tests.support.resuming"]
        environment["GPU_RNN_PASSED"] = str(BUILD / f"tests-passed-{Path(sys.prefix).name}.txt")
    status = subprocess.run([*command, *sys.argv[1:]], cwd=ROOT, env=environment).returncode
    found: Counter[str] = Counter()
    for suite in ElementTree.parse(report).getroot() if report.exists() else ():
        bad, skipped = int(suite.attrib["failures"]) + int(suite.attrib["errors"]), int(suite.attrib["skipped"])
        found.update(passed=int(suite.attrib["tests"]) - bad - skipped, failed=bad, skipped=skipped)
    return status, found


def main() -> int:
    """Runs what the first run, which reads all files, leaves to the others; returns the worst of their exit
    statuses."""
    BUILD.mkdir(exist_ok=True)
    LEFT.unlink(missing_ok=True)
    runs = [run("compiled")]
    left = json.loads(LEFT.read_text()) if LEFT.exists() else OTHERS  # it could not read them
    runs += [run(name) for name in OTHERS if name in left]
    statuses, counts = zip(*runs, strict=True)
    total = sum(counts, Counter())
    print(f"total: {total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped")
    return max({*statuses} - {NO_TESTS}, default=NO_TESTS)  # a file may have tests of one kind only


if __name__ == "__main__":
    sys.exit(main())
