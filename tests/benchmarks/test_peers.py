# SPDX-License-Identifier: Apache-2.0
"""Other libraries beside ours: their layouts, by plain stand-ins with the signatures of flashrnn 1.0.8 and torchrl
0.14.1.

The stand-ins compute the formulas in the peers' own layouts, so that a wrong conversion gives wrong numbers.
"""

from __future__ import annotations

import csv
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import run
from benchmarks.cases import comparison, peers, problems
from benchmarks.cases.names import BY_HAND, ON_A_CPU, ON_A_GPU, ONNXRUNTIME
from benchmarks.cases.variants import Case
from benchmarks.measuring import checking

CPU = torch.device("cpu")


def flashrnn(
    Wx: Tensor,  # (B, T, G, N, D), gates i, f, z, o
    R: Tensor,  # (G, N, D, D), rows: units of the gate
    b: Tensor,  # (G, N, D)
    states: Tensor | None = None,
    function: str = "lstm",
    config: Any = None,
    backend: str = "cuda_fused",
    dtype: str = "bfloat16",
) -> tuple[Tensor, Tensor]:
    """(S, B, T, N, D) and (S, B, 1, N, D), h first."""
    assert (function, states, config) == ("lstm", None, None)
    assert Wx.dtype == R.dtype == b.dtype == getattr(torch, dtype)
    h = c = Wx.new_zeros(Wx.shape[0], *Wx.shape[3:])
    steps = []
    for x in Wx.unbind(1):
        i, f, z, o = (x + torch.einsum("gnde,bne->bgnd", R, h) + b).unbind(1)
        c = f.sigmoid() * c + i.sigmoid() * z.tanh()
        h = o.sigmoid() * c.tanh()
        steps.append(torch.stack([h, c]))
    found = torch.stack(steps, 2)
    return found, found[:, :, -1:]


def lstm_triton(
    x: Tensor,  # (B, T, I)
    hidden: Tensor,  # (B, T, H), what h is set to where is_init, and at first
    cell: Tensor,
    w_ih: Tensor,  # (4 H, I), gates i, f, g, o
    w_hh: Tensor,
    b_ih: Tensor,
    b_hh: Tensor,
    is_init: Tensor,  # (B, T)
    compute_dtype: torch.dtype = torch.float32,
    *,
    recompute: bool = False,
    input_precision: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h and c of all steps (B, T, H), and the last (B, H)."""
    assert input_precision in ("tf32", "ieee") and x.is_contiguous() and hidden.shape == (*is_init.shape, w_hh.shape[1])
    h, c, steps = hidden[:, 0], cell[:, 0], []
    for t in range(x.shape[1]):
        new = is_init[:, t, None]
        h, c = torch.where(new, hidden[:, t], h), torch.where(new, cell[:, t], c)
        i, f, g, o = (x[:, t] @ w_ih.T + b_ih + h @ w_hh.T + b_hh).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        steps.append(torch.stack([h, c]))
    every_h, every_c = torch.stack(steps, 2)
    return every_h, every_c, h, c


def gru_triton(
    x: Tensor,
    hidden: Tensor,
    w_ih: Tensor,  # (3 H, I), gates r, z, n
    w_hh: Tensor,
    b_ih: Tensor,
    b_hh: Tensor,
    is_init: Tensor,
    compute_dtype: torch.dtype = torch.float32,
    *,
    recompute: bool = False,
    input_precision: str | None = None,
) -> tuple[Tensor, Tensor]:
    """h of all steps (B, T, H), and the last (B, H)."""
    assert input_precision in ("tf32", "ieee") and x.is_contiguous() and hidden.shape == (*is_init.shape, w_hh.shape[1])
    h, steps = hidden[:, 0], []
    for t in range(x.shape[1]):
        h = torch.where(is_init[:, t, None], hidden[:, t], h)
        (r, z, n), (rh, zh, nh) = (x[:, t] @ w_ih.T + b_ih).chunk(3, 1), (h @ w_hh.T + b_hh).chunk(3, 1)
        r, z = (r + rh).sigmoid(), (z + zh).sigmoid()
        h = (1 - z) * (n + r * nh).tanh() + z * h
        steps.append(h)
    return torch.stack(steps, 1), h


def install(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    """A module of that name, and those around it."""
    parts = name.split(".")
    for k in range(1, len(parts) + 1):
        path = ".".join(parts[:k])
        module = ModuleType(path)
        module.__spec__ = ModuleSpec(path, None)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, path, module)
        if k > 1:
            setattr(sys.modules[".".join(parts[: k - 1])], parts[k - 1], module)
    vars(module).update(contents)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-ins, taken to run on the CPU."""
    install(monkeypatch, "flashrnn", flashrnn=flashrnn)
    kernels = {"lstm_triton": lstm_triton, "gru_triton": gru_triton}
    install(monkeypatch, "torchrl.modules.tensordict_module._rnn_triton", **kernels)
    monkeypatch.setattr(peers, "runs_on", lambda device, name: True)
    monkeypatch.setattr(peers, "_flashrnn_kernel", lambda: "cuda_fused")


SIZES: dict[str, Any] = {"T": 9, "B": 3, "H": 16}
BOTH = {*ON_A_GPU}
CASES = [
    (problems.named("LSTM", **SIZES, I=7), "fp32", BOTH),
    (problems.named("LSTM", **SIZES, I=7), "ieee", {"torchrl"}),
    (problems.named("LSTM", **SIZES, I=7), "bf16", {"flashrnn"}),
    (problems.named("LSTM", **SIZES, I=7, layers=3), "fp32", BOTH),
    (problems.named("LSTM", **SIZES, I=7, heads=3), "fp32", {"flashrnn"}),
    (problems.named("LSTM", **SIZES, I=7, heads=3, layers=2), "fp16", {"flashrnn"}),
    (problems.named("LSTM", **SIZES, I=7, option="resets"), "fp32", {"torchrl"}),
    (problems.named("GRU", **SIZES, I=7), "fp32", {"torchrl"}),
    (problems.named("GRU", **SIZES, I=7, layers=2, option="resets"), "ieee", {"torchrl"}),
    (problems.named("LSTM", **SIZES, bidirectional=True), "fp32", set()),
    (problems.named("LSTM", **SIZES, option="mask"), "fp32", set()),
    (problems.named("RNN", **SIZES), "fp32", set()),
]


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("direction", problems.BOTH)
@pytest.mark.parametrize(("problem", "dtype", "taken"), CASES, ids=lambda value: getattr(value, "name", None))
def test_peers_compute_what_we_do_from_the_same_weights(
    problem: problems.Problem, dtype: str, taken: set[str], direction: str
) -> None:
    case = Case("tiny", problem, dtype, direction)
    compared = comparison.build(case, CPU, list(ON_A_GPU))
    side = compared.sides[-1]
    found = {variant.name: variant for variant in side.variants if variant.name != "torch.nn"}
    assert found.keys() == taken and compared.left_out.keys() == BOTH - taken
    exact = checking.exact(side.truth, side.inputs, 0)
    limits = checking.Limits(checking.precision(case, tensor_cores=False))
    for variant in found.values():
        errors = checking.errors(variant, side.inputs, exact, 0)
        assert all(error <= limits.allowed(variant.name, name) for name, error in errors.items()), (
            variant.name,
            errors,
        )
        assert variant.note


@pytest.mark.usefixtures("installed")
def test_what_a_peer_gets_wrong_is_a_row_and_no_failure_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def other_order(Wx: Tensor, R: Tensor, b: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        izfo = [0, 2, 1, 3]
        return flashrnn(Wx[:, :, izfo], R[izfo], b[izfo], **options)

    def cannot_be_built(*arguments: Any, **options: Any) -> Any:
        raise OSError("no ninja\nand more")

    monkeypatch.setattr(sys.modules["flashrnn"], "flashrnn", other_order)
    monkeypatch.setattr(sys.modules["torchrl.modules.tensordict_module._rnn_triton"], "lstm_triton", cannot_be_built)
    out = tmp_path / "rows.csv"
    arguments = "--device cpu --set tiny --dtype fp32 --trials 1 --direction forward --backend step,flashrnn,torchrl"
    assert run.main([*arguments.split(), "--out", str(out)]) == 0
    rows = {(row["problem"], row["variant"]): row for row in csv.DictReader(out.read_text().splitlines())}
    assert rows["LSTM-H16-I5-B3-T7", "flashrnn"]["status"] == "wrong"
    assert rows["LSTM-H16-I5-B3-T7", "torchrl"]["detail"] == "no ninja"
    right = rows["GRU-H16-I5-B3-T7", "torchrl"]
    assert right["status"] == "ok" and right["ratio"] and right["detail"] == "its Triton kernels"
    assert not right["predicted_us"] and not right["chosen"]
    said = capsys.readouterr().out
    assert said.count("without flashrnn: has a fused kernel for the LSTM only") == 1
    assert "torchrl FAILED no ninja" in said


def test_a_peer_that_is_not_there_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("tiny", problems.named("LSTM", **SIZES), "fp32", "forward")
    nothing = {"flashrnn": "needs an NVIDIA GPU", "torchrl": "needs an NVIDIA GPU"}
    assert comparison.build(case, CPU, list(ON_A_GPU)).left_out == nothing
    assert all("measured on a CPU" in peers._absent(name, [torch.nn.LSTM(1, 1, device="meta")]) for name in ON_A_CPU)
    assert comparison.build(case, CPU, ["step"]).left_out == {}
    monkeypatch.setattr(peers, "runs_on", lambda device, name: True)
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    assert "pip install flashrnn" in comparison.build(case, CPU, ["flashrnn"]).left_out["flashrnn"]
    install(monkeypatch, "torchrl.modules.tensordict_module")  # as before 0.13
    monkeypatch.setattr(peers, "find_spec", lambda name: True)
    assert "cannot import name" in comparison.build(case, CPU, ["torchrl"]).left_out["torchrl"]


BY_HAND_TOO = [problem for problem in problems.SETS["tiny-options"] if "per_gate" not in problem.option]


@pytest.mark.parametrize("direction", problems.BOTH)
@pytest.mark.parametrize("problem", BY_HAND_TOO, ids=lambda problem: problem.name)
def test_a_loop_by_hand_computes_every_option(problem: problems.Problem, direction: str) -> None:
    if direction not in problem.directions:
        return
    compared = comparison.build(Case("tiny-options", problem, "fp32", direction), CPU, [BY_HAND])
    side = compared.sides[-1]
    (variant,) = (each for each in side.variants if each.name == BY_HAND)
    errors = checking.errors(variant, side.inputs, checking.exact(side.truth, side.inputs, 3), 3)
    assert max(errors.values()) < 1e-4


class Session:
    """ONNX's own evaluator with the signature of onnxruntime 1.20's InferenceSession."""

    def __init__(self, model: bytes, settings: Any, providers: list[str]) -> None:
        from onnx import load_from_string
        from onnx.reference import ReferenceEvaluator

        assert settings.intra_op_num_threads == torch.get_num_threads() and providers == ["CPUExecutionProvider"]
        self.evaluator = ReferenceEvaluator(load_from_string(model))

    def run(self, names: None, given: dict[str, Any]) -> list[Any]:
        return self.evaluator.run(names, given)


@pytest.mark.parametrize("cell", ["GRU", "RNN"])  # of an LSTM the evaluator has no c at the end
def test_onnx_runtime_computes_what_we_do(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnx", reason="ONNX is not installed: pip install onnx")
    install(monkeypatch, "onnxruntime", InferenceSession=Session, SessionOptions=SimpleNamespace)
    case = Case("tiny", problems.named(cell, **SIZES, I=7), "fp32", "forward", torch.get_num_threads())
    (side,) = comparison.build(case, CPU, [ONNXRUNTIME]).sides
    (variant,) = (each for each in side.variants if each.name == ONNXRUNTIME)
    errors = checking.errors(variant, side.inputs, checking.exact(side.truth, side.inputs, 3), 3)
    assert max(errors.values()) < 1e-5
    left_out = comparison.build(replace(case, direction="training"), CPU, [ONNXRUNTIME]).left_out
    assert left_out == {ONNXRUNTIME: "runs inference only"}


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_streams_compute_what_one_by_one_does(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice: the second call begins anew."""
    names = ["step", BY_HAND]
    if cell == "GRU":  # of an LSTM the evaluator has no c at the end
        pytest.importorskip("onnx", reason="ONNX is not installed: pip install onnx")
        install(monkeypatch, "onnxruntime", InferenceSession=Session, SessionOptions=SimpleNamespace)
        names += [ONNXRUNTIME]
    problem = problems.named(cell, T=3, B=4, H=5, I=7, streams=True)
    case = Case("tiny", problem, "fp32", "forward", torch.get_num_threads())
    compared = comparison.build(case, CPU, [*names, "torch.compile"])
    (side,) = compared.sides
    assert problem.name == f"{cell}-H5-I7-streams-B4-T3"
    assert compared.left_out == {"torch.compile": "is not measured on streams"}
    assert [variant.name for variant in side.variants] == ["torch.nn", *names]
    for variant in side.variants * 2:
        errors = checking.errors(variant, side.inputs, checking.exact(side.truth, side.inputs, 3), 3)
        assert max(errors.values()) < 1e-5


@pytest.mark.parametrize(("width", "taken"), [(8, False), (16, True), (48, False), (64, True), (128, False)])
def test_without_a_compiler_flashrnn_runs_its_triton_kernel(
    width: int, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "flashrnn", flashrnn=flashrnn)
    monkeypatch.setattr(peers, "runs_on", lambda device, name: True)
    monkeypatch.setattr(peers.shutil, "which", lambda name: None)
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", None)
    case = Case("flashrnn", problems.named("LSTM", T=3, B=2, H=width), "bf16", "forward")
    compared = comparison.build(case, CPU, ["flashrnn"])
    notes = [variant.note for variant in compared.sides[0].variants if variant.name == "flashrnn"]
    assert notes == ["backend triton_fused"] * taken
    monkeypatch.setattr(peers.shutil, "which", lambda name: "/usr/local/cuda/bin/nvcc")
    assert comparison.build(case, CPU, ["flashrnn"]).left_out == {}
