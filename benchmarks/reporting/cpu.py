# SPDX-License-Identifier: Apache-2.0
"""What results of a CPU come to: ours beside torch.nn by cell and batch, and beside what else people run there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import geometric_mean

from benchmarks.cases.names import BY_HAND, COMPILED, ONNXRUNTIME, TORCH
from benchmarks.reporting.results import DIRECTIONS, STEP_BY_STEP, Case, Row, against_default, per_step, timed
from benchmarks.reporting.tables import paragraph, table

BATCHES = {"B 1": lambda batch: batch == 1, "B > 1": lambda batch: batch > 1}
CELLS = "a cell called for each step"
OF_HANDS, OF_ONNX = "a loop by hand of torch operations, with an option", "ONNX Runtime, inference"
WORDS = {"forward": "forward", "training": "forward and backward"}


def summary(cases: Sequence[Case]) -> list[str]:
    """Two tables, of one thread: how many times as fast as torch.nn, and as others."""
    one = [case for case in cases if case["threads"] == "1"]
    columns = [(direction, name) for direction in DIRECTIONS for name in BATCHES]
    rows = [
        [label, *(_figure(_ratios(_within(own, *column))) for column in columns)] for label, own in _kinds(one).items()
    ]
    heads = [f"{WORDS[direction]}, {name}:" for direction, name in columns]
    lines = table(["layer", *heads], [row for row in rows if any(row[1:])])
    others = table(["beside", "times as fast:", "cases:"], _others(one))
    return [*lines, *[""] * bool(lines and others), *others] or ["Not measured on one thread."]


def goals(cases: Sequence[Case]) -> list[str]:
    """A section: what `native` was written to reach, and what is reached, for each number of threads."""
    threads = sorted({case["threads"] for case in cases if case["threads"]}, key=int)
    columns = [_reached([case for case in cases if case["threads"] == count]) for count in threads]
    heads = [f"{count} thread{'s' * (count != '1')}:" for count in threads]
    rows = [[*same[0][:2], *(figure for *_, figure in same)] for same in zip(*columns, strict=True)]
    if not any(any(row[2:]) for row in rows):
        return []
    return ["", "## Goals", "", *paragraph(AIM), "", *table(["beside", "wanted:", *heads], rows)]


AIM = """Times as fast as others, and the time of our own layer with an option by that without, of layers over several
steps, both passes' and inference: what the loop in C was written to reach, and geometric means, lowest to highest, of
what is. [What bounds it](../backends.md#on-a-cpu) says why some are missed."""


def _reached(cases: Sequence[Case]) -> list[tuple[str, str, str]]:
    """Beside what, what is wanted, and geometric means, lowest to highest, but for the lowest; layers take several
    steps."""
    kinds, others = _kinds(cases), _others_of(cases)
    layers = {name: [case for case in kinds[name] if int(case["T"]) > 1] for name in ("LSTM", "GRU", "RNN")}
    costs = [(case["option"], cost) for case, cost in against_default(cases) if case["stepwise"] not in STEP_BY_STEP]
    normed = ("layer_norm", "rms_norm")
    lowest = min(_ratios(layers["LSTM"]), default=None)

    def of_batch(name: str, batch: str) -> str:
        return _figure(_ratios(case for case in layers[name] if case["B"] == batch))

    return [
        ("torch.nn.LSTM, its lowest", "≥ 1.0×", "" if lowest is None else f"{lowest:.2f}×"),
        ("torch.nn.LSTM, B 1", "≥ 2×", of_batch("LSTM", "1")),
        ("torch.nn.GRU, B 32", "≥ 2.5×", of_batch("GRU", "32")),
        ("torch.nn.GRU, B 1", "≥ 8×", of_batch("GRU", "1")),
        ("torch.nn.RNN", "≥ 1.5×", _figure(_ratios(layers["RNN"]))),
        ("ONNX Runtime", "≥ 1.0×", _figure(others[OF_ONNX])),
        ("a loop by hand, with an option", "≥ 3×", _figure(others[OF_HANDS])),
        ("torch.nn's cells", "≥ 0.8×", _figure(_ratios(kinds[CELLS]))),
        (
            "our own default, with an option",
            "≤ 1.15×",
            _figure([cost for option, cost in costs if option not in normed]),
        ),
        ("with a normalisation", "≤ 1.5×", _figure([cost for option, cost in costs if option in normed])),
    ]


def _kinds(cases: Sequence[Case]) -> dict[str, list[Case]]:
    """By what is measured: layers as torch.nn has them, and single cells with and without options."""
    plain = [case for case in cases if not case["option"] and case["stepwise"] not in STEP_BY_STEP]
    layers = {name: [case for case in plain if case["cell"] == name] for name in ("LSTM", "GRU", "RNN")}
    return layers | {CELLS: [case for case in cases if case["stepwise"] == "True"]}


def _within(cases: Iterable[Case], direction: str, batch: str) -> list[Case]:
    return [case for case in cases if case["direction"] == direction and BATCHES[batch](int(case["B"]))]


def _ratios(cases: Iterable[Case]) -> list[float]:
    """torch.nn's time, without the option where there is one, by ours."""
    return [found for case in cases for found in _beside(case, TORCH)]


def _beside(case: Case, variant: str) -> list[float]:
    """The time of a variant by that of ours; nothing where one of them has none."""
    rows: list[Row] = [row for row in case.rows if row["variant"] == variant and timed(row)]
    return [per_step(row) / per_step(case.ours) for row in rows if timed(case.ours)]


def _figure(found: Sequence[float]) -> str:
    return f"{geometric_mean(found):.2f}× ({min(found):.2f} to {max(found):.2f})" if found else ""


def _others(cases: Sequence[Case]) -> list[list[object]]:
    return [[name, _figure(found), len(found)] for name, found in _others_of(cases).items() if found]


def _others_of(cases: Sequence[Case]) -> dict[str, list[float]]:
    whole = [case for case in cases if case["stepwise"] not in STEP_BY_STEP]
    optional = [case for case in whole if case["option"]]
    return {
        OF_HANDS: [f for case in optional for f in _beside(case, BY_HAND)],
        "the same with its step compiled by Inductor": [f for case in optional for f in _beside(case, COMPILED)],
        OF_ONNX: [f for case in whole for f in _beside(case, ONNXRUNTIME)],
        "our own layer without the option": [1 / cost for _, cost in against_default(whole)],
    }
