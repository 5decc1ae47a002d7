# SPDX-License-Identifier: Apache-2.0
"""What `tune` measures is chosen from then on, here and in other processes; it changes nothing else."""

from __future__ import annotations

import json
import math
import os
import re
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import gpu_rnn
from gpu_rnn import cli, memo
from gpu_rnn.backends import aten, reference
from gpu_rnn.backends.step import launch as step
from gpu_rnn.diagnostics import tuning
from gpu_rnn.diagnostics.timing import Timing
from gpu_rnn.dispatch import choice, measured
from tests.support.profiling import operations
from tests.support.tuning import QUICK, B, I, T, decide, x

DELAY = 0.03  # seconds of a backend that a test slows down: many times a call's time here


pytestmark = pytest.mark.usefixtures("cache_folder")


def slow(monkeypatch: pytest.MonkeyPatch, *backends: str) -> None:
    """Makes backends slow."""
    for module, name in {
        "aten": (aten, "stack"),
        "step": (step, "forward"),
        "reference": (reference, "forward"),
    }.items():
        if module in backends:
            monkeypatch.setattr(*name, delayed(getattr(*name)))


def delayed(function: Callable[..., Any]) -> Callable[..., Any]:
    def late(*arguments: Any, **named: Any) -> Any:
        time.sleep(DELAY)
        return function(*arguments, **named)

    return late


def ran(call: Callable[[], object]) -> set[str]:
    """The backends that a call ran on, forward and backward."""
    names = {*operations(call)}
    loops = {name.removeprefix("gpu_rnn::") for name in names if name.startswith("gpu_rnn::")}
    return loops | ({"aten"} if names & {"aten::lstm", "aten::gru"} else set())


PACKED = pack_sequence([torch.randn(length, I) for length in (5, 4, 1)])
LSTM, GRU = gpu_rnn.LSTM, gpu_rnn.GRU
CASES: dict[str, tuple[gpu_rnn.Recurrent, Any, dict[str, Any]]] = {
    "stack": (LSTM(I, 4, 2, bidirectional=True, dropout=0.1), x(), {}),
    "packed": (GRU(I, 4, 2), PACKED, {}),
    "batch first": (LSTM(I, 4, batch_first=True, backend="reference"), x(B, T), {}),
    "unbatched": (GRU(I, 4, reset_after=False), torch.randn(T, I), {}),
    "projected": (LSTM(I, 4, proj_size=3), x(), {"hx": (torch.randn(1, B, 3), torch.randn(1, B, 4))}),
    "steered": (GRU(I, 4), x(), {"resets": torch.rand(T, B) < 0.3, "return_all_states": True}),
    "lengths": (LSTM(I, 4, return_sequences=False), x(), {"lengths": torch.tensor([5, 0, 2])}),
    "dropped": (LSTM(I, 4, 2, recurrent_dropout=0.2, zoneout=0.1, weight_drop=0.1), x(), {}),
    "normed": (gpu_rnn.Recurrent(gpu_rnn.cells.slstm(), I, 4, layer_norm=True), x(), {}),
    "gradient of x": (GRU(I, 4), x().requires_grad_(), {}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
def test_what_is_measured_fastest_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each layer and direction, forward and backward."""
    layer, given, call = CASES[name]
    decide(monkeypatch, "reference")
    tuned = gpu_rnn.tune(layer, given, **call)
    assert [each.problem.direction for each in tuned.passes] == ["inference", "training"]
    assert [each.now for each in tuned.passes] == ["reference", "reference"]
    assert "reference" not in [each.before for each in tuned.passes]
    layer.backend = "auto"

    def training() -> None:
        y = layer(given, **call)[0]
        (y.data if isinstance(y, PackedSequence) else y).sum().backward()

    def inference() -> None:
        with torch.no_grad():
            layer.eval()(given, **call)

    assert ran(training) == {"reference_forward", "reference_backward"}
    assert ran(inference) == {"reference_forward"}
    layer.train()


FRESH = """
import torch, gpu_rnn
layer, x = gpu_rnn.LSTM(2, 4, 2), torch.randn(6, 3, 2)
with torch.profiler.profile() as profile:
    layer(x)[0].sum().backward()
ours = {event.name for event in profile.events() if "gpu_rnn::" in event.name}
print(gpu_rnn.explain(layer, x).chosen, *sorted(ours))
"""


def fresh() -> list[str]:
    """The backend that a new process chooses without a C compiler, as tests do, and what runs there."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CC": "no-compiler"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FRESH], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_other_processes_go_by_it(monkeypatch: pytest.MonkeyPatch, cache_folder: Path) -> None:
    layer = LSTM(I, 4, 2)
    assert gpu_rnn.explain(layer, x()).chosen == "aten"
    decide(monkeypatch, "step")
    tuned = gpu_rnn.tune(layer, x(), **QUICK)
    assert gpu_rnn.explain(layer, x()).chosen == "step"
    assert tuned.path.parent == cache_folder and stat.S_IMODE(tuned.path.stat().st_mode) == 0o600
    assert fresh() == ["step", "gpu_rnn::step_backward", "gpu_rnn::step_forward"]
    tuning.forget()
    assert not list(cache_folder.glob("tuned-*.json")) and gpu_rnn.explain(layer, x()).chosen == "aten"
    assert fresh() == ["aten"]


def test_a_choice_holds_up_to_the_next_power_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    decide(monkeypatch, "step")
    tuned = gpu_rnn.tune(LSTM(I, 4), x(5, 3))
    assert "kept for T 5 to 8, B 3 to 4 in " in str(tuned)
    chosen = {
        (t, b): gpu_rnn.explain(LSTM(I, 4), x(t, b)).chosen for t, b in [(5, 3), (8, 4), (9, 3), (4, 3), (5, 2), (8, 5)]
    }
    assert [size for size, backend in chosen.items() if backend != "aten"] == [(5, 3), (8, 4)]
    assert {gpu_rnn.explain(layer, x()).chosen for layer in (LSTM(I, 5), GRU(I, 4), LSTM(I, 4, 2))} == {"aten"}
    assert gpu_rnn.explain(LSTM(I, 4).double(), x().double()).chosen == "aten"


def reread(layer: Any) -> str | None:
    """What is chosen by the file alone, as in a new process."""
    measured._kept.cache_clear()
    memo.clear("gpu_rnn.dispatch")
    return gpu_rnn.explain(layer, x()).chosen


def timed(monkeypatch: pytest.MonkeyPatch, **samples: list[float]) -> None:
    """Has each backend called, and found to take so many ms in each round; the others 9."""

    def rounds(calls: dict[str, Callable[[], object]], device: torch.device, **_: Any) -> dict[str, Timing]:
        for call in calls.values():
            call()
        return {name: Timing("clock", 1, [1e-3 * ms for ms in samples.get(name, [9.0])]) for name in calls}

    monkeypatch.setattr(tuning, "interleave", rounds)


def test_what_is_taken_stays_unless_another_is_faster_beyond_the_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it is tuned: noise alone changes nothing."""
    layer = LSTM(I, 4)
    for _ in range(2):
        timed(monkeypatch, aten=[1.0, 2.0, 3.0], step=[1.5, 1.6, 1.7])
        tuned = gpu_rnn.tune(layer, x())
        assert [(each.before, each.now) for each in tuned.passes] == [("aten", "aten")] * 2
        assert list(tuned.passes[0].us_per_step) == ["step", "aten", "native", "reference"]
        assert str(tuned).count("  aten stays: what is faster is so by less than the spread") == 2
        assert ran(lambda: layer(x())) == {"aten"} and reread(layer) == "aten"
    timed(monkeypatch, aten=[1.8, 2.0, 3.0], step=[1.5, 1.6, 1.7])
    tuned = gpu_rnn.tune(layer, x())
    assert tuned.passes[1].now == "step" and "stays:" not in str(tuned) and reread(layer) == "step"
    timed(monkeypatch, aten=[1.0, 1.1, 1.2], step=[1.1, 1.2, 1.3])
    tuned = gpu_rnn.tune(layer, x())
    assert tuned.passes[0].now == "step" and "  step stays:" in str(tuned)  # whichever it was
    assert ran(lambda: layer(x())[0].sum().backward()) == {"step_forward", "step_backward"}


def test_what_was_kept_before_choices_were_ranked(monkeypatch: pytest.MonkeyPatch) -> None:
    """By their times."""
    decide(monkeypatch, "step")
    path = gpu_rnn.tune(LSTM(I, 4), x()).path
    content = json.loads(path.read_text())
    assert content.pop("ranked")
    content["choices"] = {key: dict(sorted(times.items())) for key, times in content["choices"].items()}
    path.write_text(json.dumps(content))
    assert reread(LSTM(I, 4)) == "step"


def test_names_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    decide(monkeypatch, "reference")
    gpu_rnn.tune(LSTM(I, 4), x())
    assert ran(lambda: LSTM(I, 4)(x())) == {"reference_forward"}
    assert ran(lambda: LSTM(I, 4, backend="step")(x())) == {"step_forward"}
    assert ran(lambda: LSTM(I, 4, backend="aten")(x())) == {"aten"}
    monkeypatch.setenv("GPU_RNN_BACKEND", "step")
    assert ran(lambda: LSTM(I, 4)(x())) == {"step_forward"}


def test_a_forward_and_a_backward_pass_on_two_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a backend that cannot run backward the whole is measured, as it runs."""
    unsupported = step.unsupported
    refuse = ["forward only"]
    monkeypatch.setattr(step, "unsupported", lambda p: refuse if p.direction == "backward" else unsupported(p))
    decide(monkeypatch, "step")
    layer = LSTM(I, 4)
    forward, training = gpu_rnn.tune(layer, x()).passes
    assert forward.now == training.now == "step"
    assert ran(lambda: layer(x())[0].sum().backward()) == {"step_forward", "reference_backward"}


def test_a_stack_goes_by_it_as_a_wavefront_too(with_cupy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether its layers run so, in which chunks and on which loop: asked of a described GPU, as none need be here."""
    layer, given = LSTM(384, 384, 5, dtype=torch.float16, device="meta"), torch.empty(1600, 64, 384, device="meta")
    stack = gpu_rnn.explain(layer, given.half(), device="H100").problem
    assert choice.staggers(stack) and choice.wavefront(stack)[0] == "group"
    with choice.trial("step") as asked:
        assert choice.wavefront(stack)[0] == "step"
    assert asked == {(stack, choice.LOOPS): "step"}
    with choice.trial("reference") as asked:
        assert not choice.staggers(stack)
    assert asked == {(stack, choice.LOOPS): "reference"}
    choice.remember(stack.device, {(stack, choice.LOOPS): {"step": 1.0, "group": 2.0}})
    assert choice.wavefront(stack) == choice.wavefront(stack, "step")
    choice.remember(stack.device, {(stack, choice.LOOPS): {"step": 1.0, "reference": 0.5}})
    assert not choice.staggers(stack) and choice.staggers(stack, "group")
    choice.forget()
    assert choice.wavefront(stack)[0] == "group"
    monkeypatch.setenv("GPU_RNN_BACKEND", "reference")
    assert not choice.staggers(stack)


def test_evaluation_and_calls_without_gradients_are_measured_forward_only() -> None:
    layer = GRU(I, 4)
    directions = [[each.problem.direction for each in gpu_rnn.tune(layer.eval(), x(), **QUICK).passes]]
    layer.train()
    with torch.no_grad():
        directions += [[each.problem.direction for each in gpu_rnn.tune(layer, x(), **QUICK).passes]]
    directions += [[each.problem.direction for each in gpu_rnn.tune(layer.requires_grad_(False), x(), **QUICK).passes]]
    assert directions == [["inference"]] * 3


def test_all_else_stays_as_it_was(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    layer = LSTM(I, 4, 2, dropout=0.5, recurrent_dropout=0.5, zoneout=0.2, weight_drop=0.5)
    parametrizations.spectral_norm(layer, "weight_hh_l0")  # its buffers move with each call in training mode
    called, steps = [], []
    backward = step.backward
    monkeypatch.setattr(
        step, "backward", lambda *given: steps.append(torch._C._is_multithreading_enabled()) or backward(*given)
    )
    layer.register_forward_hook(lambda *_: called.append("layer"))
    layer.bias_ih_l0.register_hook(lambda _: called.append("gradient"))
    given, state = x().requires_grad_(), (torch.randn(2, B, 4), torch.randn(2, B, 4, requires_grad=True))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    attributes, random, versions = set(vars(layer)), torch.get_rng_state(), [p._version for p in layer.parameters()]
    gpu_rnn.tune(layer, given, hx=state, **QUICK)
    assert steps and not any(steps)  # it did run backward, in this thread, which is the one on trial
    assert layer.training and layer.backend == "auto" and set(vars(layer)) <= attributes | {"_stacks"} and not called
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert all(tensor.grad is None for tensor in (given, state[1], *layer.parameters()))
    assert [p._version for p in layer.parameters()] == versions
    assert tuple(capfd.readouterr()) == ("", "")


def test_explain_says_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch, "reference")
    layer = LSTM(I, 4)
    assert "measured by tune" not in str(gpu_rnn.explain(layer, x()))
    tuned = gpu_rnn.tune(layer, x(), **QUICK)
    found = gpu_rnn.explain(layer, x())
    medians = {name: middle for name, (_, middle, _) in tuned.passes[1].us_per_step.items()}
    assert {row.backend: row.measured_us for row in found.rows if row.measured_us} == medians
    assert medians["reference"] > 1e6 * DELAY / T
    assert f"{medians['aten']:8.2f}  measured\n" in str(found)
    assert str(found).splitlines()[-1] == "µs/step: measured by tune on this device"
    assert "measured by tune" not in str(gpu_rnn.explain(layer, x(), device="H100"))
    table = str(tuned).splitlines()
    assert table[0].startswith("lstm: T 5, B 3, input 2, hidden 4, layers 1, float32, measured on ")
    assert [line.split()[0] for line in table[1:]][:7] == ["forward", *tuned.passes[0].us_per_step, "resident", "group"]
    assert sum("now" in line for line in table) == 2 and "needs an NVIDIA GPU" in str(tuned)
    assert {line.find("not measured:") for line in table if "not measured:" in line} == {table[1].index("20 % to 80 %")}


def test_other_threads_are_not_on_trial() -> None:
    found = []
    problem = gpu_rnn.explain(LSTM(I, 4), x()).problem
    with choice.trial("reference") as answers:
        assert choice.select(problem) == "reference" and choice.select(problem, "step") == "step"
        thread = threading.Thread(target=lambda: found.append(choice.select(problem)))
        thread.start()
        thread.join()
    assert found == ["aten"] and list(answers.values()) == ["reference"]
    assert choice.select(problem) == "aten"


def test_a_backend_without_memory_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(step, "forward", full)
    (found,) = gpu_rnn.tune(GRU(I, 4).eval(), x(), **QUICK).passes
    assert found.left_out["step"] == "no memory" and found.us_per_step.keys() == {"aten", "native", "reference"}


def test_it_needs_no_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "find_spec", lambda name: None)
    assert gpu_rnn.tune(GRU(I, 4), x(), **QUICK).passes


def test_what_cannot_be_tuned() -> None:
    with pytest.raises(
        TypeError, match=r"tune takes a layer of this package, such as gpu_rnn\.LSTM, not torch\.nn\.LSTM"
    ):
        gpu_rnn.tune(torch.nn.LSTM(I, 4), x())
    with pytest.raises(TypeError, match="a layer's call has no argument masks"):
        gpu_rnn.tune(LSTM(I, 4), x(), masks=None)
    with pytest.raises(ValueError, match="x is on meta: move the layer and x there"):
        gpu_rnn.tune(LSTM(I, 4, device="meta"), x().to("meta"))
    with pytest.raises(RuntimeError, match=r"outside of torch\.func transforms"):
        torch.func.vmap(partial(gpu_rnn.tune, LSTM(I, 4)))(torch.randn(2, T, B, I))
    with pytest.raises(RuntimeError, match=r"input\.size"):
        gpu_rnn.tune(LSTM(I + 1, 4), x())


@pytest.mark.parametrize(
    ("given", "call", "error", "words"),
    [
        (x(), {"seconds": 0}, ValueError, "seconds must be more than 0, not 0"),
        (x(), {"seconds": -1.0}, ValueError, "more than 0, not -1"),
        (x(), {"seconds": math.nan}, ValueError, "more than 0, not nan"),
        (x(), {"seconds": "2"}, TypeError, "seconds is a number, such as 2.0, not '2'"),
        (x(), {"lengths": True}, TypeError, "takes a tensor as lengths, as the layer does; explain takes True for it"),
        (x(), {"hx": True}, TypeError, "takes a tensor as hx"),
        (x().numpy(), {}, TypeError, "tune takes a tensor or a PackedSequence as x, not ndarray"),
        (None, {}, TypeError, "tune takes a tensor or a PackedSequence as x, not NoneType"),
        (x(T, 0), {}, ValueError, "needs samples to measure, and x has none: B is 0"),
        (x(0), {}, RuntimeError, "sequence length to be larger than 0"),
        (x()[0, 0], {}, ValueError, "2 or 3 dimensions, as the layer does, not 1"),
    ],
)
def test_what_it_refuses(given: Any, call: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        gpu_rnn.tune(LSTM(I, 4), given, **call)
    assert not measured.any_on_cpu(torch.get_num_threads())


def test_it_refuses_autocast() -> None:
    with torch.autocast("cpu"), pytest.raises(ValueError, match=r"leave it, and give .* \.to\(torch\.bfloat16\)"):
        gpu_rnn.tune(LSTM(I, 4), x())


def test_the_head_names_the_options() -> None:
    layer = LSTM(I, 4, zoneout=0.1, layer_norm=True)
    head = str(gpu_rnn.tune(layer, x(), lengths=torch.tensor([5, 0, 2]), **QUICK)).splitlines()[0]
    assert "hidden 4, layers 1, float32, lengths of rows, zoneout, layer normalisation, measured on " in head
    assert "float32, packed, measured on" in str(gpu_rnn.tune(LSTM(I, 4), PACKED, **QUICK))
    assert "hidden 4 projected to 3, layers 1" in str(gpu_rnn.explain(LSTM(I, 4, proj_size=3)))


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--cell", "gru", "--hidden", "4", "--input", "2", "--steps", "5", "--batch", "3"]
    assert cli.main(["tune", *sizes, "--training", "--seconds", "1e-9", "--device", "cpu"]) == 0
    said = capsys.readouterr()
    assert "forward and backward" in said.out
    assert said.err.splitlines()[0] == (
        "measuring 4 backends, forward, then forward and backward, about 2e-09 s, "
        "longer where three calls of each take longer"
    )
    assert gpu_rnn.explain(GRU(I, 4), x()).rows[2].measured_us
    assert cli.main(["tune", *sizes, "--inference", "--seconds", "1e-9"]) == 0
    assert "forward and backward" not in "".join(capsys.readouterr())


def test_ctrl_c_keeps_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cache_folder: Path
) -> None:
    def interrupted(*arguments: Any, **named: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "interleave", interrupted)
    assert cli.main(["tune", "--hidden", "4", "--batch", "2", "--steps", "3", "--device", "cpu"]) == 130
    assert capsys.readouterr().err.endswith("gpu-rnn: stopped; nothing was kept.\n")
    assert not list(cache_folder.glob("tuned-*"))
