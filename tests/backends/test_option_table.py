# SPDX-License-Identifier: Apache-2.0
"""Which option runs on which backend: the table of docs/options.md, and that a GPU never meets the reference.

``python -m tests.backends.test_option_table`` writes the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch

import gpu_rnn
from gpu_rnn import devices, memo
from gpu_rnn.backends.group import nvrtc
from gpu_rnn.backends.problem import Problem
from gpu_rnn.dispatch import choice
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "options.md"
MARKS = "<!-- options table -->\n", "<!-- end of options table -->"
NAMES = [name for name in choice.BACKENDS if name != "reference"]  # which runs everything

# Option -> (layer, arguments of the constructor, arguments of the call).
OPTIONS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "none": ("LSTM", {}, ()),
    "`activation`, `recurrent_activation`": ("LSTM", {"activation": "softsign"}, ()),
    "`reset_after=False`": ("GRU", {"reset_after": False}, ()),
    "`peephole`": ("LSTM", {"peephole": True}, ()),
    "`clip`": ("LSTM", {"clip": 3.0}, ()),
    "`proj_size`": ("LSTM", {"proj_size": 16}, ()),
    "`mask`": ("LSTM", {}, ("mask",)),
    "`lengths`": ("LSTM", {}, ("lengths",)),
    "`resets`": ("LSTM", {}, ("resets",)),
    "`resets` with `reset_state`": ("LSTM", {}, ("resets", "reset_state")),
    "`recurrent_dropout`": ("LSTM", {"recurrent_dropout": 0.5}, ()),
    "`recurrent_dropout_per_gate`": ("LSTM", {"recurrent_dropout": 0.5, "recurrent_dropout_per_gate": True}, ()),
    "`zoneout`": ("LSTM", {"zoneout": (0.0, 0.1)}, ()),
    "`weight_drop`": ("LSTM", {"weight_drop": 0.5}, ()),
    "`layer_norm`": ("LSTM", {"layer_norm": True}, ()),
    "`rms_norm`": ("LSTM", {"rms_norm": True}, ()),
    "`heads`": ("LSTM", {"heads": 4}, ()),
    '`save="states"`': ("LSTM", {"save": "states"}, ()),
    "`return_all_states`": ("LSTM", {}, ("return_all_states",)),
    "`bidirectional`, `num_layers`": ("LSTM", {"bidirectional": True, "num_layers": 2}, ()),
    "a `Recurrence` of one's own": ("Recurrent", {}, ()),
}


def problem(
    layer: str, constructor: dict[str, Any], call: tuple[str, ...], dtype: torch.dtype = torch.bfloat16
) -> Problem:
    """A call in training on an H100, of a size that every backend takes: an option is then all that speaks against
    it."""
    options = {"device": "meta", "dtype": dtype, **constructor}
    first = (gpu_rnn.cells.slstm(),) if layer == "Recurrent" else ()
    made = getattr(gpu_rnn, layer)(*first, 64, 64, **options)
    x = torch.empty(100, 64, 64, device="meta", dtype=dtype)
    return gpu_rnn.explain(made, x, device="H100", **dict.fromkeys(call, True)).problem


def against(name: str, given: Problem) -> list[str]:
    """A backend's reasons in either pass; without those that a plain call would have here too, as of a missing
    package."""
    plain = problem(*OPTIONS["none"])
    passes = [
        [
            reason
            for d in ("training", "backward")
            for reason in choice.BACKENDS[name].unsupported(replace(p, direction=d))
        ]
        for p in (given, plain)
    ]
    return [reason for reason in dict.fromkeys(passes[0]) if reason not in passes[1]]


def table() -> str:
    lines = [" | ".join(["| option", *(f"`{name}`" for name in NAMES)]) + " |", "|---" * (len(NAMES) + 1) + "|"]
    for option, given in OPTIONS.items():
        if option == "none":
            continue
        cells = ["; ".join(against(name, problem(*given))) or "runs" for name in NAMES]
        lines.append(" | ".join([f"| {option}", *cells]) + " |")
    return "\n".join(lines) + "\n"


def test_the_table_on_the_page_is_what_the_backends_say() -> None:
    _, _, rest = PAGE.read_text().partition(MARKS[0])
    assert rest.partition(MARKS[1])[0] == table(), "python -m tests.backends.test_option_table writes it"


def grid() -> Iterator[tuple[str, Problem]]:
    """Every option alone and every pair that one layer can have, in three dtypes."""
    for first, second in combinations(OPTIONS, 2):
        (layer, own, call), (other, more, others) = OPTIONS[first], OPTIONS[second]
        layers = {layer, other} - {"LSTM"}
        only_lstm = {"peephole", "proj_size", "zoneout"} & {*own, *more}
        if (
            len(layers) > 1
            or (layers and only_lstm)
            or {"layer_norm", "rms_norm"} <= {*own, *more}
            or ("Recurrent" in layers and {"activation", "clip"} & {*own, *more})
        ):
            continue
        both = layers.pop() if layers else "LSTM"
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            yield f"{first} and {second} in {dtype}", problem(both, {**own, **more}, (*call, *others), dtype)


@pytest.fixture
def without_cupy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(nvrtc, "unavailable", lambda: "CuPy is not installed")
    monkeypatch.setattr(devices, "is_described", lambda device: False)
    memo.clear("gpu_rnn.dispatch")
    yield
    memo.clear("gpu_rnn.dispatch")


@pytest.mark.usefixtures("without_cupy")
def test_no_combination_on_a_gpu_comes_to_the_reference() -> None:
    """With CuPy there is a backend more, which builds a kernel before it is chosen."""
    seen = 0
    for words, given in grid():
        for direction in ("inference", "training"):
            chosen = choice.select(replace(given, direction=direction))
            assert chosen != "reference", words
            seen += 1
    assert seen > 500


def main() -> None:
    before, _, rest = PAGE.read_text().partition(MARKS[0])
    PAGE.write_text(before + MARKS[0] + table() + MARKS[1] + rest.partition(MARKS[1])[2])


if __name__ == "__main__":
    main()
