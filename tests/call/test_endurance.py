# SPDX-License-Identifier: Apache-2.0
"""What holds over time: memory over many calls, cells and layers, long sequences, threads, forks, interrupted calls."""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_all_start_methods
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import gpu_rnn
from gpu_rnn.backends.group import deadline
from gpu_rnn.backends.group.layout import Layout
from tests.support.waiting import PATIENCE

STATM = Path("/proc/self/statm")


def resident_bytes() -> int:
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def levels_off(repeat: Callable[[int], Any], before: int, after: int) -> None:
    """Nothing stays of `after` repetitions that was not there after `before` of them."""
    if not STATM.exists():
        pytest.skip("needs /proc, which tells how much memory the process holds")
    for number in range(before):
        repeat(number)
    gc.collect()
    objects, memory = len(gc.get_objects()), resident_bytes()
    for number in range(after):
        repeat(number)
    gc.collect()
    assert len(gc.get_objects()) - objects < after // 4 + 100
    assert resident_bytes() - memory < (16 << 20) + 256 * after


LAYERS = {
    "default": lambda: gpu_rnn.GRU(4, 8),
    "activation": lambda: gpu_rnn.LSTM(4, 8, activation="softsign", bidirectional=True),
    "options": lambda: gpu_rnn.GRU(4, 8, 2, zoneout=0.1, recurrent_dropout=0.1, layer_norm=True, backend="step"),
    "reference": lambda: gpu_rnn.RNN(4, 8, backend="reference"),
}


@pytest.mark.parametrize(
    "count", [pytest.param(300, id="quick"), pytest.param(20_000, id="long", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", LAYERS)
def test_memory_levels_off_over_many_calls(name: str, count: int) -> None:
    """Of other sizes each time, with and without lengths and a backward pass."""
    layer = LAYERS[name]()

    def call(number: int) -> None:
        steps, batch = 1 + number % 7, 1 + number % 3
        x = torch.randn(steps, batch, 4)
        y, *_ = layer(x, lengths=torch.full((batch,), steps) if number % 2 else None)
        if number % 4 < 2:
            y.sum().backward()

    levels_off(call, before=60, after=count)


def cell(number: int) -> gpu_rnn.Recurrence:
    """Another program for each number."""

    def step(x: Any, r: Any, s: Any) -> Any:
        return torch.tanh(x.a + r.a) * (1 + number / 1e6) + 0.5 * s.h

    return gpu_rnn.Recurrence(step, gates=("a",), states=("h",), name="own")


@pytest.mark.slow  # only where the caches are full something must go
def test_memory_levels_off_over_many_cells() -> None:
    numbers = itertools.count()

    def call(_: int) -> None:
        layer = gpu_rnn.Recurrent(cell(next(numbers)), 3, 4)
        layer(torch.randn(2, 1, 3))[0].sum().backward()

    levels_off(call, before=1500, after=500)  # each is asked for in three ways, and dispatch remembers 4,096 answers


@pytest.mark.parametrize(
    "count", [pytest.param(150, id="quick"), pytest.param(2_000, id="long", marks=pytest.mark.slow)]
)
def test_memory_levels_off_over_many_layers(count: int) -> None:
    def make(number: int) -> None:
        layer = gpu_rnn.LSTM(3 + number % 5, 4, activation="softsign" if number % 2 else "tanh")
        layer(torch.randn(2, 1, layer.input_size))[0].sum().backward()

    levels_off(make, before=40, after=count)


def test_the_numbers_of_kernels_that_may_give_up_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """One serves every T and B. There are as many as 16 bits count; past them they begin again."""
    monkeypatch.setattr(deadline, "_numbers", {})
    monkeypatch.setattr(deadline, "_launched", {})
    monkeypatch.setattr(deadline, "MOST", 5)
    layout = Layout(
        gpu_rnn.cells.lstm().program.text, torch.half, "ieee", False, 1, 1, 1, 1, 1, 1, 0, True, True, False, 1
    )
    same = {deadline.number_of(layout, torch.Size((steps, 1 + steps % 7, 1, 4, 8))) for steps in range(100)}
    assert len(same) == len(deadline._numbers) == len(deadline._launched) == 1
    for hidden in range(9, 30):
        number = deadline.number_of(layout, torch.Size((2, 3, 1, 4, hidden)))
        assert 0 < number <= 5 and f"(T 2, B 3, N 1, H {hidden}, " in deadline._name(number)
    assert len(deadline._numbers) <= 5 and len(deadline._launched) <= 5


@pytest.mark.parametrize(
    "steps", [pytest.param(3_000, id="quick"), pytest.param(100_000, id="long", marks=pytest.mark.slow)]
)
def test_many_steps_are_right(steps: int) -> None:
    """Beside torch.nn's layer, outputs and gradients."""
    torch.manual_seed(0)
    theirs = torch.nn.GRU(3, 4, dtype=torch.float64)
    ours = gpu_rnn.GRU(3, 4, backend="step", dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(steps, 2, 3, dtype=torch.float64)
    found = []
    for layer in (theirs, ours):
        y, h = layer(x)
        (y.square().mean() + h.sum()).backward()
        found.append([y, h, *(p.grad for p in layer.parameters())])
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected)


def test_sixteen_threads() -> None:
    """Each calls layers of its own and one of all."""
    shared = gpu_rnn.LSTM(3, 4, activation="softsign")
    xs = [torch.randn(1 + k, 2, 3) for k in range(16)]
    expected = [shared(x)[0] for x in xs]

    def work(k: int) -> bool:
        own = gpu_rnn.LSTM(3, 4, backend="step")
        for _ in range(5):
            own(xs[k])[0].sum().backward()
            if not torch.equal(shared(xs[k])[0], expected[k]):
                return False
        return all(p.grad is not None and p.grad.isfinite().all() for p in own.parameters())

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(work, range(16)))


class Encoded(Dataset[torch.Tensor]):
    """Samples that a layer has encoded, in a data loader's worker."""

    def __init__(self, layer: torch.nn.Module) -> None:
        self.layer = layer

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        with torch.no_grad():
            return self.layer(torch.full((3, 1, 2), float(index)))[0].clone()


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize(
    "method",
    ["fork", pytest.param("spawn", marks=pytest.mark.slow), pytest.param("forkserver", marks=pytest.mark.slow)],
)
def test_workers_of_a_data_loader(method: str) -> None:
    if method not in get_all_start_methods():
        pytest.skip(f"this platform has no {method}")
    data = Encoded(gpu_rnn.GRU(2, 3, activation="softsign"))
    expected = [data[index] for index in range(len(data))]
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context=method, timeout=PATIENCE)
    for found, wanted in zip(loader, expected, strict=True):
        torch.testing.assert_close(found, wanted)


def interrupt(work: Callable[[], Any], after: float) -> bool:
    """Runs it in a thread in which KeyboardInterrupt is raised after some seconds; whether it came in time."""
    outcome: list[bool] = []

    def run() -> None:
        try:
            work()
            outcome.append(False)
        except KeyboardInterrupt:
            outcome.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    time.sleep(after)
    while thread.is_alive():  # again, should it have been raised where Python ignores it, as in a finalizer
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident or 0), ctypes.py_object(KeyboardInterrupt)
        )
        thread.join(timeout=5)
    return bool(outcome) and outcome[0]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("backend", ["step", "reference"])
def test_an_interrupted_call_leaves_everything_usable(backend: str) -> None:
    """Ctrl-C while a new cell is traced, in the loop, in the backward pass."""
    x = torch.randn(200, 2, 3)
    layer = gpu_rnn.GRU(3, 4, backend=backend, activation="softsign")
    expected = layer(x)[0]
    numbers = itertools.count(10**6)

    def work() -> None:
        while True:
            gpu_rnn.Recurrent(cell(next(numbers)), 3, 4, backend=backend)(x)[0].sum().backward()

    grad, precision = torch.is_grad_enabled(), torch.backends.cuda.matmul.fp32_precision
    for k in range(12):
        assert interrupt(work, 0.02 + 0.013 * k)
        torch.testing.assert_close(layer(x)[0], expected, rtol=0, atol=0)
    assert (torch.is_grad_enabled(), torch.backends.cuda.matmul.fp32_precision) == (grad, precision)
    gpu_rnn.Recurrent(cell(next(numbers)), 3, 4, backend=backend)(x)[0].sum().backward()
