# SPDX-License-Identifier: Apache-2.0
"""What explain says of a call: what runs it, on this device or another, what it costs, and why."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import gpu_rnn
from gpu_rnn import devices
from tests.support.profiling import operations

pytestmark = pytest.mark.usefixtures("fresh_choices")

RUNS: list[tuple[gpu_rnn.Recurrent, str, list[str]]] = [
    (gpu_rnn.LSTM(2, 3), "aten", ["aten::lstm"]),
    (gpu_rnn.LSTM(2, 3, activation="relu"), "step", ["gpu_rnn::step_forward", "gpu_rnn::step_backward"]),
    (gpu_rnn.GRU(2, 3, backend="step"), "step", ["gpu_rnn::step_forward", "gpu_rnn::step_backward"]),
    (gpu_rnn.GRU(2, 3, reset_after=False), "step", ["gpu_rnn::step_forward", "gpu_rnn::step_backward"]),
]


@pytest.mark.parametrize(("layer", "backend", "events"), RUNS, ids=lambda v: v if isinstance(v, str) else None)
def test_what_is_explained_is_what_runs(layer: gpu_rnn.Recurrent, backend: str, events: list[str]) -> None:
    x = torch.randn(4, 3, 2)
    assert gpu_rnn.explain(layer, x).chosen == backend
    ran = operations(lambda: layer(x)[0].sum().backward())
    assert [name for name in ran if name in {*events, "gpu_rnn::reference_forward", "aten::lstm"}] == events


@pytest.mark.parametrize("device", [*devices.DEVICES, "h100", "H100 SXM 80GB", "cpu", None])
def test_explain_for_a_device(device: str | None) -> None:
    names = ["resident", "group", "aten", "native", "step", "reference"]
    layer = gpu_rnn.LSTM(64, 64, activation="softsign")
    explanation = gpu_rnn.explain(layer, torch.empty(100, 32, 64, device="meta"), device=device)
    assert [row.backend for row in explanation.rows if row.backend in names] == names
    assert [row.backend for row in explanation.rows if row.chosen] == [explanation.chosen]
    here = replace(devices.CPU, sms=torch.get_num_threads())
    expected = devices.describe(device) if device else here
    assert explanation.problem.device == expected
    assert explanation.chosen == ("group" if expected.is_gpu else "step")
    for row in explanation.rows:
        assert row.runs == (row.predicted_us is not None) and (row.runs or row.reasons)
        assert row.predicted_us is None or row.predicted_us > 0
    head, columns, *lines, foot = str(explanation).splitlines()
    assert (
        head == f"lstm: T 100, B 32, input 64, hidden 64, layers 1, float32, forward and backward, on {expected.name}"
    )
    assert "µs/step" in foot and "µs/step" in columns
    figure = r"\d+\.\d\d  (simulated|modelled)" if expected.is_gpu else r"\d+\.\d\d  fitted"
    assert re.search(rf"^{explanation.chosen} +chosen *{figure}$", "\n".join(lines), re.M)
    assert expected.is_gpu or re.search(
        r"fitted to benchmarks/results/.*, on (such a|another) processor; gpu_rnn.tune measures this one$", foot
    )
    assert re.search(r"^aten +no +ATen has LSTM, GRU and RNN", "\n".join(lines), re.M)


def test_explain_shows_the_bound_of_each_pass() -> None:
    layer, x = (
        gpu_rnn.LSTM(1024, 1024, dtype=torch.bfloat16),
        torch.empty(100, 64, 1024, dtype=torch.bfloat16, device="meta"),
    )
    training = gpu_rnn.explain(layer, x, device="H100")
    with torch.no_grad():
        inference = gpu_rnn.explain(layer, x, device="H100")
    assert training.floor_us > inference.floor_us == pytest.approx(1.5, abs=0.05)
    assert re.search(r"^bound +1\.5\d  no loop that keeps W_hh on chip takes less", str(inference), re.M)
    assert gpu_rnn.explain(layer, x).floor_us is None  # on a CPU
    assert gpu_rnn.explain(gpu_rnn.LSTM(8, 4096), torch.empty(9, 1, 8), device="H100").floor_us is None


def test_explain_reads_the_layer_and_the_call() -> None:
    layer = gpu_rnn.GRU(3, 5, 2, bidirectional=True, batch_first=True)
    described = gpu_rnn.explain(layer, torch.empty(7, 4, 3)).problem
    assert (described.T, described.B, described.I, described.H) == (4, 7, 3, 5)
    assert (described.N, described.layers, described.direction) == (2, 2, "training")
    assert gpu_rnn.explain(layer, torch.empty(4, 3)).problem.B == 1
    assert gpu_rnn.explain(layer).problem.T == 100
    with torch.no_grad():
        assert gpu_rnn.explain(layer).problem.direction == "inference"
    forced = gpu_rnn.explain(gpu_rnn.GRU(3, 5, reset_after=False, backend="aten"))
    assert forced.chosen is None and "chosen" not in str(forced)
    assert gpu_rnn.explain(gpu_rnn.GRU(3, 5, backend="reference")).chosen == "reference"


@pytest.mark.parametrize("batch_first", (False, True))
def test_a_jagged_input_is_explained_as_its_padded_call(batch_first: bool) -> None:
    layer = gpu_rnn.GRU(3, 5, bidirectional=True, batch_first=batch_first)
    rows = torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(7, 3), torch.zeros(0, 3)], layout=torch.jagged)
    padded = torch.empty(3, 7, 3) if batch_first else torch.empty(7, 3, 3)
    assert gpu_rnn.explain(layer, rows).problem == gpu_rnn.explain(layer, padded, lengths=True).problem


def test_explain_refuses() -> None:
    with pytest.raises(TypeError, match="a described device is a name, such as 'H100', not of type int"):
        gpu_rnn.explain(gpu_rnn.LSTM(2, 3), device=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'cuda:99' is not here"):
        gpu_rnn.explain(gpu_rnn.LSTM(2, 3), device=torch.device("cuda:99"))
    with pytest.raises(TypeError, match=r"x should be a strided tensor, got a torch.sparse_coo one"):
        gpu_rnn.explain(gpu_rnn.LSTM(2, 3), torch.zeros(4, 2).to_sparse())
    with pytest.raises(ValueError, match=r"no description of a device 'H1000'; described are A100, .*H100.* and CPU"):
        gpu_rnn.explain(gpu_rnn.LSTM(2, 3), device="H1000")
    with pytest.raises(TypeError, match=r"such as gpu_rnn.LSTM, not torch.nn.LSTM"):
        gpu_rnn.explain(torch.nn.LSTM(2, 3))
    with pytest.raises(TypeError, match=r"not gpu_rnn.LSTMCell: a cell runs as its layer does with one step"):
        gpu_rnn.explain(gpu_rnn.LSTMCell(2, 3))
    with pytest.raises(RuntimeError, match="Expected 2, got 5"):
        gpu_rnn.explain(gpu_rnn.LSTM(2, 3), torch.empty(4, 1, 5, device="meta"), device="H100")


X = torch.empty(6, 3, 4)
REFUSED: dict[str, tuple[torch.Tensor, dict[str, Any]]] = {
    "dtype": (X.double(), {}),
    "features": (torch.empty(6, 3, 5), {}),
    "a mask's shape": (X, {"mask": torch.ones(5, 3, dtype=torch.bool)}),
    "a mask of numbers": (X, {"mask": torch.ones(6, 3)}),
    "an unbatched mask": (X[:, 0], {"mask": torch.ones(5, dtype=torch.bool)}),
    "resets of NumPy": (X, {"resets": np.ones((6, 2), dtype=bool)}),
    "too few lengths": (X, {"lengths": [1, 2]}),
    "a length beyond": (X, {"lengths": [1, 2, 7]}),
    "states": (X, {"hx": (torch.empty(1, 3, 6), torch.empty(1, 3, 5))}),
    "an unbatched state": (X, {"hx": (torch.empty(1, 5), torch.empty(1, 5))}),
    "one state": (X, {"hx": torch.empty(1, 3, 5)}),
    "values without resets": (X, {"reset_state": (torch.empty(1, 3, 5), torch.empty(1, 3, 5))}),
}


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_what_the_layer_refuses_is_refused_in_its_words(name: str, batch_first: bool) -> None:
    layer = gpu_rnn.LSTM(4, 5, batch_first=batch_first)
    x, call = REFUSED[name]
    if batch_first and x.dim() == 3:
        x = x.transpose(0, 1)
        call = {key: np.swapaxes(value, 0, 1) if key in ("mask", "resets") else value for key, value in call.items()}
    with pytest.raises((TypeError, ValueError, RuntimeError)) as said:
        layer(x, **call)
    for place in ("cpu", "meta"):
        with pytest.raises(type(said.value), match=f"^{re.escape(str(said.value))}$"):
            gpu_rnn.explain(layer, x.to(place), **call)


def test_true_stands_for_any_argument_of_a_call() -> None:
    states = (torch.empty(1, 3, 5),) * 2
    for call in ({"reset_state": True}, {"resets": True, "reset_state": states}, {"hx": True, "mask": True}):
        assert gpu_rnn.explain(gpu_rnn.LSTM(4, 5), X, **call).chosen
    meta = {"lengths": torch.empty(3, dtype=torch.int64, device="meta")}
    assert gpu_rnn.explain(gpu_rnn.LSTM(4, 5), X, **meta).problem.lengths


def test_a_call_beyond_the_memory_of_a_device_has_no_plan() -> None:
    wide = gpu_rnn.LSTM(8, 99_999_999, device="meta")
    with pytest.raises(ValueError, match=r"H100 SXM 80GB has 80 GiB of memory, and the weights, .* take 149,0.* GiB"):
        gpu_rnn.explain(wide, torch.empty(100, 1, 8, device="meta"), device="H100")
    assert gpu_rnn.explain(wide, torch.empty(100, 1, 8, device="meta"), device="CPU").chosen


def test_a_layer_without_memory_is_explained_for_a_device_that_is_here() -> None:
    layer, x = gpu_rnn.LSTM(4, 5), torch.empty(6, 3, 4)
    without = gpu_rnn.explain(gpu_rnn.LSTM(4, 5, device="meta"), x.to("meta"), device=torch.device("cpu"))
    assert without == gpu_rnn.explain(layer, x) != gpu_rnn.explain(layer, x.to("meta"))  # where native cannot run
    with pytest.raises(ValueError, match=r"CPU has .* those grow with T and B"):
        gpu_rnn.explain(layer, torch.empty(10**9, 10**3, 4, device="meta"), device=torch.device("cpu"))


def test_explain_takes_packed_input() -> None:
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(4, 3), torch.randn(2, 3)])
    found = gpu_rnn.explain(gpu_rnn.LSTM(3, 5, batch_first=True), packed)
    assert (found.problem.T, found.problem.B, found.problem.packed) == (4, 2, True)
    assert found.chosen == "aten"
    assert gpu_rnn.explain(gpu_rnn.LSTM(3, 5, activation="relu"), packed).chosen == "step"


def test_a_figure_says_what_it_is() -> None:
    layer, x = gpu_rnn.LSTM(768, 768, dtype=torch.float16, device="meta"), torch.empty(1024, 16, 768, device="meta")
    found = gpu_rnn.explain(layer, x.half(), device="H100")
    sources = {row.backend: row.source for row in found.rows if row.runs}
    assert sources == {"group": "simulated", "aten": "published", "step": "modelled", "reference": "modelled"}
    predicted = {row.backend: row.predicted_us for row in found.rows}
    assert 5.07 <= predicted["aten"] <= 5.07 * 1.1  # and what the products over all steps take
    assert re.search(r"^group +chosen +\d\.\d\d  simulated$", str(found), re.M)
    other = gpu_rnn.explain(gpu_rnn.LSTM(768, 768, clip=3.0, dtype=torch.float16), x.half(), device="H100")
    assert {row.source for row in other.rows if row.runs} == {"modelled"}


def test_what_a_backend_by_name_does_is_said() -> None:
    x = torch.empty(9, 2, 8)
    runs, raises = (str(gpu_rnn.explain(gpu_rnn.LSTM(8, 8, backend=name), x)) for name in ("step", "group"))
    assert "backend='step' was asked for: the call runs on it" in runs
    assert "backend='group' was asked for: the call raises ValueError" in raises
    assert "was asked for" not in str(gpu_rnn.explain(gpu_rnn.LSTM(8, 8), x))


def test_a_preference_of_the_environment_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU_RNN_BACKEND", "step")
    assert "GPU_RNN_BACKEND prefers step" in str(gpu_rnn.explain(gpu_rnn.LSTM(8, 8), torch.empty(9, 2, 8)))


def test_many_lines_of_a_compiler_stay_in_the_table() -> None:
    found = gpu_rnn.explain(gpu_rnn.LSTM(8, 8), torch.empty(9, 2, 8))
    said = "\n".join(["it does not compile:", "", *(f"error {k}" for k in range(30))])
    table = str(replace(found, rows=(replace(found.rows[0], reasons=(said, "another")), *found.rows[1:]))).splitlines()
    start = next(k for k, line in enumerate(table) if line.startswith("resident"))
    assert table[start].endswith("it does not compile:")
    lines = table[start + 1 : start + 6]
    assert all(line.startswith(" " * 41) for line in lines) and [line.strip() for line in lines] == [
        "error 0", "error 1", "error 2", "… and 27 lines more in rows[…].reasons", "another",
    ]  # fmt: skip
    assert table[start + 6].startswith("group")


def test_a_bound_of_nothing_is_not_printed() -> None:
    layer = gpu_rnn.LSTM(8, 8, dtype=torch.bfloat16)
    with torch.no_grad():
        found = gpu_rnn.explain(layer, torch.empty(9, 2, 8, dtype=torch.bfloat16), device="H100")
    assert found.floor_us < 0.005 and "bound" not in str(found)
