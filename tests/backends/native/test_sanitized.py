# SPDX-License-Identifier: Apache-2.0
"""The loops in C under AddressSanitizer and UndefinedBehaviorSanitizer: every cell, option and instruction set, odd
sizes; torch's own tensors have the sanitizer's borders, as its allocator is in front of all.

``python -m tests.backends.native.test_sanitized FAULT`` is what runs there; FAULT is one of `FAULTS`, or none.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import gpu_rnn
from gpu_rnn import memo
from gpu_rnn.backends.native import building, launch, text
from gpu_rnn.recurrence import Recurrence
from tests.support import loops as support
from tests.support import native
from tests.support.cells import of_three_products, two_products
from tests.support.layer_options import inputs_of, with_options
from tests.support.paths import ROOT

pytestmark = [pytest.mark.slow, native.NEEDS_C]
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1", "-O1")
# Of each what stands in the C text, and what instead.
FAULTS = {
    "written beyond": (
        "forward.c",
        "memset(a->y + place * a->width, 0, of_h)",
        "memset(a->y + place * a->width, 0, 65 * of_h)",
    ),
    "read beyond": ("backward.c", ">= length_of(mine, row)", ">= length_of(mine, row + 65)"),
    "undefined": ("memory.h", "size_t bytes = (", "size_t bytes = 0 * (1 << (count + 32)) + ("),
}
WORDS = {"written beyond": "buffer-overflow", "read beyond": "buffer-overflow", "undefined": "runtime error: shift"}
SHAPES = [(1, 1, 1), (3, 2, 5), (4, 3, 17), (2, 7, 33)]  # T, B, H
OPTIONS = [
    "",
    "lengths",
    "lengths norm drop_per_gate zone",
    "mask reset_values drop zone all_states",
    "mask reset_values_per_step drop_per_gate norm all_states",
]


def cases(whole: bool) -> Iterator[tuple[Recurrence, support.Inputs]]:
    """Every cell, in float32, with shapes and options in turn; with a projection every shape, and other dtypes."""
    turn = 0
    for cell in support.RECURRENCES if whole else ():
        for shape in SHAPES:
            turn += 1
            yield inputs_of((cell, OPTIONS[turn % 5], torch.float32, shape, ("0", "01", "1")[turn % 3], turn % 2 == 0))
    for dtype in (torch.float32, torch.float64, torch.bfloat16) if whole else (torch.float32,):
        for shape in SHAPES:
            for projection in ("", "proj"):
                turn += 1
                yield inputs_of(("lstm", OPTIONS[turn % 5], projection, dtype, shape, "01", True))
    for recurrence in (two_products(), of_three_products()) if whole else ():
        inputs = support.make(recurrence, T=4, B=3, H=21, reverse="01", scale=0.2)
        for options in ((), ("mask", "reset_values", "drop_per_gate", "zone", "all_states", "norm")):
            yield recurrence, with_options(inputs, recurrence, options).to(torch.float32)


def plain(cell: str, steps: int, rows: int, hidden: int) -> None:
    """Plain layers, and those of one step, have ways of their own."""
    layer = getattr(gpu_rnn, cell)(3, hidden, backend="native")
    x = torch.randn(steps, rows, 3, requires_grad=True)
    layer(x)[0].sum().backward()
    with torch.no_grad():
        layer(x)


RESETS = torch.arange(99).view(33, 3) % 7 == 0
STEERED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"bidirectional": True, "layer_norm": True}, {"lengths": [33, 0, 5]}),
    ({"proj_size": 3, "rms_norm": True}, {"mask": ~RESETS}),
    ({"recurrent_dropout": 0.5, "recurrent_dropout_per_gate": True, "zoneout": 0.2}, {"resets": RESETS}),
    ({"peephole": True, "bidirectional": True, "recurrent_dropout": 0.5}, {"return_all_states": True}),
]


def steered() -> None:
    """Layers with options take gradients of weights themselves, some places at a time."""
    x = torch.randn(33, 3, 5, requires_grad=True)
    for options, given in STEERED:
        layer = gpu_rnn.LSTM(5, 21, backend="native", **options)
        print(*options, *given, flush=True)
        layer(x, **given)[0].sum().backward()
        with torch.no_grad():
            layer(x, **given)


def everything() -> None:
    best, *others = building.instruction_sets()
    for target in (best, *others):
        building.instruction_sets = lambda target=target: (target,)  # type: ignore[assignment,misc]
        building.library.cache_clear()
        memo.clear()
        for number, (recurrence, inputs) in enumerate(cases(target == best)):
            launch.OF_A_THREAD = (5e6, 1.0)[number % 2]
            print(target.name, number, recurrence.name, flush=True)  # the last one, where it ends
            support.values_and_gradients(recurrence, inputs, "native")
            with torch.no_grad():
                support.run(recurrence, inputs, "native")
        steered()
        for cell in ("LSTM", "GRU"):
            for steps, rows in ((1, 1), (1, 2), (1, 7), (1, 9), (5, 3)):
                plain(cell, steps, rows, 2 * rows + 3)


def main(fault: str = "") -> None:
    os.environ.pop("LD_PRELOAD")  # the compiler does without
    torch.set_num_threads(3)
    building.COMPILER_FLAGS += SANITIZERS
    if fault:
        name, before, after = FAULTS[fault]
        original = text._file

        def planted(file: str) -> str:
            body = original(file)
            assert file != name or before in body
            return body.replace(before, after) if file == name else body

        text._file = planted
    everything()
    print("done")


def run(fault: str, folder: Path) -> subprocess.CompletedProcess[str]:
    compiler = building.compiler()[0]
    asked = [compiler, "-print-file-name=libasan.so"]
    preloaded = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(preloaded).is_absolute():
        pytest.skip(f"{compiler} has no libasan.so")
    given = {
        "LD_PRELOAD": preloaded,
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:halt_on_error=1",
        "GPU_RNN_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.backends.native.test_sanitized", *([fault] if fault else [])]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | given, capture_output=True, text=True, timeout=1500, check=False
    )


def test_nothing_is_read_or_written_where_nothing_is(tmp_path: Path) -> None:
    done = run("", tmp_path)
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stderr[-4000:]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_reported(fault: str, tmp_path: Path) -> None:
    done = run(fault, tmp_path)
    assert done.returncode and WORDS[fault] in done.stderr, done.stderr[-4000:]


if __name__ == "__main__":
    main(*sys.argv[1:])
