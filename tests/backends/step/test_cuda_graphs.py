# SPDX-License-Identifier: Apache-2.0
"""Which graphs of the step loop are made and kept, with stand-ins for a GPU's; what they compute is in
test_kernels.py."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import gpu_rnn
from gpu_rnn.backends.step import cuda_graphs
from tests.support.stub_driver import NEEDS_STUB, run

CHUNK = cuda_graphs.CHUNK


class Loop:
    """Takes so many bytes twice; `fails` at its next run."""

    def __init__(self, count: int, fails: bool = False) -> None:
        self.one, self.more = torch.empty(count, dtype=torch.uint8), torch.empty(count, dtype=torch.uint8)
        self.fails = fails

    def nbytes(self) -> int:
        return 2 * len(self.one)

    def run(self, steps: int) -> None:
        if self.fails:
            raise RuntimeError("no kernel")
        Device.log.append(f"run {steps}")


class Graph:
    """A CUDAGraph that writes down what is asked of it."""

    alive: weakref.WeakSet[Any] = weakref.WeakSet()  # noqa: RUF012

    def __init__(self) -> None:
        self.own = object()
        Graph.alive.add(self)

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        assert Device.stream >= 1000, "captured on a stream that others use"
        assert capture_error_mode == "thread_local"
        self.own = self.own if pool is None else pool
        Device.log.append("begin")

    def capture_end(self) -> None:
        Device.log.append("end")

    def replay(self) -> None:
        Device.log.append("replay")

    def pool(self) -> Any:
        return self.own


class Device:
    """What the stand-ins share."""

    log: list[str] = []  # noqa: RUF012
    stream = 1
    streams = 0  # that were made
    segment: tuple[int, int] = (0, 0)  # the pool that memory comes from


def stream(device: Any, priority: int) -> Any:
    """In turn, as torch hands them out."""
    assert priority == -1
    Device.streams += 1
    return 1000 + Device.streams % cuda_graphs.STREAMS


@contextmanager
def use(handle: Any) -> Iterator[None]:
    before, Device.stream = Device.stream, handle
    try:
        yield
    finally:
        Device.stream = before


def snapshot() -> list[dict[str, Any]]:
    """One segment holds everything."""
    return [{"address": 0, "total_size": 1 << 63, "device": None, "segment_pool_id": Device.segment}]


@pytest.fixture
def get(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`Chunks.get` for a tensor on a GPU, whose loop takes so many bytes twice."""
    gpu_rnn.clear_caches()
    monkeypatch.setattr(Device, "log", [])
    monkeypatch.setattr(Device, "streams", 0)
    monkeypatch.setattr(Device, "segment", (0, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=Device.stream))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "stream", use)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    monkeypatch.setattr(torch.cuda, "memory_snapshot", snapshot)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: Device.log.append("emptied"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: Device.log.append("waited"))
    monkeypatch.setattr(cuda_graphs, "_places", {})
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, device=None, **rest: empty(*size, **rest))

    def found(key: Any, size: int = 1, fails: bool = False, steps: int = CHUNK) -> cuda_graphs.Chunks:
        like = SimpleNamespace(shape=(steps, 2), is_cuda=True, device="cuda", dtype=torch.float32)
        return cuda_graphs.Chunks.get((key,), lambda steps: Loop(size, fails), like)  # type: ignore[arg-type]

    yield found
    gpu_rnn.clear_caches()


def called(get: Any, key: Any, size: int = 1, steps: int = 2 * CHUNK) -> cuda_graphs.Chunks:
    """What a call used, and `Device.log` of this call alone."""
    Device.log.clear()
    chunks: cuda_graphs.Chunks = get(key, size, steps=steps)
    for part in chunks.parts(steps):
        chunks.run(part.stop - part.start)
    return chunks


def captured(*steps: int) -> list[str]:
    """The log of graphs that are captured and replayed."""
    return [line for count in steps for line in ("begin", f"run {count}", "end", "replay")]


def warm(get: Any, key: Any, size: int = 1) -> cuda_graphs.Chunks:
    """A key's graph."""
    called(get, key, size)
    return called(get, key, size)


def test_the_second_call_captures_and_later_ones_replay(get: Any) -> None:
    called(get, 0, steps=2 * CHUNK + 3)
    assert Device.log == [f"run {CHUNK}", f"run {CHUNK}", "run 3"]
    called(get, 0, steps=2 * CHUNK + 3)
    assert Device.log == [*captured(CHUNK), "replay", *captured(2, 1)]
    called(get, 0, steps=2 * CHUNK + 3)
    assert Device.log == ["replay"] * 4


def test_every_number_of_steps_is_graphs_of_a_few_sizes_over_the_same_buffers(get: Any) -> None:
    called(get, 0)
    chunks = called(get, 0, steps=3 * CHUNK - 1)
    for steps in range(1, 3 * CHUNK):
        assert called(get, 0, steps=steps) is chunks
        assert Device.log == ["replay"] * (steps // CHUNK + (steps % CHUNK).bit_count())
        parts = chunks.parts(steps)
        assert [t for part in parts for t in range(part.start, part.stop)] == list(range(steps))
    assert sorted(chunks.graphs) == [1, 2, 4, 8, 16, CHUNK]


def test_buffers_hold_no_more_steps_than_a_call_has_until_one_has_more(get: Any) -> None:
    called(get, 0, steps=5)
    short = called(get, 0, steps=5)
    assert (short.chunk, Device.log) == (4, captured(4, 1))
    long = called(get, 0, steps=9)
    assert (long.chunk, Device.log) == (8, captured(8, 1))
    assert called(get, 0, steps=5) is long


def test_nothing_is_no_graph(get: Any) -> None:
    """torch warns of a graph without kernels."""
    like = SimpleNamespace(shape=(CHUNK, 0), is_cuda=True, device="cuda", dtype=torch.float32)
    assert [cuda_graphs.Chunks.get(("empty",), lambda steps: Loop(1), like).key for _ in range(3)] == [()] * 3  # type: ignore[arg-type]


def test_a_capture_neither_waits_nor_empties_the_caches(get: Any) -> None:
    """As torch.cuda.graph does. Graphs of a stream are captured on one other, and share their memory."""
    pools = [warm(get, key).graphs[CHUNK].pool() for key in range(5)]
    assert not {"emptied", "waited"} & set(Device.log)
    assert Device.streams == 1
    assert len(set(pools)) == 1
    with use(2):  # another stream's may be replayed at the same time
        other = warm(get, 0).graphs[CHUNK]
    assert other.pool() not in pools
    assert Device.streams == 2


def test_the_memory_of_a_stream_s_graphs_stays_when_all_have_gone(get: Any) -> None:
    """cuBLAS keeps a workspace in it, which graphs to come will use too."""
    pool = warm(get, 0).graphs[CHUNK].pool()
    cuda_graphs.Chunks.kept.clear()
    gc.collect()
    assert len(Graph.alive) == 1
    assert warm(get, 1).graphs[CHUNK].pool() is pool


def test_no_two_streams_graphs_share_a_workspace(get: Any) -> None:
    """torch hands out 32 streams in turn: who would get one of another's has no graph."""
    graphs = []
    for number in range(cuda_graphs.STREAMS + 3):
        with use(number):
            graphs.append(bool(warm(get, 0).graphs))
    assert graphs == [True] * cuda_graphs.STREAMS + [False] * 3
    assert len({place.stream for place in cuda_graphs._places.values()}) == cuda_graphs.STREAMS


def test_a_first_call_that_fails_leaves_the_next_one_a_first_call(get: Any) -> None:
    """A kernel that was not built would be loaded while a graph is captured, each time."""
    failing = get(0, fails=True)
    with pytest.raises(RuntimeError, match="no kernel"):
        failing.run(CHUNK)
    called(get, 0)
    assert "begin" not in Device.log
    called(get, 0)
    assert "begin" in Device.log


def test_a_capture_that_fails_ends_and_leaves_the_next_call_a_first_one(get: Any) -> None:
    called(get, 0)
    chunks = get(0, fails=True)
    with pytest.raises(RuntimeError, match="no kernel"):
        chunks.run(CHUNK)
    assert Device.log[-1] == "end"
    called(get, 0)
    assert "begin" not in Device.log


def test_nothing_is_kept_in_a_pool_of_somebody_else(get: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the warm-up of torch.compile(mode="reduce-overhead"), which refuses what outlives its call."""
    monkeypatch.setattr(Device, "segment", (0, 7))
    for _ in range(3):
        chunks = called(get, 0)
        assert Device.log == [f"run {CHUNK}", f"run {CHUNK}"]
    buffers = weakref.ref(chunks.loop)
    del chunks
    assert buffers() is None
    monkeypatch.setattr(Device, "segment", (0, 0))
    called(get, 0)
    assert "begin" in Device.log  # every kernel has run by now


def test_nothing_is_kept_while_a_graph_is_captured(get: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for _ in range(3):
        called(get, 0)
    assert "begin" not in Device.log
    assert not cuda_graphs.Chunks.kept


def test_the_oldest_goes_where_there_are_too_many(get: Any) -> None:
    first = warm(get, 0)
    assert get(0) is first
    for key in range(1, cuda_graphs.GRAPHS):
        warm(get, key)
    assert get(0) is first
    warm(get, "one more")
    assert get(0) is first  # used since key 1 was
    assert len(cuda_graphs.Chunks.kept) == cuda_graphs.GRAPHS


def test_the_oldest_goes_where_they_take_too_much(get: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "BYTES", 100)
    first, second = warm(get, 1, 30), warm(get, 2, 30)  # 60 bytes each
    assert get(1) is first
    warm(get, 3, 30)
    assert get(1) is first
    assert get(2) is not second


def test_what_goes_is_freed_at_once(get: Any) -> None:
    """The graph and the buffers, by reference counting alone."""
    gc.collect()
    gc.disable()
    try:
        for key in range(3 * cuda_graphs.GRAPHS):
            warm(get, key)
        assert (
            len(Graph.alive) == len(cuda_graphs.Chunks.kept) + 1 == cuda_graphs.GRAPHS + 1
        )  # the stream's first stays
    finally:
        gc.enable()


def test_clear_caches_frees_graphs_and_buffers(get: Any) -> None:
    """All but a stream's first graph; the next call is a first one."""
    for key in range(3):
        warm(get, key)
    buffers = [weakref.ref(chunks.loop.one) for chunks in cuda_graphs.Chunks.kept.values()]  # type: ignore[union-attr]
    assert len(Graph.alive) == 3 and all(each() is not None for each in buffers)
    gc.disable()
    try:
        gpu_rnn.clear_caches()
        assert len(Graph.alive) == 1 and not any(each() is not None for each in buffers)
    finally:
        gc.enable()
    called(get, 0)
    assert "begin" not in Device.log
    called(get, 0)
    assert "begin" in Device.log


def test_clear_caches_waits_for_another_thread_s_step_loop(get: Any) -> None:
    warm(get, 0)
    running, go_on = threading.Event(), threading.Event()

    def run() -> None:
        with cuda_graphs._one_call:
            running.set()
            go_on.wait(60)
            assert len(cuda_graphs.Chunks.kept) == 1

    with ThreadPoolExecutor(2) as pool:
        loop = pool.submit(run)
        assert running.wait(60)
        cleared = pool.submit(gpu_rnn.clear_caches)
        with pytest.raises(TimeoutError):
            cleared.result(0.05)
        go_on.set()
        loop.result(60), cleared.result(60)
    assert not cuda_graphs.Chunks.kept


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # Python 3.12 says so of every such fork
def test_a_child_forked_while_another_thread_is_in_the_loop_can_run_one() -> None:
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with cuda_graphs._one_call:
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        os._exit(0 if cuda_graphs._one_call.acquire(timeout=20) else 1)
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


IN_GRAPHS = """
from contextlib import nullcontext
from types import SimpleNamespace
from gpu_rnn.backends.step import cuda_graphs

replays = []


class Graph:
    capture_begin = lambda *_, **__: None
    capture_end = pool = lambda self: None
    replay = lambda self: replays.append(self)


place, get = cuda_graphs._Place(None), cuda_graphs.Chunks.get.__func__
torch.cuda.CUDAGraph, torch.cuda.stream = Graph, lambda stream: nullcontext()
torch.cuda.is_current_stream_capturing = lambda: False
torch.cuda.current_stream = lambda device: SimpleNamespace(cuda_stream=0)
cuda_graphs._place, cuda_graphs._in_a_lent_pool = lambda *_: place, lambda device: False


def on_a_gpu(cls, key, make, like):
    return get(cls, key, make, SimpleNamespace(shape=like.shape, is_cuda=True, device=like.device, dtype=like.dtype))


cuda_graphs.Chunks.get = classmethod(on_a_gpu)
layer = gpu_rnn.GRU(8, 16, backend="step")
for steps in (1, 5, 31, 32, 33, 100):
    x = torch.randn(steps, 2, 8)
    for _ in range(3):
        driver.clear(), replays.clear()
        layer(x)[0].sum().backward()
    print(steps, len(driver.launches), len(replays))
"""


@pytest.mark.compile
@NEEDS_STUB
def test_no_step_of_a_call_that_was_made_twice_is_launched_by_the_host() -> None:
    """Both passes, with Triton's launcher over the stub driver and stand-ins for graphs."""
    for line in run(IN_GRAPHS).splitlines():
        steps, launched, replayed = map(int, line.split())
        assert (launched, replayed) == (0, 2 * (steps // CHUNK + (steps % CHUNK).bit_count()))
