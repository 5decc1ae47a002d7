# SPDX-License-Identifier: Apache-2.0
"""What the host does for a call on a GPU, counted where there is none: imported in a process of `stub_driver`.

Kernels and Python's function calls are counted: nothing else that runs on the machine changes them. Microseconds are
of this machine's host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

import gpu_rnn
from benchmarks.measuring.counting import fastest, functions
from benchmarks.stub_driver.gpu import driver

HIDDEN = 64
BEFORE = 3  # calls until all that is kept of them is there
# ATen's operations that launch nothing on a GPU by themselves: views, allocations, and those that are made of others.
WITHOUT_KERNEL = frozenset(
    "as_strided as_strided_ expand view _unsafe_view _reshape_alias view_as select slice narrow unbind split "
    "split_with_sizes transpose transpose_ t permute movedim numpy_T unsqueeze squeeze squeeze_ unflatten flatten "
    "alias detach resolve_conj empty empty_like empty_strided new_empty contiguous reshape to linear matmul".split()
)


class Host(NamedTuple):
    """What the host does for one call."""

    torch_kernels: list[str]  # ATen's operations that launch one, by name and in order
    own_kernels: list[str]
    functions: int  # calls of Python functions
    us: float


def calls() -> dict[str, Callable[[], object]]:
    """The calls that are counted: each is the same problem every time. Their kernels are `resident`'s."""
    layer = {name: getattr(gpu_rnn, name)(HIDDEN, HIDDEN, backend="resident") for name in ("LSTM", "GRU")}
    both = gpu_rnn.LSTM(HIDDEN, HIDDEN, bidirectional=True, backend="resident")
    stack = gpu_rnn.LSTM(HIDDEN, HIDDEN, num_layers=2, backend="resident")
    return {
        "streaming LSTM": _streaming(layer["LSTM"]),
        "streaming GRU": _streaming(layer["GRU"]),
        "bidirectional LSTM": _streaming(both),
        "two LSTM layers": _streaming(stack),
        "training LSTM": _training(layer["LSTM"]),
        "training GRU": _training(layer["GRU"]),
    }


def _streaming(layer: Any) -> Callable[[], object]:
    """T = 1, B = 1, in inference, with the states of the step before."""
    x = torch.randn(1, 1, HIDDEN)
    state = torch.zeros(layer.num_layers * (1 + layer.bidirectional), 1, HIDDEN)
    states = (state, state.clone()) if isinstance(layer, gpu_rnn.LSTM) else state

    def call() -> object:
        with torch.no_grad():
            return layer(x, states)

    return call


def _training(layer: Any) -> Callable[[], object]:
    """T = 8, B = 4, both passes, of the first layer of a model: its input has no gradient."""
    x, weights = torch.randn(8, 4, HIDDEN), list(layer.parameters())
    d_y = torch.ones(8, 4, HIDDEN)
    return lambda: torch.autograd.grad(layer(x)[0], weights, d_y)


def of(call: Callable[[], object]) -> Host:
    """Counts a call that has run before; it may be run any number of times."""
    for _ in range(BEFORE):
        call()
    kernels = _torch_kernels(call)
    driver.clear()
    call()
    own = [launch.kernel for launch in driver.launches]
    return Host(kernels, own, functions(call), fastest(call))


def _torch_kernels(call: Callable[[], object]) -> list[str]:
    # Without acc_events some releases warn that a second cycle would forget the first; there is one.
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as seen:
        call()
    events = [event for event in seen.events() if _launches(event)]
    return [event.name.removeprefix("aten::") for event in events if not any(map(_launches, _around(event)))]


def _launches(event: FunctionEvent) -> bool:
    name = event.name.removeprefix("aten::")
    return name != event.name and name not in WITHOUT_KERNEL


def _around(event: FunctionEvent) -> Iterator[FunctionEvent]:
    """The operations that an operation is a part of: on a CPU the sum of an addmm fills its result first."""
    while (event := event.cpu_parent) is not None:
        yield event
