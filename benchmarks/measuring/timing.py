# SPDX-License-Identifier: Apache-2.0
"""What measuring needs beside `gpu_rnn.diagnostics.timing`: replays of CUDA graphs, and peak memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from gpu_rnn.diagnostics import timing
from gpu_rnn.diagnostics.timing import FEWEST, WARM_UP, Timed, Timing

__all__ = ["FEWEST", "WARM_UP", "Timed", "Timing", "interleave", "peak_memory", "threads"]

GRAPH_CALLS = 20  # in one graph, so that launching the graph is a small part of its time


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """So many threads of torch on a CPU; None leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def interleave(
    calls: Mapping[str, Timed],
    device: torch.device,
    *,
    trials: int,
    seconds: float,
    deadline: float,
    graph: bool = False,
) -> dict[str, Timing]:
    """`gpu_rnn.diagnostics.timing.interleave`, on a GPU with `graph` of replays of a CUDA graph, which leaves out what
    the host takes to launch. All calls or none: where one of them cannot be captured, all are timed by events."""
    limits = {"trials": trials, "seconds": seconds, "deadline": deadline}
    if graph and device.type == "cuda":
        captured = {name: replay for name, call in calls.items() if (replay := _captured(call))}
        if captured.keys() == calls.keys():
            found = timing.interleave(captured, device, **limits)
            return {name: _of_one_call(replays) for name, replays in found.items()}
    return timing.interleave(calls, device, **limits)


def _of_one_call(replays: Timing) -> Timing:
    return Timing("graph", replays.calls * GRAPH_CALLS, [seconds / GRAPH_CALLS for seconds in replays.samples])


def peak_memory(call: Timed, device: torch.device) -> float | None:
    """MiB that a call takes from the device on top of its input and weights; None on a CPU."""
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def _captured(call: Timed) -> Timed | None:
    """Replays of a CUDA graph of the call, or None where it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(GRAPH_CALLS):
                call()
    except RuntimeError:  # what torch raises for any operation that capturing forbids
        torch.cuda.synchronize()
        return None
    return graph.replay
