# SPDX-License-Identifier: Apache-2.0
"""``python tests [-m MARKERS] [pytest's arguments]``: the suite in its two processes at once, and one closing line.

Triton reads TRITON_INTERPRET when it is imported, so one process either interprets kernels or compiles them;
conftest.py leaves each process the tests that belong to it. The interpreter's output comes after the other's.
"""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
NO_TESTS = 5  # pytest's exit status where nothing was selected


class Run:
    """pytest in a process of its own, with its output in a file of build/ or on the terminal."""

    def __init__(self, name: str, environment: dict[str, str], *, shown: bool) -> None:
        self.report = ROOT / "build" / f"tests-{name}.xml"
        self.output = ROOT / "build" / f"tests-{name}.log"
        self.report.parent.mkdir(exist_ok=True)
        self.report.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", f"--junitxml={self.report}", *sys.argv[1:]]
        threads = str(max(1, (os.cpu_count() or 2) // 2))  # the two processes run side by side
        environment = {"OMP_NUM_THREADS": threads, **os.environ, **environment}
        with self.output.open("w") as file:
            to = {} if shown else {"stdout": file, "stderr": subprocess.STDOUT}
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, **to)

    def counts(self) -> Counter[str]:
        """What pytest reported, when it has ended."""
        found: Counter[str] = Counter()
        for suite in ElementTree.parse(self.report).getroot() if self.report.exists() else ():
            bad, skipped = int(suite.attrib["failures"]) + int(suite.attrib["errors"]), int(suite.attrib["skipped"])
            found.update(passed=int(suite.attrib["tests"]) - bad - skipped, failed=bad, skipped=skipped)
        return found


def main() -> int:
    interpreted = Run("interpreter", {"TRITON_INTERPRET": "1"}, shown=False)
    compiled = Run("compiled", {"TRITON_INTERPRET": "0"}, shown=True)
    statuses = {compiled.process.wait(), interpreted.process.wait()}
    print(interpreted.output.read_text())
    total = interpreted.counts() + compiled.counts()
    print(f"total: {total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped")
    return max(statuses - {NO_TESTS}, default=NO_TESTS)  # a file may have tests of one kind only


if __name__ == "__main__":
    sys.exit(main())
