# SPDX-License-Identifier: Apache-2.0
"""The loops in C in many threads at once, and in processes that were forked from one that ran them."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

import pytest
import torch
from torch import Tensor

import gpu_rnn
from gpu_rnn.backends.native import launch
from tests.support import native

pytestmark = native.NEEDS_C


SIZES = [(hidden, steps) for hidden in (3, 16, 33) for steps in (1, 4, 9)]


def layers() -> list[gpu_rnn.LSTM]:
    torch.manual_seed(0)
    return [gpu_rnn.LSTM(5, hidden, backend="native", bidirectional=hidden % 2 == 0) for hidden, _ in SIZES]


def both_passes(module: gpu_rnn.LSTM, steps: int) -> list[Tensor]:
    x = torch.linspace(-1, 1, steps * 7 * 5).view(steps, 7, 5).requires_grad_()
    y = module(x)[0]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])]


def results() -> list[list[Tensor]]:
    return [both_passes(module, steps) for module, (_, steps) in zip(layers(), SIZES, strict=True)]


def numbers() -> list[list[float]]:
    return [value.tolist() for each in results() for value in each]


def test_threads_at_once_disturb_nobody() -> None:
    alone, modules, steps = results(), layers(), [steps for _, steps in SIZES]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for found, expected in zip(pool.map(both_passes, modules, steps), alone, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def _answer(connection: Connection) -> None:
    connection.send(numbers())


# A child of a process with threads may hold locks of theirs: Python 3.12 warns of any such fork.
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_forked_child_runs_what_its_parent_ran(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """As a data loader's workers do."""
    monkeypatch.setattr(launch, "OF_A_THREAD", 1.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    expected = numbers()
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=_answer, args=(there,))
    child.start()
    answered = here.poll(60)
    found = here.recv() if answered else None
    child.kill()
    child.join()
    assert found == expected
