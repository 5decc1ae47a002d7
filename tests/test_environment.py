# SPDX-License-Identifier: Apache-2.0
"""The environment's variables: what each may be, and what is said of what it may not."""

from __future__ import annotations

import pytest
import torch

import gpu_rnn
from gpu_rnn import cache, environment
from gpu_rnn.backends.group import deadline
from gpu_rnn.backends.group import launch as group
from gpu_rnn.backends.problem import Problem
from gpu_rnn.dispatch import choice

REFUSED = ("abc", "-1", "0", "inf", "nan", "1e999", "1e300", "1e-12", "5s", "0x10", "\u0665", "1_0", "1e7", "+", ".")
TAKEN = {"": 10.0, " ": 10.0, " 5 ": 5.0, "0.001": 0.001, "1e6": 1e6, "2.5E1": 25.0, ".5": 0.5}


@pytest.mark.parametrize("text", REFUSED)
def test_a_deadline_that_is_none_is_refused_by_name(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU_RNN_DEADLINE", text)
    with pytest.raises(
        ValueError, match=r"GPU_RNN_DEADLINE is .* not a number of seconds from 0\.001 to 1000000: correct it"
    ):
        environment.deadline()


@pytest.mark.parametrize("text", TAKEN)
def test_a_deadline_is_taken(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU_RNN_DEADLINE", text)
    assert environment.deadline() == TAKEN[text]
    assert round(environment.deadline() * 1e9) < 2**63  # nanoseconds, as the kernel takes them


def test_a_wrong_deadline_is_refused_before_anything_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.support.group import pretend

    launched: list[int] = []
    pretend(monkeypatch)
    monkeypatch.setattr(group.Launch, "__call__", lambda launch, device: launched.append(1))
    monkeypatch.setenv("GPU_RNN_DEADLINE", "soon")
    layer = gpu_rnn.GRU(3, 4, activation="softsign", backend="group")
    with pytest.raises(ValueError, match="GPU_RNN_DEADLINE is 'soon'"):
        layer(torch.randn(3, 2, 3))
    assert not launched


@pytest.mark.parametrize("text", ["cudnn", "Auto", "aten,step", "0"])
def test_a_backend_that_is_none_is_refused_at_the_call(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU_RNN_BACKEND", text)
    for layer in (gpu_rnn.LSTM(2, 3), gpu_rnn.LSTM(2, 3, activation="relu")):
        with pytest.raises(
            ValueError, match=f"GPU_RNN_BACKEND is '{text}' .* not 'auto' or one of resident, group, aten"
        ):
            layer(torch.randn(4, 1, 2))


@pytest.mark.parametrize("text", ["", " ", "auto", " auto "])
def test_no_preference(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU_RNN_BACKEND", text)
    assert environment.backend(choice.BACKENDS) == ""
    assert gpu_rnn.LSTM(2, 3)(torch.randn(4, 1, 2))[0].shape == (4, 1, 3)
    problem = Problem(recurrence=gpu_rnn.cells.gru(), T=4, B=1, N=1, I=2, H=3)
    assert choice.select(problem) == "aten"


def test_an_empty_cache_folder_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    for text, folder in (("", "/elsewhere/gpu_rnn"), (" ", "/elsewhere/gpu_rnn"), ("/here", "/here")):
        monkeypatch.setenv("GPU_RNN_CACHE", text)
        assert str(cache.wanted()) == folder


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_check_after_a_failure_in_any_mode(mode: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """The word that a kernel writes to is made in the mode of the first call, and written to in that of a later one."""
    monkeypatch.setattr(deadline, "_errors", {})
    with torch.inference_mode():
        word = deadline.error_word(torch.device("cpu"))
    assert not word.is_inference()
    torch.set_default_device("meta")
    try:
        monkeypatch.setattr(deadline, "_errors", {})
        word = deadline.error_word(torch.device("cpu"))
    finally:
        torch.set_default_device(None)
    assert word.is_cpu
    word.fill_(7 << 48 | 3)
    with mode(), pytest.raises(RuntimeError, match="gave up in step 3 of group 0"):
        gpu_rnn.check()
    gpu_rnn.check()


def test_a_backend_that_is_named_while_the_process_runs_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPU_RNN_BACKEND", raising=False)
    assert not environment.names_a_backend()
    monkeypatch.setenv("GPU_RNN_BACKEND", "reference")
    assert environment.names_a_backend()
    monkeypatch.delenv("GPU_RNN_BACKEND")
    assert not environment.names_a_backend()
