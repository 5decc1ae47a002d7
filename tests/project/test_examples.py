# SPDX-License-Identifier: Apache-2.0
"""Each example runs and reaches what it says; the cell of the first is what its formula says."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import gpu_rnn
from tests.support import loops as support
from tests.support.paths import ROOT

EXAMPLES = ROOT / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_named_here() -> None:
    named = {
        "minimal_gated_unit",
        "memory_policy",
        "episodes",
        "gru_d",
        "keras_exchange",
        "streaming_vad",
        "distributed",
        "block_gru",
    }
    assert {path.stem for path in EXAMPLES.glob("*.py")} <= named


def test_minimal_gated_unit_learns_to_add() -> None:
    command = [sys.executable, str(EXAMPLES / "minimal_gated_unit.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    error = re.search(r"^error (\S+) ", done.stdout, re.M)
    assert error and float(error[1]) < 0.02  # 0.002 where it was written; 0.167 without learning
    assert "m.sigmoid(a_f)  # minimal_gated_unit.py:" in done.stdout


def test_block_gru_is_what_its_formula_says_and_finds_its_place() -> None:
    """Beside a loop over steps: block products, each head's gates divided by their root mean squares."""
    example = load("block_gru")
    torch.manual_seed(0)
    layer = gpu_rnn.Recurrent(example.block_gru(), 3, 8, heads=2, rms_norm=True, dtype=torch.float64)
    for scale in (layer.norm_ih_l0, layer.norm_hh_l0):
        torch.nn.init.normal_(scale)
    x, h = torch.randn(5, 2, 3, dtype=torch.float64), torch.zeros(2, 8, dtype=torch.float64)
    outputs = []

    def gates(entering: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        """(B, k, ·) -> (3, B, k, H/k)"""
        products = torch.einsum("bki,kji->bkj", entering, weight).unflatten(2, (3, -1))
        normal = torch.nn.functional.rms_norm(products, products.shape[-1:], eps=1e-5).flatten(2)
        return (normal * scale + bias).unflatten(2, (3, -1)).movedim(2, 0)

    for of_step in x:
        entering = of_step[:, None].expand(-1, 2, -1)
        x_r, x_c, x_u = gates(entering, layer.weight_ih_l0, layer.norm_ih_l0, layer.bias_ih_l0)
        r_r, r_c, r_u = gates(h.unflatten(1, (2, -1)), layer.weight_hh_l0, layer.norm_hh_l0, layer.bias_hh_l0)
        candidate, update = torch.tanh((x_r + r_r).sigmoid() * (x_c + r_c)), (x_u + r_u - 1).sigmoid()
        h = update.flatten(1) * candidate.flatten(1) + (1 - update.flatten(1)) * h
        outputs.append(h)
    torch.testing.assert_close(layer(x)[0], torch.stack(outputs))
    assert example.train(60, log=False) > 0.5  # 0.9 after 50 updates where it was written; guessing gives 0.125


def test_memory_policy_needs_resets() -> None:
    policy = load("memory_policy")
    rollout = policy.Rollout(50, 8, torch.Generator().manual_seed(0))
    light, starts = rollout.observations[..., 0] == 1, rollout.starts
    for row in range(8):  # the right answer, by hand: light since the last beginning
        for t in range(50):
            begun = int(starts[: t + 1, row].nonzero()[-1])
            assert bool(rollout.answers[t, row]) is bool(light[begun : t + 1, row].any())
    right, without = (policy.train(60, use_resets) for use_resets in (True, False))
    assert right > 0.95  # 100 % after 200 updates
    assert without < right - 0.15  # 61 % after 200


def test_episodes_of_stable_baselines_and_torchrl() -> None:
    """Beside a loop over steps that multiplies the states with 0 where an episode begins, as Stable-Baselines3 does
    it."""
    episodes = load("episodes")
    torch.manual_seed(0)
    lstm = gpu_rnn.LSTM(3, 5)
    features, starts = torch.randn(8, 3), torch.tensor([0.0, 0, 1, 0, 1, 0, 0, 1])
    initial = (torch.randn(1, 2, 5), torch.randn(1, 2, 5))
    output, final = episodes.process_sequence(features, initial, starts, lstm)
    theirs = torch.nn.LSTM(3, 5)
    theirs.load_state_dict(lstm.state_dict())
    states, outputs = initial, []
    for x, begins in zip(features.view(2, 4, 3).transpose(0, 1), starts.view(2, 4).T, strict=True):
        states = tuple(state * (1 - begins).view(1, -1, 1) for state in states)
        step, states = theirs(x[None], states)
        outputs.append(step)
    torch.testing.assert_close(output, torch.cat(outputs).transpose(0, 1).flatten(0, 1))
    torch.testing.assert_close(final, states)
    module = gpu_rnn.LSTM(3, 5, batch_first=True)
    module.load_state_dict(lstm.state_dict())
    zeros = (torch.zeros(1, 2, 5), torch.zeros(1, 2, 5))
    expected, _ = episodes.process_sequence(features, zeros, starts, lstm)
    found = episodes.lstm_module(features.view(2, 4, 3), starts.view(2, 4, 1).bool(), module)
    torch.testing.assert_close(found.flatten(0, 1), expected)


def by_hand(layer: gpu_rnn.Recurrent, x: Tensor, h: Tensor, sharpness: float) -> Tensor:
    outputs = []
    for step in x:
        x_f, x_n = (step @ layer.weight_ih_l0.T + layer.bias_ih_l0).chunk(2, 1)
        r_f, r_n = (h @ layer.weight_hh_l0.T + layer.bias_hh_l0).chunk(2, 1)
        f = torch.sigmoid(sharpness * (x_f + r_f))
        h = (1 - f) * h + f * torch.tanh(x_n + f * r_n)
        outputs.append(h)
    return torch.stack(outputs)


@pytest.mark.parametrize("sharpness", [1.0, 3.0])
@pytest.mark.parametrize("backend", ["reference", "step"])
def test_minimal_gated_unit_is_its_formula(backend: str, sharpness: float) -> None:
    recurrence = load("minimal_gated_unit").minimal_gated_unit(sharpness)
    layer = support.layer(recurrence, backend)
    x, h = support.draw(6, 4, 2, seed=1).requires_grad_(), support.draw(1, 4, 3, seed=2).requires_grad_()
    y, final = layer(x, h)
    expected = by_hand(layer, x, h[0], sharpness)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(final, expected[-1:], rtol=1e-12, atol=1e-12)
    d = support.draw(*y.shape, seed=3)
    wanted = [x, h, *layer.parameters()]
    grads = torch.autograd.grad(y, wanted, d)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, wanted, d), rtol=1e-12, atol=1e-12)


def gru_d_by_hand(model: torch.nn.Module, series: tuple[Tensor, Tensor, Tensor], h: Tensor) -> Tensor:
    """GRU-D as its paper has it, step by step: δ by its recursion, and h decayed where a step begins."""
    times, values, observed = series
    w_r, w_z, w_n, w_decay = model.rnn.weight_ih_l0.chunk(4)
    b_r, b_z, b_n, b_decay = model.rnn.bias_ih_l0.chunk(4)
    u_r, u_z, u_n, _ = model.rnn.weight_hh_l0.chunk(4)
    c_r, c_z, c_n, _ = model.rnn.bias_hh_l0.chunk(4)
    size, outputs = values.shape[2], []
    delta, last = torch.zeros_like(values[0]), torch.zeros_like(values[0])
    for t, (x, m) in enumerate(zip(values, observed, strict=True)):
        if t > 0:
            passed = (times[t] - times[t - 1])[:, None]
            delta = torch.where(observed[t - 1], passed, passed + delta)
        gamma_x = torch.exp(-torch.clamp(model.weight_decay * delta + model.bias_decay, min=0))
        gamma_h = torch.exp(-torch.clamp(delta @ w_decay[:, 2 * size :].T + b_decay, min=0))
        filled = torch.where(m, x, gamma_x * last + (1 - gamma_x) * model.means)
        last, h = torch.where(m, x, last), gamma_h * h
        seen = torch.cat([filled, m.to(x)], -1)
        r = torch.sigmoid(seen @ w_r[:, : 2 * size].T + b_r + h @ u_r.T + c_r)
        z = torch.sigmoid(seen @ w_z[:, : 2 * size].T + b_z + h @ u_z.T + c_z)
        n = torch.tanh(seen @ w_n[:, : 2 * size].T + b_n + (r * h) @ u_n.T + c_n)
        h = (1 - z) * h + z * n
        outputs.append(h)
    return torch.stack(outputs)


@pytest.mark.parametrize("backend", ["reference", "step"])
def test_gru_d_is_its_formula(backend: str) -> None:
    gru_d = load("gru_d")
    series, _ = gru_d.draw(9, 4, torch.Generator().manual_seed(0))
    series = gru_d.Series(series.times.double(), series.values.double(), series.observed)
    h = support.draw(4, 5, seed=2).requires_grad_()
    model = gru_d.GRUD(3, 5, support.draw(3, seed=1)).double()
    with torch.no_grad():
        model.bias_decay.copy_(support.draw(3, seed=4))  # not 0, where the derivative of max(0, ·) is a convention
    model.rnn.backend = backend
    every, final = model(series, h)
    expected = gru_d_by_hand(model, series, h)
    assert expected.isfinite().all()  # what was not observed is NaN
    torch.testing.assert_close(every, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(final, expected[-1], rtol=1e-12, atol=1e-12)
    d, wanted = support.draw(*every.shape, seed=3), [h, *model.parameters()]
    grads = torch.autograd.grad(every, wanted, d)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, wanted, d), rtol=1e-12, atol=1e-12)


def test_gru_d_learns_how_fast_the_past_fades(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib: pip install 'gpu-rnn[demo]'")
    gru_d = load("gru_d")
    model = gru_d.train(60, steps=25)
    series, signs = gru_d.draw(30, 200, torch.Generator().manual_seed(1))
    with torch.no_grad():
        error = {name: values.square().mean().sqrt() for name, values in gru_d.errors(model, series, signs).items()}
        gru_d.picture(model, series, signs, tmp_path / "gru_d.png")
    assert error["best possible"] < error["GRU-D"] < 0.85 * error["carried forward"]
    assert list(model.gru_d.weight_decay) == sorted(model.gru_d.weight_decay, reverse=True)
    assert (tmp_path / "gru_d.png").read_bytes().startswith(b"\x89PNG")


def test_streams_of_the_voice_detector_are_whole_sequences() -> None:
    """With random weights: what each stream hears is its frames, one after the other, in whoever's company."""
    torch.manual_seed(0)
    vad = load("streaming_vad")
    detector, samples = vad.Detector().eval(), torch.randn(6 * vad.FRAME + 7)
    with torch.no_grad():
        heard = torch.nn.functional.pad(samples, (vad.CONTEXT, 0)).unfold(0, vad.CONTEXT + vad.FRAME, vad.FRAME)
        expected = detector.probabilities(detector.lstm(detector.features(heard)[:, None])[0][:, 0])
    listener = vad.Listener(detector)
    probabilities, seconds = vad.listen(samples, 3, listener)
    assert probabilities.shape == (3, 6) and len(seconds) == 8 and not len(listener.streams)
    torch.testing.assert_close(probabilities, expected.expand(3, -1))


@pytest.mark.slow  # test-clients installs what it needs
def test_the_voice_detector_agrees_with_onnx_runtime_on_its_released_weights(tmp_path: Path) -> None:
    for name in ("silero_vad", "onnxruntime", "matplotlib"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}: pip install 'gpu-rnn[streaming]', or make test-clients")
    vad, said = load("streaming_vad"), []
    samples = vad.synthetic(4.0)
    probabilities = vad.compare(samples, [1, 5], said.append)
    assert len(said) == 2 and probabilities.shape == (5, 125)
    quiet, spoken = probabilities[0, 5:60], probabilities[0, 65:]
    assert quiet.max() < 0.1 and spoken.max() > 0.5  # 0.02 and 0.88 where it was written
    vad.picture(samples, probabilities, tmp_path / "speech.png")
    assert (tmp_path / "speech.png").read_bytes().startswith(b"\x89PNG")
