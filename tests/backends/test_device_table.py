# SPDX-License-Identifier: Apache-2.0
"""The table of kernels/README.md of simulated steps on several devices.

``python -m tests.backends.test_device_table`` writes it.
"""

from __future__ import annotations

from gpu_rnn.backends import chains
from gpu_rnn.backends.chains import Chain
from tests.support import tables
from tests.support.paths import ROOT

PAGE, COMMAND = ROOT / "kernels" / "README.md", "python -m tests.backends.test_device_table"
DEVICES = ("H100", "A100", "RTX 4090")
SIZES = [  # backend, kind, units, rows of a batch
    *(("resident", "bf16", hidden, 16) for hidden in (32, 64, 128)),
    *(("group", "16-bit", *size) for size in ((256, 16), (512, 64), (1024, 16), (1024, 64))),
]


def microseconds(build: Chain, hidden: int, batch: int) -> str:
    found = [row for each, row in chains.rows() if each == build and (row.hidden, row.batch) == (hidden, batch)]
    return f"{found[0].cycles / found[0].clock / 1e3:.2f}" if found else "-"


def table() -> str:
    lines = ["| backend | cell | H, B | " + " | ".join(DEVICES) + " |", "|---" * (3 + len(DEVICES)) + "|"]
    for backend, kind, hidden, batch in SIZES:
        for cell in ("lstm", "gru"):
            both = [
                [Chain(device, backend, cell, chains.PLAIN, kind, direction) for direction in ("training", "backward")]
                for device in DEVICES
            ]
            figures = [", ".join(microseconds(build, hidden, batch) for build in each) for each in both]
            lines.append("| " + " | ".join([backend, cell.upper(), f"{hidden}, {batch}", *figures]) + " |")
    return "\n".join([*lines, ""])


def test_the_table_is_what_was_simulated() -> None:
    assert tables.written(PAGE, COMMAND) == table()


if __name__ == "__main__":
    tables.write(PAGE, COMMAND, table())
