# SPDX-License-Identifier: Apache-2.0
"""Chunks of steps as CUDA graphs over buffers of their own, so that one graph serves every number of steps.

What is over after the last whole chunk runs without a graph. The buffers belong to one stream, one shape and one cell.
While the user captures a graph, the loop runs inside of it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from gpu_rnn.launch import interpreter
from gpu_rnn.layout import Call

CHUNK = 32  # steps a graph; capture takes CHUNK times the eager loop's launches, once per shape
GRAPHS, BYTES = 16, 1 << 30  # graphs that are kept, and what their buffers may take together besides the newest's

_one_call = threading.RLock()


def alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """On the tensors' device, and one at a time: two threads may share a stream, hence a graph and its buffers."""

    @wraps(function)
    def locked(call: Call, *rest: Any) -> Any:
        with _one_call, torch.cuda.device_of(call.weights.w_hh):
            return function(call, *rest)

    return locked


class Chunks:
    """Runs steps in chunks: where there is a GPU full ones as a replayed graph, over buffers kept for the next call.

    The first call with a key runs without a graph; the second captures one.
    """

    kept: OrderedDict[tuple[Any, ...], Chunks] = OrderedDict()  # noqa: RUF012

    def __init__(self, loop: Any, chunk: int, graphed: bool) -> None:
        self.loop, self.chunk, self.graphed = loop, chunk, graphed
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    @classmethod
    def get(cls, key: tuple[Any, ...], make: Callable[[int], Any], like: Tensor) -> Chunks:
        steps = like.shape[0]
        if not like.is_cuda or steps < CHUNK or torch.cuda.is_current_stream_capturing():
            return cls(make(steps), steps, graphed=False)
        stream = torch.cuda.current_stream(like.device).cuda_stream
        key = (*key, tuple(like.shape[1:]), like.dtype, like.device, stream)
        if key not in cls.kept:
            while len(cls.kept) >= GRAPHS or sum(_bytes(chunks.loop) for chunks in cls.kept.values()) > BYTES:
                cls.kept.popitem(last=False)
            with torch.inference_mode(False), torch.no_grad():  # later calls may be in another mode
                cls.kept[key] = cls(make(CHUNK), CHUNK, graphed=True)
        cls.kept.move_to_end(key)
        cls.kept[key].calls += 1
        return cls.kept[key]

    def run(self, steps: int) -> None:
        """The steps now in the buffers."""
        with interpreter.arithmetic():
            if not self.graphed or steps < self.chunk or self.calls == 1:
                self.loop.run(steps)
                return
            if self.graph is None:
                self.graph = _capture(self.loop, steps)
            self.graph.replay()


def _bytes(value: Any) -> int:
    """Of the tensors that a loop holds, in lists too."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, (list, tuple)):
        return sum(map(_bytes, value))
    return sum(map(_bytes, vars(value).values())) if hasattr(value, "run") else 0


def _capture(loop: Any, steps: int) -> torch.cuda.CUDAGraph:
    """Capturing runs nothing: the buffers stay as they are. Other threads may go on with theirs."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
        loop.run(steps)
    return graph
