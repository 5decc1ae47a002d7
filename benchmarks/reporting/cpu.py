# SPDX-License-Identifier: Apache-2.0
"""What results of a CPU come to: ours beside torch.nn by cell and batch, and beside what else people run there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import geometric_mean

from benchmarks.cases.names import BY_HAND, COMPILED, ONNXRUNTIME, TORCH
from benchmarks.reporting.results import DIRECTIONS, STEP_BY_STEP, Case, Row, against_default, per_step, timed
from benchmarks.reporting.tables import table

BATCHES = {"B 1": lambda batch: batch == 1, "B > 1": lambda batch: batch > 1}
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


def _kinds(cases: Sequence[Case]) -> dict[str, list[Case]]:
    """By what is measured: layers as torch.nn has them, and single cells with and without options."""
    plain = [case for case in cases if not case["option"] and case["stepwise"] not in STEP_BY_STEP]
    layers = {name: [case for case in plain if case["cell"] == name] for name in ("LSTM", "GRU", "RNN")}
    return layers | {"a cell called for each step": [case for case in cases if case["stepwise"] == "True"]}


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
    whole = [case for case in cases if case["stepwise"] not in STEP_BY_STEP]
    optional = [case for case in whole if case["option"]]
    kinds = {
        "a loop by hand of torch operations, with an option": [f for case in optional for f in _beside(case, BY_HAND)],
        "the same with its step compiled by Inductor": [f for case in optional for f in _beside(case, COMPILED)],
        "ONNX Runtime, inference": [f for case in whole for f in _beside(case, ONNXRUNTIME)],
        "our own layer without the option": [1 / cost for _, cost in against_default(whole)],
    }
    return [[name, _figure(found), len(found)] for name, found in kinds.items() if found]
