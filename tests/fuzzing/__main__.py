# SPDX-License-Identifier: Apache-2.0
"""Random calls of every backend that runs without a GPU, beside loops by hand.

make fuzz SECONDS=600                               as long as you like
.venv/bin/python tests/fuzzing --calls 10000        until so many calls were compared
.venv/bin/python tests/fuzzing --seed 7 --case 123  one case again, as the report of a failure says
"""

from __future__ import annotations

import argparse
import itertools
import os
import secrets
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs cases. Returns 1 if a result was wrong or a call failed, else 0."""
    options = _parser().parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") != "1":  # Triton reads it at import
        command = [sys.executable, str(HERE), *(sys.argv[1:] if arguments is None else arguments)]
        try:
            return subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, check=False).returncode
        except KeyboardInterrupt:
            return 128 + signal.SIGINT  # the command has said so
    sys.path[0] = str(HERE.parents[1])
    from tqdm import tqdm

    from tests.fuzzing import cases

    seed = secrets.randbelow(2**31) if options.seed is None else options.seed
    print(f"fuzz: seed {seed}", flush=True)
    compared: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    end = time.monotonic() + options.seconds if options.calls is None else float("inf")
    shown = tqdm(total=options.calls, unit=" calls", disable=None)  # None: only on a terminal
    try:
        for number in itertools.count() if options.case is None else [options.case]:
            for backend, said in cases.check(cases.draw(seed, number)):
                compared[backend] += 1
                outcomes["failed" if said else "passed"] += 1
                shown.update()
                if said:
                    shown.write(f"{said}\n    again: {cases.repeat(seed, number)}")
            if time.monotonic() > end or sum(outcomes.values()) >= (options.calls or float("inf")):
                break
    except KeyboardInterrupt:
        print("fuzz: stopped", file=sys.stderr)
        return 128 + signal.SIGINT  # what a shell reports for Ctrl-C
    finally:
        shown.close()
        print(f"fuzz: seed {seed}; " + ", ".join(f"{name} {count}" for name, count in sorted(compared.items())))
        print(f"fuzz: {outcomes['passed']} passed, {outcomes['failed']} failed")
    return 1 if outcomes["failed"] else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tests/fuzzing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60, metavar="S", help="how long (default: 60)")
    parser.add_argument(
        "--calls", type=int, metavar="N", help="until so many calls were compared, instead of --seconds"
    )
    parser.add_argument("--seed", type=int, help="of all cases (default: a new one, which is printed)")
    parser.add_argument("--case", type=int, metavar="K", help="only this case of the seed")
    return parser


if __name__ == "__main__":
    sys.exit(main())
