# SPDX-License-Identifier: Apache-2.0
"""Which backend runs a call, what explain and debug say of it, and how a backend asked for by name refuses."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import gpu_rnn
from gpu_rnn import cells, devices
from gpu_rnn.backends import resident
from gpu_rnn.backends.group import cubin, nvrtc
from gpu_rnn.backends.group import launch as group
from gpu_rnn.backends.problem import Problem
from gpu_rnn.backends.step import launch as step
from gpu_rnn.diagnostics import explanation
from gpu_rnn.dispatch import choice
from tests.support import loops as support
from tests.support.profiling import operations

COMPILE = nvrtc.compile_cubin
NAMES = ["resident", "group", "aten", "step", "reference"]


@pytest.fixture(autouse=True)
def fresh_choices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Choices are cached; nothing that a test changes may reach another, nor the environment a test.

    CuPy is there for every test, and the kernels of described devices are not built.
    """
    monkeypatch.delenv("GPU_RNN_BACKEND", raising=False)
    monkeypatch.setattr(nvrtc, "unavailable", lambda: "")
    monkeypatch.setattr(nvrtc, "compile_cubin", lambda source, arch: b"")
    monkeypatch.setattr(cubin, "usage", lambda code: cubin.Usage(255, 0))
    monkeypatch.setattr(group, "_failures", {})
    caches = (choice._select, choice._say_once, group.fit)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


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
    (problem(device="H100", **half), "group"),
    (problem(cells.lstm("relu"), "A100", direction="training", **half), "group"),
    (problem(support.RECURRENCES["minimal"], "RTX 4090", H=512, **half), "group"),
    (problem(device="H100", T=1500, H=1024, I=1024, direction="training", **half), "group"),
    (problem(cells.gru(reset_after=False), "H100", **half), "resident"),
    (problem(cells.gru(reset_after=False), "H100", H=512, **half), "step"),
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


def test_the_choice_follows_costs_and_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem()
    monkeypatch.setattr(step, "cost", lambda problem, constants: 0.0)
    assert choice.select(given) == "step"
    choice._select.cache_clear()
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
    ("aten", problem(cells.lstm("relu")), ["standard activations"]),
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
    ("group", problem(cells.gru(reset_after=False), proj_size=3), ["NVIDIA GPU", "one product a step", "proj_size"]),
    ("group", problem(device="H100", H=4096), ["fits up to H = "]),
    ("group", problem(device="H100", norm=True), ["does not take layer normalisation"]),
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
        ValueError, match="backend must be 'auto' or one of resident, group, aten, step, reference, got 'cudnn'"
    ):
        gpu_rnn.LSTM(2, 3, backend="cudnn")(x)


def test_a_described_device_has_what_is_not_installed_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same is chosen, and the last line says what is missing here."""
    layer, x = gpu_rnn.LSTM(64, 512, dtype=torch.bfloat16), torch.empty(100, 32, 64, device="meta")
    everything = gpu_rnn.explain(layer, x, device="H100")
    said = str(everything)
    assert everything.chosen == "group" and "Here" not in said
    choice._select.cache_clear()
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
    given = problem(device="H100", **half)
    assert choice.select(given) == "resident"
    assert group.unsupported(given) == ["NVRTC 0.0 does not compile for sm_90a:\nout of luck"]
    with pytest.raises(ValueError, match=r"(?s)backend='group' cannot run.*out of luck"):
        choice.select(given, "group")
    row = choice.verdicts(given, "group")[1]
    assert not row.runs and row.reasons == ("NVRTC 0.0 does not compile for sm_90a:\nout of luck",)
    monkeypatch.setenv("GPU_RNN_BACKEND", "group")
    assert choice.select(replace(given, B=7)) != "group"
    assert choice.select(replace(given, direction="backward")) == "group"


@pytest.mark.parametrize("backend", ["resident", "group", "step"])
def test_a_backend_by_name_is_asked_for_both_passes(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot run backward is refused at the call, not after it."""
    module, refused = choice.BACKENDS[backend], "takes no gradients today"
    able = module.unsupported

    def unsupported(problem: Problem) -> list[str]:
        return [refused] if problem.direction == "backward" else able(problem)

    monkeypatch.setattr(module, "unsupported", unsupported)
    given = problem(device="H100", direction="training", **half)
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
    choice._select.cache_clear()
    monkeypatch.setenv("GPU_RNN_BACKEND", "resident")  # cannot run here: only a preference
    assert choice.select(problem()) == "aten"
    choice._select.cache_clear()
    monkeypatch.setenv("GPU_RNN_BACKEND", "fastest")
    with pytest.raises(ValueError, match="GPU_RNN_BACKEND is 'fastest'"):
        choice.select(problem())


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


def test_a_fallback_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    layer = gpu_rnn.LSTM(2, 3, dtype=torch.complex64)
    with caplog.at_level(logging.INFO, logger="gpu_rnn"):
        for steps in (4, 4, 5, 6):
            layer(torch.randn(steps, 3, 2, dtype=torch.complex64))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == len(set(messages))
    assert "training of lstm: step not used: complex numbers run on the reference only" in messages
    assert not any("reference not used" in message for message in messages)


@pytest.mark.parametrize("device", [*devices.DEVICES, "h100", "H100 SXM 80GB", "cpu", None])
def test_explain_for_a_device(device: str | None) -> None:
    layer = gpu_rnn.LSTM(64, 64, activation="softsign")
    explanation = gpu_rnn.explain(layer, torch.empty(100, 32, 64, device="meta"), device=device)
    assert [row.backend for row in explanation.rows if row.backend in NAMES] == NAMES
    assert [row.backend for row in explanation.rows if row.chosen] == [explanation.chosen]
    expected = devices.describe(device) if device else devices.CPU
    assert explanation.problem.device == expected
    assert explanation.chosen == ("group" if expected.is_gpu else "step")
    for row in explanation.rows:
        assert row.runs == (row.predicted_us is not None) and (row.runs or row.reasons)
        assert row.predicted_us is None or row.predicted_us > 0
    head, columns, *lines, foot = str(explanation).splitlines()
    assert (
        head == f"lstm: T 100, B 32, input 64, hidden 64, layers 1, float32, forward and backward, on {expected.name}"
    )
    assert "predicted" in foot and "µs/step" in columns
    assert re.search(rf"^{explanation.chosen} +chosen +\d+\.\d\d", "\n".join(lines), re.M)
    assert re.search(r"^aten +no +ATen has LSTM, GRU and RNN", "\n".join(lines), re.M)


def test_explain_shows_the_floor_of_each_pass() -> None:
    layer, x = gpu_rnn.LSTM(1024, 1024, dtype=torch.bfloat16), torch.empty(100, 64, 1024, device="meta")
    training = gpu_rnn.explain(layer, x, device="H100")
    with torch.no_grad():
        inference = gpu_rnn.explain(layer, x, device="H100")
    assert training.floor_us > inference.floor_us == pytest.approx(1.5, abs=0.05)
    assert re.search(r"^floor +1\.5\d  of a layer's time loop", str(inference), re.M)
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


def test_explain_refuses() -> None:
    with pytest.raises(ValueError, match=r"no description of a device 'H1000'; described are A100, .*H100.* and CPU"):
        gpu_rnn.explain(gpu_rnn.LSTM(2, 3), device="H1000")
    with pytest.raises(TypeError, match=r"such as gpu_rnn.LSTM, not torch.nn.LSTM"):
        gpu_rnn.explain(torch.nn.LSTM(2, 3))
    with pytest.raises(RuntimeError, match="Expected 2, got 5"):
        gpu_rnn.explain(gpu_rnn.LSTM(2, 3), torch.empty(4, 1, 5, device="meta"), device="H100")


DEBUGGED = {
    "lstm": gpu_rnn.LSTM(2, 4, 2, bidirectional=True, batch_first=True),
    "gru": gpu_rnn.GRU(2, 4, dtype=torch.bfloat16),
    "slstm": gpu_rnn.Recurrent(cells.slstm(), 2, 4, dtype=torch.float64),
    "projected": gpu_rnn.LSTM(2, 4, proj_size=3),
}


@pytest.mark.parametrize("name", DEBUGGED)
def test_debug_finds_agreement(name: str) -> None:
    layer = DEBUGGED[name]
    found = gpu_rnn.debug(layer, torch.randn(6, 3, 2, dtype=layer.weight_ih_l0.dtype), backend="step")
    assert [difference.layer for difference in found] == list(range(layer.num_layers))
    for difference in found:
        assert difference.where == "" and difference.backend == "step"
        assert f"layer {difference.layer}: step agrees with the reference" in str(difference)


FAULTS = [
    ("y", (4, 1, 0, 2), "step 4, sample 1, direction 0, unit 2: the output h is off by 1"),
    (
        "y",
        (4, 1, 1, 2),
        "step 1, sample 1, direction 1, unit 2: the output h is off by 1",
    ),  # the fifth from its end
    (
        "gates",
        (3, 0, 0, 2, 1),
        "step 3, sample 0, direction 0, unit 1: the pre-activation of gate n is off by 1",
    ),
    (
        "recurrent",
        (2, 2, 0, 0, 3),
        "step 2, sample 2, direction 0, unit 3: the product of gate n is off by 1",
    ),
]


@pytest.mark.parametrize(("field", "index", "where"), FAULTS)
def test_debug_names_the_first_difference(
    monkeypatch: pytest.MonkeyPatch, field: str, index: tuple[int, ...], where: str
) -> None:
    forward = step.forward

    def broken(*arguments: Any) -> Any:
        result = forward(*arguments)
        getattr(result, field)[index] += 1
        if field == "y" and index[2] == 0:
            result.gates[5, :, 0] += 1  # compared before y, but of a later step
            result.y[5, :, 0] += 1
        return result

    monkeypatch.setattr(step, "forward", broken)
    (found,) = gpu_rnn.debug(gpu_rnn.GRU(2, 4, bidirectional=True), torch.randn(6, 3, 2), backend="step")
    assert found.where == where
    assert str(found) == f"layer 0: step first differs from the reference at {where}"


def test_explain_takes_packed_input() -> None:
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(4, 3), torch.randn(2, 3)])
    found = gpu_rnn.explain(gpu_rnn.LSTM(3, 5, batch_first=True), packed)
    assert (found.problem.T, found.problem.B, found.problem.packed) == (4, 2, True)
    assert found.chosen == "aten"
    assert gpu_rnn.explain(gpu_rnn.LSTM(3, 5, activation="relu"), packed).chosen == "step"
