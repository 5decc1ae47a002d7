# SPDX-License-Identifier: Apache-2.0
"""Models whose wheels hold their trained weights: what they compute by themselves, and with our layers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gpu_rnn
from gpu_rnn import interop
from tests.clients.libraries import library

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of their imports
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}  # of float32, through at most three layers and 160 steps


@pytest.mark.parametrize("backend", ["auto", "step"])
def test_the_speaker_encoder_of_resemblyzer(backend: str) -> None:
    """Three LSTM layers over 1.6 s of a spectrum: the same embedding, converted, and by the step loop."""
    encoder = library("resemblyzer", "resemblyzer", "pretrained").VoiceEncoder("cpu", verbose=False).eval()
    spectra = torch.randn(3, 160, 40, generator=torch.Generator().manual_seed(0)).abs()
    with torch.no_grad():
        expected = encoder(spectra)
        (replaced,) = gpu_rnn.convert(encoder, backend=backend).replaced
        assert type(encoder.lstm) is gpu_rnn.LSTM and replaced.module is encoder.lstm
        torch.testing.assert_close(encoder(spectra), expected, **TOLERANCE)


@pytest.fixture
def speller(monkeypatch: pytest.MonkeyPatch) -> Any:
    """g2p-en's network without its dictionaries, which it would download."""
    monkeypatch.setattr(library("nltk", "g2p-en", "pretrained").data, "find", lambda name: name)
    speller = object.__new__(library("g2p_en.g2p", "g2p-en", "pretrained").G2p)
    monkeypatch.setattr("g2p_en.g2p.cmudict", type("Nothing", (), {"dict": staticmethod(dict)}))
    speller.__init__()
    return speller


def of_numpy(kind: Any, speller: Any, part: str) -> Any:
    """A layer or cell of ours with the weights of g2p-en's encoder or decoder."""
    names = {
        f"{weight}_{side}": getattr(speller, f"{part}_{weight[0]}_{side}")
        for weight in ("weight", "bias")
        for side in ("ih", "hh")
    }
    suffix = "_l0" if kind is gpu_rnn.GRU else ""
    module = kind(names["weight_ih"].shape[1], names["weight_hh"].shape[1])
    module.load_state_dict({name + suffix: torch.from_numpy(value) for name, value in names.items()})
    return module.requires_grad_(False)


@pytest.mark.parametrize("word", ["recurrence", "activationist", "gru"])
def test_the_graphemes_to_phonemes_of_g2p_en(word: str, speller: Any) -> None:
    """NumPy's loop over a GRU cell, and our layer that reads the word and our cell that spells it out."""
    encoder, decoder = of_numpy(gpu_rnn.GRU, speller, "enc"), of_numpy(gpu_rnn.GRUCell, speller, "dec")
    letters = torch.from_numpy(speller.encode(word)).transpose(0, 1)  # (T, 1, 64)
    y, h = encoder(letters)
    weights = speller.enc_w_ih, speller.enc_w_hh, speller.enc_b_ih, speller.enc_b_hh
    expected = speller.gru(letters.transpose(0, 1).numpy(), len(letters), *weights)
    torch.testing.assert_close(y.transpose(0, 1), torch.from_numpy(expected), **TOLERANCE)

    h, sound, sounds = h[0], 2, []  # <s>
    while len(sounds) < 20:
        h = decoder(torch.from_numpy(speller.dec_emb[[sound]]), h)
        sound = int((h.numpy() @ speller.fc_w.T + speller.fc_b).argmax())
        if sound == 3:  # </s>
            break
        sounds.append(speller.idx2p[sound])
    assert sounds == speller.predict(word) and sounds


def test_the_voice_detector_of_silero_from_its_onnx_file() -> None:
    """The LSTM of its network for whole recordings, read from the file's node: what enters that node in ONNX Runtime
    gives what leaves it."""
    onnx, runtime = library("onnx", "onnx", "test"), library("onnxruntime", "onnxruntime", "streaming")
    spec = importlib.util.find_spec("silero_vad")  # not imported: it would set torch's number of threads
    if spec is None or spec.origin is None:
        pytest.skip("needs silero-vad: pip install 'gpu-rnn[streaming]', or make test-clients")
    model = onnx.load(Path(spec.origin).parent / "data" / "silero_vad_16k_sequence.onnx")
    (node,) = [node for node in model.graph.node if node.op_type == "LSTM"]
    constants = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    constants |= {
        each.output[0]: onnx.numpy_helper.to_array(each.attribute[0].t)
        for each in model.graph.node
        if each.op_type == "Constant"
    }
    weights = {name: constants[where] for name, where in zip("WRB", node.input[1:4], strict=True)}
    size = weights["R"].shape[2]
    layer = gpu_rnn.LSTM(weights["W"].shape[2], size)
    layer.load_state_dict(interop.from_onnx(weights, cell="lstm"))

    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in (node.input[0], node.output[0]))
    session = runtime.InferenceSession(model.SerializeToString())
    rng = np.random.default_rng(0)
    states = {name: rng.standard_normal((1, 1, size), np.float32) for name in "hc"}
    frames = rng.standard_normal((60, 576), np.float32)
    names = [node.input[0], *node.output]
    x, *expected = map(torch.from_numpy, session.run(names, {"input": frames, **states}))
    with torch.no_grad():
        y, (h, c) = layer(x, (torch.from_numpy(states["h"]), torch.from_numpy(states["c"])))
    torch.testing.assert_close([y[:, None], h, c], expected, **TOLERANCE)
