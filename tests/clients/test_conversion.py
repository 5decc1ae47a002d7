# SPDX-License-Identifier: Apache-2.0
"""Models of libraries that build on torch.nn's layers: the same outputs after `gpu_rnn.convert`, and all converted.

docs/torch.md has their versions. `make test-clients` installs them.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import ClassVar
from unittest.mock import MagicMock

import pytest
import torch

import gpu_rnn
from tests.clients.libraries import library

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # their imports warn of each other


def kinds(report: gpu_rnn.Conversion) -> list[str]:
    assert not report.left
    return [type(each.module).__name__ for each in report.replaced]


def test_a_policy_of_sb3_contrib_learns_on() -> None:
    library("gymnasium", "gymnasium")
    ppo = library("sb3_contrib", "sb3-contrib").RecurrentPPO(
        "MlpLstmPolicy", "CartPole-v1", n_steps=16, seed=0, device="cpu"
    )
    seen = ppo.env.reset()
    _, states = ppo.predict(seen, deterministic=True)
    assert kinds(gpu_rnn.convert(ppo.policy)) == ["LSTM", "LSTM"]
    _, after = ppo.predict(seen, deterministic=True)
    for before, now in zip(states, after, strict=True):
        torch.testing.assert_close(torch.as_tensor(now), torch.as_tensor(before))
    weights = ppo.policy.lstm_actor.weight_hh_l0.clone()
    ppo.learn(64)
    assert not torch.equal(weights, ppo.policy.lstm_actor.weight_hh_l0)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_a_module_of_torchrl_over_trajectories_of_several_lengths(kind: str) -> None:
    modules = library("torchrl.modules", "torchrl")
    module = getattr(modules, f"{kind}Module")(input_size=4, hidden_size=8, in_key="x", out_key="y", device="cpu")
    begins = torch.zeros(3, 5, 1, dtype=torch.bool)
    begins[0, 2] = begins[2, 4] = True
    data = library("tensordict", "torchrl").TensorDict({"x": torch.randn(3, 5, 4), "is_init": begins}, [3, 5])
    with modules.set_recurrent_mode(True):
        expected = module(data.clone())
        assert kinds(gpu_rnn.convert(module)) == [kind]
        torch.testing.assert_close(module(data.clone())["y"], expected["y"])


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_a_memory_of_rsl_rl(kind: str) -> None:
    memory = library("rsl_rl.modules", "rsl-rl-lib").RNN(4, 8, 2, kind.lower())
    x = torch.randn(3, 4)
    expected = memory(x)
    memory.reset()
    assert kinds(gpu_rnn.convert(memory)) == [kind]
    torch.testing.assert_close(memory(x), expected)


def test_a_language_model_of_flair() -> None:
    models, data = library("flair.models", "flair"), library("flair.data", "flair")
    dictionary = data.Dictionary()
    for letter in "abc def":
        dictionary.add_item(letter)
    model = models.LanguageModel(dictionary, True, 16, 2).eval()
    expected = model.get_representation(["abc def"], "", "")
    assert kinds(gpu_rnn.convert(model)) == ["LSTM"]
    torch.testing.assert_close(model.get_representation(["abc def"], "", ""), expected)


class Anything(ModuleType):
    """A module that has every name."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> MagicMock:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=name)


@pytest.fixture
def some_torchaudio(monkeypatch: pytest.MonkeyPatch) -> None:
    """speechbrain imports torchaudio, and its layers call nothing of it. Where none is there that fits torch, a
    stand-in does."""
    try:
        importlib.import_module("torchaudio")
    except (ImportError, OSError):  # OSError: one that was built for another torch
        for name in ("", ".functional", ".transforms", ".compliance", ".compliance.kaldi"):
            module = Anything(f"torchaudio{name}")
            module.__spec__ = ModuleSpec(module.__name__, None)
            module.__version__ = "2.11.0"
            monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_a_layer_of_speechbrain(kind: str, some_torchaudio: None) -> None:
    layer = getattr(library("speechbrain.nnet.RNN", "speechbrain"), kind)(hidden_size=8, input_shape=(2, 5, 4))
    x, lengths = torch.randn(2, 5, 4), torch.tensor([1.0, 0.6])
    expected = layer(x, lengths=lengths)
    assert kinds(gpu_rnn.convert(layer)) == [kind]
    torch.testing.assert_close(layer(x, lengths=lengths), expected)


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_the_cells_of_speechbrain(kind: str, some_torchaudio: None) -> None:
    cells = getattr(library("speechbrain.nnet.RNN", "speechbrain"), kind)(8, input_size=4, num_layers=2)
    x = torch.randn(3, 4)
    expected, states = cells(x)
    then, _ = cells(x, states)
    assert kinds(gpu_rnn.convert(cells)) == [kind, kind]
    torch.testing.assert_close(cells(x), (expected, states))
    torch.testing.assert_close(cells(x, states)[0], then)


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_a_decoder_of_speechbrain_that_attends(kind: str, some_torchaudio: None) -> None:
    decoder = library("speechbrain.nnet.RNN", "speechbrain").AttentionalRNNDecoder(
        kind, "content", hidden_size=7, attn_dim=5, num_layers=2, enc_dim=20, input_size=6
    )
    inputs = torch.randn(4, 5, 6), torch.randn(4, 10, 20), torch.tensor([1.0, 0.5, 0.9, 1.0])
    expected = decoder(*inputs)
    assert kinds(gpu_rnn.convert(decoder)) == [f"{kind.upper()}Cell"] * 2
    torch.testing.assert_close(decoder(*inputs), expected)


@pytest.mark.parametrize("kind", ["LiGRU", "QuasiRNN"])
def test_speechbrains_own_recurrences_stay(kind: str, some_torchaudio: None) -> None:
    layer = getattr(library("speechbrain.nnet.RNN", "speechbrain"), kind)(8, input_shape=(2, 5, 4)).eval()
    x = torch.randn(2, 5, 4)
    expected = layer(x)
    assert kinds(gpu_rnn.convert(layer)) == []
    torch.testing.assert_close(layer(x), expected)
