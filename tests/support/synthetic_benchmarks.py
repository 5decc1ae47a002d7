# SPDX-License-Identifier: Apache-2.0
"""Writes tests/data/benchmarks_synthetic.csv: made-up results, so that the report's tests have something to report.

No number in it is a measurement of anything. It has the columns of benchmarks/run.py that a report reads, and a row of
each kind: gains and losses, options, scaling, other libraries, an older run, and everything that can go wrong.

python -m tests.support.synthetic_benchmarks
"""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Iterator

from tests.support.paths import DATA

FILE = DATA / "benchmarks_synthetic.csv"
DEVICE = "Synthetic GPU (made-up numbers; no measurement)"
SIZES = ("cell", "T", "B", "I", "H", "layers", "bidirectional", "heads")
COLUMNS = (
    *("set", "problem", *SIZES, "option", "dtype", "precision", "direction", "variant", "chosen", "status"),
    *("median_us", "p20_us", "p80_us", "us_per_step", "ratio", "floor_us", "of_floor", "peak_mib", "detail"),
    *("device", "driver", "cuda", "cudnn", "torch", "triton", "cupy", "commit", "dirty", "date"),
)
FACTS = dict.fromkeys(("driver", "cuda", "cudnn", "torch", "triton"), "0.0") | {
    "device": DEVICE,
    "commit": "0" * 40,
    "dirty": "no",
    "date": "2000-01-02T00:00:00+00:00",
}
ALL = ("bf16", "fp16", "fp32")
BOTH = ("forward", "training")
# In turn over the cases, so that every picture has gains, losses and what is as fast.
RATIOS = (2.5, 1.8, 1.2, 3.9, 5.5, 0.83, 1.0, 7.5, 0.6, 1.4, 2.1)
OPTIONS = {"hard_sigmoid": 1.02, "peephole": 1.05, "mask": 1.08, "resets": 1.04, "zoneout": 1.16, "layer_norm": 1.9}
REFUSED = (
    ("wrong", "d_x is off by 3.0e-01: not timed"),
    ("failed", "out of resource: shared memory"),
    ("no memory", ""),
    ("emulated", "the interpreter computed it: no timing"),
)

Row = dict[str, object]


def problem(set_name: str, cell: str, *, T: int, B: int, H: int, layers: int = 1, heads: int = 1) -> Row:
    name = f"{cell}-H{H}{f'-x{heads}' * (heads > 1)}{f'-L{layers}' * (layers > 1)}-B{B}-T{T}"
    sizes = (cell, T, B, H, H, layers, False, heads)
    return {"set": set_name, "problem": name, **dict(zip(SIZES, sizes, strict=True))}


def cases() -> Iterator[Row]:
    """Problem, dtype, direction and option of every case."""
    grid = [
        problem("grid", cell, T=100, B=B, H=H)
        for cell in ("LSTM", "GRU")
        for H in (64, 256, 1024, 2048)
        for B in (1, 16, 128)
    ]
    yield from (p | {"dtype": t, "direction": d} for t in ALL for p in grid for d in BOTH)
    steps = [problem("streaming", "LSTM", T=1, B=B, H=H) for H in (128, 1024) for B in (1, 16)]
    yield from (p | {"dtype": t, "direction": "forward"} for t in ("bf16", "ieee") for p in steps)
    scaling = [problem("scaling", "LSTM", T=T, B=32, H=256) for T in (1, 4, 16, 64, 256, 1024)]
    scaling += [problem("scaling", "LSTM", T=128, B=32, H=256, layers=n) for n in (1, 2, 4, 8)]
    yield from (p | {"dtype": "bf16", "direction": d} for p in scaling for d in BOTH)
    plain = problem("options", "LSTM", T=100, B=32, H=256)
    named = {option: plain | {"option": option, "problem": f"{plain['problem']}-{option}"} for option in OPTIONS}
    yield from (p | {"dtype": "bf16", "direction": d} for p in (plain, *named.values()) for d in BOTH)
    heads = [problem("flashrnn", "LSTM", T=1024, B=B, H=64, heads=12) for B in (2, 16, 128)]
    yield from (p | {"dtype": "bf16", "direction": d} for p in heads for d in BOTH)
    broken = problem("refused", "GRU", T=50, B=7, H=96)
    yield from (
        broken | {"problem": f"{status}-GRU", "dtype": "fp32", "direction": "training"} for status, _ in REFUSED
    )


def rows() -> list[Row]:
    rng = random.Random(0)
    found: list[Row] = []
    for number, case in enumerate(cases()):
        found += _variants(case, RATIOS[number % len(RATIOS)], rng)
    older = [row | {"date": "2000-01-01T00:00:00+00:00"} for row in found[:2]]
    older[1] |= {"median_us": "1.00", "p20_us": "1.00", "p80_us": "1.00", "us_per_step": "0.010", "ratio": "99"}
    return older + found


def _variants(case: Row, ratio: float, rng: random.Random) -> list[Row]:
    """torch.nn's row, ours, and others in some sets."""
    T, B, H, depth = (int(str(case[name])) for name in ("T", "B", "H", "layers"))
    work = H * H * B / 2**22 * (2 if case["dtype"] in ("fp32", "ieee") else 1)
    theirs = depth * (6 + 30 / T + 4 * work) * (2.5 if case["direction"] == "training" else 1) * rng.uniform(0.8, 1.2)
    floor = depth * (0.5 + 0.3 * work)
    option = OPTIONS.get(str(case.get("option")), 1.0)
    ours = theirs / ratio
    if case["set"] in ("options", "scaling"):
        ours = depth * (2 + 30 / T) * option * (2.2 if case["direction"] == "training" else 1)
    memory = T * B * H * depth * 16 / 2**20 + 1

    def timed(variant: str, step: float, chosen: str = "", share: float = 1.0) -> Row:
        us = T * step
        times = {"median_us": f"{us:.2f}", "p20_us": f"{us * 0.98:.2f}", "p80_us": f"{us * 1.04:.2f}"}
        floors = {"floor_us": f"{floor:.3f}", "of_floor": f"{floor / step:.3f}"}
        found = times | floors | {"us_per_step": f"{step:.3f}", "peak_mib": f"{memory * share:.1f}"}
        return case | found | {"variant": variant, "chosen": chosen, "status": "ok", "ratio": f"{theirs / step:.4g}"}

    made = [timed("torch.nn", theirs)]
    if case["set"] == "refused":
        status, detail = next(pair for pair in REFUSED if str(case["problem"]).startswith(pair[0]))
        return [*made, case | {"variant": "group", "chosen": "yes", "status": status, "detail": detail}]
    made.append(timed("group", ours, "yes", rng.uniform(0.4, 1.3)))
    if case["set"] == "streaming":
        made.append(timed("step", ours * rng.uniform(0.8, 2)))
    if case["set"] == "flashrnn":
        made += [timed("flashrnn", ours * rng.uniform(0.8, 2)), timed("torchrl", ours * rng.uniform(1.5, 4))]
    return made


def text() -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(FACTS | row for row in rows())
    return file.getvalue()


if __name__ == "__main__":
    FILE.write_text(text())
    print(f"wrote {FILE}")
