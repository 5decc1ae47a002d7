# SPDX-License-Identifier: Apache-2.0
"""``python tests [-m MARKERS] [pytest's arguments]``: the suite in its two processes, and one closing line.

Triton reads TRITON_INTERPRET when it is imported, so one process either interprets kernels or compiles them;
conftest.py leaves each process the tests that belong to it.
"""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
NO_TESTS = 5  # pytest's exit status where nothing was selected


def run(name: str, environment: dict[str, str], arguments: list[str]) -> tuple[int, Counter[str]]:
    """Run pytest once; its exit status and its counts."""
    report = ROOT / "build" / f"tests-{name}.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", f"--junitxml={report}", *arguments]
    status = subprocess.run(command, cwd=ROOT, env=os.environ | environment, check=False).returncode
    counts: Counter[str] = Counter()
    for suite in ElementTree.parse(report).getroot() if report.exists() else ():
        bad, skipped = int(suite.attrib["failures"]) + int(suite.attrib["errors"]), int(suite.attrib["skipped"])
        counts.update(passed=int(suite.attrib["tests"]) - bad - skipped, failed=bad, skipped=skipped)
    return status, counts


def main() -> int:
    interpreted, total = run("interpreter", {"TRITON_INTERPRET": "1"}, sys.argv[1:])
    compiled, counts = run("compiled", {"TRITON_INTERPRET": "0"}, sys.argv[1:])
    total += counts
    print(f"total: {total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped")
    return max({interpreted, compiled} - {NO_TESTS}, default=NO_TESTS)  # a file may have tests of one kind only


if __name__ == "__main__":
    sys.exit(main())
