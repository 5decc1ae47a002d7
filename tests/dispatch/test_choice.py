# SPDX-License-Identifier: Apache-2.0
"""Which backend runs a call, what explain and debug say of it, and how a backend asked for by name refuses."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

import gpu_rnn
from gpu_rnn import cells, memo
from gpu_rnn.backends import resident
from gpu_rnn.backends.group import launch as group
from gpu_rnn.backends.group import nvrtc
from gpu_rnn.backends.problem import Problem
from gpu_rnn.backends.step import launch as step
from gpu_rnn.diagnostics import explanation
from gpu_rnn.dispatch import choice, lines
from tests.support import loops as support

COMPILE = nvrtc.compile_cubin
NAMES = ["resident", "group", "aten", "native", "step", "reference"]


pytestmark = pytest.mark.usefixtures("fresh_choices")


def problem(recurrence: gpu_rnn.Recurrence | None = None, device: str = "cpu", **options: Any) -> Problem:
    sizes = {"T": 100, "B": 32, "N": 1, "I": 64, "H": 64} | options
    return choice.described(Problem(recurrence=recurrence or cells.lstm(), **sizes), device)


def test_large_weights_are_read_at_each_step() -> None:
    """No prediction lies below the time in which memory delivers W_hh, where it does not stay on chip."""
    layer = gpu_rnn.LSTM(8, 8000, device="meta")
    found = gpu_rnn.explain(layer, torch.empty(10, 1, 8, device="meta"), device="H100")
    least = 1e6 * 4 * 4 * 8000**2 / (found.problem.device.memory_rate * 1e9)
    assert all(row.predicted_us >= 2 * least for row in found.rows if row.backend in ("aten", "step"))  # both passes


def test_order_of_the_table() -> None:
    assert [name for name in choice.BACKENDS if name in NAMES] == NAMES
    assert "aten" not in choice.LOOPS and choice.LOOPS[-1] == "reference"


half = {"dtype": torch.bfloat16}
CHOICES: list[tuple[Problem, str]] = [
    (problem(), "aten"),
    (problem(cells.gru(), direction="training", layers=3, reverse="01", N=2), "aten"),
    (problem(packed=True, lengths=True), "aten"),
    (problem(transforms=True), "step"),
    (problem(lengths=True), "step"),
    (problem(cells.lstm("relu")), "step"),
    (problem(cells.gru(reset_after=False), direction="training"), "step"),
    (problem(support.RECURRENCES["minimal"]), "step"),
    (problem(dtype=torch.complex64), "reference"),
    (problem(device="H100", **half), "resident"),
    (problem(device="H100", H=128, **half), "group"),
    (problem(cells.lstm("relu"), "A100", direction="training", **half), "group"),
    (problem(support.RECURRENCES["minimal"], "RTX 4090", H=512, **half), "group"),
    (problem(device="H100", T=1500, H=1024, I=1024, direction="training", **half), "group"),
    (problem(cells.gru(reset_after=False), "H100", **half), "resident"),
    (problem(cells.gru(reset_after=False), "H100", H=512, **half), "group"),
    (problem(cells.lstm("relu"), "H100", H=4096, **half), "step"),
    (problem(device="H100", H=4096, direction="training"), "aten"),
    (problem(device="H100", dtype=torch.complex64), "reference"),
]


@pytest.mark.parametrize(("given", "expected"), CHOICES, ids=lambda v: v if isinstance(v, str) else v.recurrence.name)
def test_the_cheapest_that_can_run(given: Problem, expected: str) -> None:
    """Without the interpreter, which lets the resident kernel run on a CPU."""
    assert choice.select(given) == expected
    able = [name for name, module in choice.BACKENDS.items() if not module.unsupported(given)]
    assert expected in able
    costs = {row.backend: row.predicted_us for row in choice.verdicts(given) if row.runs}
    assert list(costs) == able and costs[expected] == min(costs.values())


@pytest.mark.parametrize("direction", ["inference", "training", "backward"])
@pytest.mark.parametrize("options", [half, {}, {"H": 4096}, {"B": 1}], ids=str)
@pytest.mark.parametrize("cell", [cells.lstm(), cells.gru(reset_after=False)], ids=lambda cell: cell.name)
@pytest.mark.parametrize("device", ["cpu", "H100", "A100"])
def test_every_model_adds_so_much_for_each_step(
    device: str, cell: gpu_rnn.Recurrence, options: dict[str, Any], direction: str
) -> None:
    """So a new T asks no model, and what can run does not depend on it. One step may be a matter of its own."""
    one, two, long = (problem(cell, device, T=steps, direction=direction, **options) for steps in (1, 2, 777))
    single, candidates = (choice._Candidates(each, tuple(choice.BACKENDS)) for each in (one, two))
    assert single.able == candidates.able
    for name in single.able:
        assert single.seconds(1)[name] == pytest.approx(choice.total_cost(one, name), rel=1e-9)
    assert candidates.able == [name for name, module in choice.BACKENDS.items() if not module.unsupported(long)]
    for name in candidates.able:
        assert candidates.seconds(777)[name] == pytest.approx(choice.total_cost(long, name), rel=1e-9)
        asked = lines.way(lines.like(long), name).alone.at(777)
        assert asked == pytest.approx(choice.BACKENDS[name].cost(long), rel=1e-9)


def test_the_choice_follows_costs_and_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem()
    monkeypatch.setattr(step, "cost", lambda problem, constants: 0.0)
    assert choice.select(given) == "step"
    memo.clear("gpu_rnn.dispatch")
    monkeypatch.setattr(step, "unsupported", lambda problem: ["broken"])
    assert choice.select(given) == "aten"
    assert choice.select(given, among=choice.LOOPS) == "reference"


def test_in_training_both_passes_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop with a free forward pass is not chosen for its backward pass, which may run on another loop."""
    costs = {"inference": 0.0, "training": 0.0, "backward": 1e9}
    monkeypatch.setattr(step, "cost", lambda problem, constants: costs[problem.direction])
    assert choice.select(problem(cells.lstm("relu"))) == "step"
    training = problem(cells.lstm("relu"), direction="training")
    assert choice.select(replace(training, direction="backward")) == "reference"
    predicted = {row.backend: row.predicted_us for row in choice.verdicts(training)}
    assert predicted["step"] == pytest.approx(predicted["reference"], rel=0.9)


REASONS: list[tuple[str, Problem, list[str]]] = [
    ("aten", problem(cells.lstm("relu")), ["torch.nn's activations"]),
    (
        "aten",
        problem(cells.slstm(), transforms=True, lengths=True),
        ["not this slstm", "torch.func", "PackedSequence"],
    ),
    ("aten", problem(dtype=torch.complex64), ["real numbers only"]),
    ("resident", problem(), ["needs an NVIDIA GPU, not cpu"]),
    (
        "resident",
        problem(cells.gru(reset_after=False), proj_size=3),
        ["NVIDIA GPU", "proj_size"],
    ),
    ("resident", problem(device="H100", H=1024), ["with 1024 units of lstm"]),
    ("group", problem(cells.gru(reset_after=False), proj_size=3), ["NVIDIA GPU", "proj_size"]),
    ("group", problem(device="H100", H=4096), ["fits up to H = "]),
    ("resident", problem(device="H100", norm=True), ["does not take layer normalisation"]),
    ("resident", problem(device="A100", dtype=torch.float64), ["not float64"]),
    ("step", problem(dtype=torch.complex128), ["complex numbers run on the reference only"]),
]


@pytest.mark.parametrize(("backend", "given", "reasons"), REASONS)
def test_a_backend_by_name_refuses_with_every_reason(backend: str, given: Problem, reasons: list[str]) -> None:
    with pytest.raises(ValueError, match=f"backend='{backend}' cannot run this call") as caught:
        choice.select(given, backend)
    listed = re.findall(r"^  - (.*)$", str(caught.value), re.M)
    assert listed == choice.BACKENDS[backend].unsupported(given)
    assert all(any(reason in line for line in listed) for reason in reasons) and len(listed) >= len(reasons)


def test_layers_refuse_in_the_same_words() -> None:
    x = torch.randn(4, 3, 2)
    with pytest.raises(ValueError, match=r"(?s)backend='aten' cannot run.*not this gru_reset_before"):
        gpu_rnn.GRU(2, 3, reset_after=False, backend="aten")(x)
    with pytest.raises(ValueError, match=r"(?s)backend='resident' cannot run.*needs an NVIDIA GPU.*backend='auto'"):
        gpu_rnn.LSTM(2, 3, backend="resident")(x)
    with pytest.raises(
        ValueError, match="backend must be 'auto' or one of resident, group, aten, native, step, reference, got 'cudnn'"
    ):
        gpu_rnn.LSTM(2, 3, backend="cudnn")(x)


def test_a_described_device_has_what_is_not_installed_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same is chosen, and the last line says what is missing here."""
    layer = gpu_rnn.LSTM(64, 512, dtype=torch.bfloat16)
    x = torch.empty(100, 32, 64, dtype=torch.bfloat16, device="meta")
    everything = gpu_rnn.explain(layer, x, device="H100")
    said = str(everything)
    assert everything.chosen == "group" and "Here" not in said
    memo.clear("gpu_rnn.dispatch")
    monkeypatch.setattr(nvrtc, "unavailable", lambda: f"CuPy is not installed: {nvrtc.INSTALL}")
    monkeypatch.setattr(nvrtc, "compile_cubin", lambda source, arch: pytest.fail("there is nothing to compile with"))
    group.fit.cache_clear()
    nothing = gpu_rnn.explain(layer, x, device="H100")
    assert nothing.rows == everything.rows
    *table, last = str(nothing).splitlines()
    assert table == said.splitlines()
    assert last.startswith("A described device has Triton and CuPy. Here CuPy is not installed: pip install")
    for module in (resident, explanation):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert gpu_rnn.explain(layer, x, device="H100").rows == everything.rows
    assert "Here Triton is not installed (it exists for Linux only); CuPy is" in str(nothing)


def test_without_cupy_the_group_kernel_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device at hand, which a driver names."""
    monkeypatch.setattr(nvrtc, "unavailable", lambda: f"CuPy is not installed: {nvrtc.INSTALL}")
    described = problem(device="H100", **half)
    given = replace(described, device=replace(described.device, name="NVIDIA H100 80GB HBM3"))
    verdicts = {row.backend: row for row in choice.verdicts(given)}
    assert verdicts["resident"].chosen and not verdicts["group"].runs
    assert verdicts["group"].reasons[0].startswith("CuPy is not installed: pip install 'gpu-rnn[cuda12]'")


def test_a_kernel_that_does_not_build_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """For another backend in "auto", for an error by name, and none for other problems."""

    def refuse(source: str, arch: str) -> bytes:
        if "#define BACKWARD 1" in source:
            return b""
        raise nvrtc.CompileError(f"NVRTC 0.0 does not compile for {arch}:\nout of luck")

    monkeypatch.setattr(nvrtc, "compile_cubin", refuse)
    given = problem(device="H100", H=128, **half)
    assert choice.select(given) == "resident"
    assert group.unsupported(given) == ["NVRTC 0.0 does not compile for sm_90a:\nout of luck"]
    with pytest.raises(ValueError, match=r"(?s)backend='group' cannot run.*out of luck"):
        choice.select(given, "group")
    row = choice.verdicts(given, "group")[1]
    assert not row.runs and row.reasons == ("NVRTC 0.0 does not compile for sm_90a:\nout of luck",)
    monkeypatch.setenv("GPU_RNN_BACKEND", "group")
    assert choice.select(replace(given, B=7)) != "group"
    assert choice.select(replace(given, direction="backward")) == "group"


@pytest.mark.parametrize("backend", ["resident", "group", "native", "step"])
def test_a_backend_by_name_is_asked_for_both_passes(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot run backward is refused at the call, not after it."""
    module, refused = choice.BACKENDS[backend], "takes no gradients today"
    able = module.unsupported

    def unsupported(problem: Problem) -> list[str]:
        return [refused] if problem.direction == "backward" else able(problem)

    monkeypatch.setattr(module, "unsupported", unsupported)
    where = {"device": "cpu"} if backend == "native" else {"device": "H100", **half}
    given = problem(direction="training", **where)
    words = f"backend='{backend}' cannot run this call:\n  - in the backward pass: {refused}"
    for whole in (given, replace(given, layers=3, N=2, reverse="01")):
        with pytest.raises(ValueError, match=words):
            choice.select(whole, backend)
    if backend in choice.WAVEFRONTS:
        with pytest.raises(ValueError, match=refused):
            choice.wavefront(replace(given, layers=3), backend)
    inference = replace(given, direction="inference")
    assert choice.select(inference, backend) == backend
    assert choice.select(given) in choice.BACKENDS  # "auto" may take another backward


def test_backward_is_built_at_the_call_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str, arch: str) -> bytes:
        if "#define BACKWARD 1" in source:
            raise nvrtc.CompileError("out of luck")
        return b""

    monkeypatch.setattr(nvrtc, "compile_cubin", refuse)
    given = problem(device="H100", direction="training", **half)
    with pytest.raises(ValueError, match="in the backward pass: out of luck"):
        choice.select(given, "group")
    (row,) = (row for row in choice.verdicts(given, "group") if row.backend == "group")
    assert row.runs and not row.chosen and row.reasons == ("backward on another loop: out of luck",)


@pytest.mark.compile("nvrtc")
def test_nvrtc_says_why_a_kernel_does_not_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "compile_cubin", COMPILE)
    monkeypatch.setattr(group, "source", lambda layout: "broken;\n")
    with pytest.raises(ValueError, match=r"(?s)does not compile for sm_80:\ngpu_rnn.cu\(1\): error: .*broken"):
        choice.select(problem(device="A100", **half), "group")


def test_environment_names_a_preference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU_RNN_BACKEND", "reference")
    assert choice.select(problem()) == "reference"
    assert choice.select(problem(), "step") == "step"
    memo.clear("gpu_rnn.dispatch")
    monkeypatch.setenv("GPU_RNN_BACKEND", "resident")  # cannot run here: only a preference
    assert choice.select(problem()) == "aten"
    memo.clear("gpu_rnn.dispatch")
    monkeypatch.setenv("GPU_RNN_BACKEND", "fastest")
    with pytest.raises(ValueError, match="GPU_RNN_BACKEND is 'fastest'"):
        choice.select(problem())


def test_a_fallback_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    layer = gpu_rnn.LSTM(2, 3, dtype=torch.complex64)
    with caplog.at_level(logging.INFO, logger="gpu_rnn"):
        for steps in (4, 4, 5, 6):
            layer(torch.randn(steps, 3, 2, dtype=torch.complex64))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == len(set(messages))
    assert "training of lstm: step not used: complex numbers run on the reference only" in messages
    assert not any("reference not used" in message for message in messages)


def test_what_cannot_be_built_is_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(choice, "_prepared", lambda problem, name: ["no ptxas"] if name == "resident" else [])
    choice._say_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="gpu_rnn"):
        for steps in (100, 200):
            assert choice.select(problem(device="H100", T=steps, **half)) != "resident"
    assert [record.getMessage() for record in caplog.records] == ["inference of lstm: resident not used: no ptxas"]


def test_a_problem_with_other_values_is_what_replace_makes() -> None:
    one = problem(lengths=True)
    assert one.but(T=7, layers=3) == replace(one, T=7, layers=3) != one == one.but()
    with pytest.raises(TypeError, match="has no steps"):
        one.but(steps=7)
