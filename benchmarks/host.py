# SPDX-License-Identifier: Apache-2.0
"""What the host does for a call on a GPU: kernels, Python's function calls and microseconds, without a GPU.

python benchmarks/host.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # as a script, which knows its own folder only
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.measuring import dispatching
from benchmarks.stub_driver import process

TABLE = """
from benchmarks.measuring import host

print(f"{'call':20}{'torch':>7}{'ours':>7}{'functions':>11}{'host us':>9}   torch's kernels")
for name, call in host.calls().items():
    of = host.of(call)
    sizes = f"{len(of.torch_kernels):7}{len(of.own_kernels):7}{of.functions:11}{of.us:9.0f}"
    print(f"{name:20}{sizes}   {' '.join(of.torch_kernels)}")
"""


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    if process.missing():
        sys.exit(f"not found: {process.missing()}")
    print(process.run(TABLE))
    print(f"\n{'a new T':20}{'functions':>11}{'host us':>9}")
    for name, problem in dispatching.problems().items():
        print(f"{name:20}{dispatching.asked(problem):11}{dispatching.took(problem):9.0f}")


if __name__ == "__main__":
    main()
