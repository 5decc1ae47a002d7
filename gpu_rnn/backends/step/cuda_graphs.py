# SPDX-License-Identifier: Apache-2.0
"""Chunks of steps as CUDA graphs over buffers of their own, so that a few graphs serve every number of steps.

Steps left after the last full chunk are graphs of 16, 8, 4, 2 and 1 over the same buffers. These belong to one stream,
one shape and one cell. While the user captures a graph, the loop runs inside of it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import wraps
from itertools import accumulate
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from gpu_rnn import memo
from gpu_rnn.backends import triton_interpreter
from gpu_rnn.backends.tensors import Call
from gpu_rnn.forking import renewed

# Steps of a graph at most, a power of two; capture takes as many times the eager loop's launches, once per shape.
CHUNK = 32
GRAPHS, BYTES = 16, 1 << 30  # graphs that are kept, and what their buffers may take together besides the newest's

_one_call = renewed(threading.RLock)


def alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """On the tensors' device, and one at a time: two threads may share a stream, hence a graph and its buffers."""

    @wraps(function)
    def locked(call: Call, *rest: Any) -> Any:
        with _one_call, torch.cuda.device_of(call.weights.w_hh):
            return function(call, *rest)

    return locked


class Steps(Protocol):
    """A number of steps over buffers of their own."""

    def run(self, steps: int) -> None:
        """So many, of what is in the buffers."""

    def nbytes(self) -> int:
        """Of the buffers."""


S = TypeVar("S", bound=Steps)


class Chunks(Generic[S]):
    """Runs steps in chunks: on a GPU as replayed graphs, over buffers kept for the next call.

    The first call with a key runs without a graph over buffers of its own, and so loads every kernel that the graph
    has. From the second on there is one, if the first came to its end.
    """

    # None: a first call came to its end
    kept: OrderedDict[tuple[Any, ...], Chunks[Any] | None] = memo.hold(
        f"{__name__}.Chunks.kept", OrderedDict(), GRAPHS, alone=_one_call
    )

    def __init__(self, loop: S, chunk: int, key: tuple[Any, ...] = (), place: _Place | None = None) -> None:
        """`chunk`: the steps that the buffers hold; `place`: where graphs are captured, without one there are none."""
        self.loop, self.chunk, self.key, self.place = loop, chunk, key, place
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}  # by their steps

    @classmethod
    def get(cls, key: tuple[Any, ...], make: Callable[[int], S], like: Tensor) -> Chunks[S]:
        steps = like.shape[0]
        if not like.is_cuda or 0 in like.shape or torch.cuda.is_current_stream_capturing():
            return cls(make(steps), steps)
        chunk = min(CHUNK, 1 << (steps.bit_length() - 1))  # no more memory than a short call takes by itself
        stream = torch.cuda.current_stream(like.device).cuda_stream
        key = (*key, tuple(like.shape[1:]), like.dtype, like.device, stream)
        chunks = cls.kept.get(key)
        if chunks is not None and chunks.chunk >= chunk:
            cls.kept.move_to_end(key)
            return chunks
        place = None if key not in cls.kept or _in_a_lent_pool(like.device) else _place(like.device, stream)
        if place is None:
            return cls(make(chunk), chunk, key)
        del cls.kept[key]
        cls._make_room(BYTES)
        with torch.inference_mode(False), torch.no_grad():  # later calls may be in another mode
            chunks = cls.kept[key] = cls(make(chunk), chunk, key, place)
        return chunks

    @classmethod
    def _make_room(cls, most: float = float("inf")) -> None:
        """For one more: the oldest go, and what they hold with them."""
        kept = cls.kept
        while len(kept) >= GRAPHS or sum(chunks.loop.nbytes() for chunks in kept.values() if chunks) > most:
            kept.popitem(last=False)

    def parts(self, steps: int) -> list[slice]:
        """So many steps as `run` takes them: full chunks, and of what is left each power of two in it."""
        full, left = divmod(steps, self.chunk)
        powers = [1 << bit for bit in reversed(range(left.bit_length())) if left >> bit & 1]
        rest = powers if self.place is not None else [left] * (left > 0)
        ends = list(accumulate([self.chunk] * full + rest))
        return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]

    def run(self, steps: int) -> None:
        """The steps now in the buffers, as many as one of `parts` has."""
        with triton_interpreter.arithmetic():
            if self.place is None:
                self.loop.run(steps)
            else:
                graph = self.graphs[steps] = self.graphs.get(steps) or self._capture(steps, self.place)
                graph.replay()
        if self.key and self.key not in Chunks.kept:
            self._make_room()
            Chunks.kept[self.key] = None

    def _capture(self, steps: int, place: _Place) -> torch.cuda.CUDAGraph:
        """Capturing runs nothing: the buffers stay as they are. Other threads may go on with theirs.

        torch.cuda.graph would wait for the device and empty the process's caches first.
        """
        Chunks.kept.pop(self.key, None)  # if this fails, the next call is a first one
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(place.stream):
            graph.capture_begin(None if place.first is None else place.first.pool(), capture_error_mode="thread_local")
            try:
                self.loop.run(steps)
            finally:
                graph.capture_end()
        place.first = place.first or graph
        Chunks.kept[self.key] = self
        return graph


class _Place:
    """Where all graphs that are replayed on one stream are captured: on a stream of their own, into memory that they
    share, as nothing stands in it between two replays.

    cuBLAS's workspace of that stream lies there as well, for it is made in the first capture. That graph stays, and
    with it the memory, so that no other can come to use what a graph still writes to.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream
        self.first: torch.cuda.CUDAGraph | None = None


STREAMS = 32  # that torch hands out in turn
_places: dict[tuple[torch.device, int], _Place] = memo.hold(
    f"{__name__}._places", {}, None, stays="a stream's cuBLAS workspace lies in its first graph's memory"
)


def _place(device: torch.device, stream: int) -> _Place | None:
    """That of a stream; None where torch has no stream left for one. A stream's priority says nothing of a graph's, and
    few others use those of a higher one."""
    if (device, stream) not in _places:
        taken = {place.stream for place in _places.values()}
        drawn = (torch.cuda.Stream(device, priority=-1) for _ in range(STREAMS))
        free = next((each for each in drawn if each not in taken), None)
        if free is None:
            return None
        _places[device, stream] = _Place(free)
    return _places[device, stream]


def _in_a_lent_pool(device: torch.device) -> bool:
    """Whether what is allocated now comes from a pool of somebody else's, as under torch.cuda.use_mem_pool or in the
    warm-up of torch.compile(mode="reduce-overhead"). It would be given out again while a graph still writes to it, and
    torch.compile refuses what outlives its call."""
    if torch.cuda.get_allocator_backend() != "native":  # others have no such pools
        return False
    probe = torch.empty(1, device=device)
    for segment in torch.cuda.memory_snapshot():
        inside = 0 <= probe.data_ptr() - segment["address"] < segment["total_size"]
        if inside and segment["device"] == probe.device.index:
            return tuple(segment["segment_pool_id"]) != (0, 0)
    return False
