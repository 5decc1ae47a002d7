# SPDX-License-Identifier: Apache-2.0
"""The step loop on a GPU: a batched product and one generated Triton kernel a stage, in chunks that are CUDA graphs.

A graph holds `CHUNK` steps over buffers of its own, so that it serves every T; what is over runs without a graph. The
buffers belong to one stream, one shape and one cell. While the user captures a graph, the loop runs inside of it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from gpu_rnn.derivative import carried_values
from gpu_rnn.launch import interpreter
from gpu_rnn.launch.generated import triton_module
from gpu_rnn.layout import (
    Call,
    LoopGradients,
    Result,
    Weights,
    processing_order,
    reorder,
    reorder_each,
    state_dtype,
)
from gpu_rnn.products import inputs_over_time
from gpu_rnn.program import Program

CHUNK = 32  # steps a graph; capture takes CHUNK times the eager loop's launches, once per shape
GRAPHS = 16  # graphs that are kept
BLOCK = 256  # elements a program of the pointwise kernels


def runs(gates: Tensor, call: Call) -> bool:
    """Whether this loop takes a call: on a GPU with Triton, or in its interpreter; the rest goes to the loop in torch."""
    narrow = gates.dtype in (torch.float16, torch.bfloat16, torch.float32)
    on_device = interpreter.INTERPRETING or (gates.is_cuda and find_spec("triton") is not None)
    return on_device and narrow and call.weights.w_hr is None and call.control[1:] == (None,) * 3 and call.weights.norm is None


@dataclass(frozen=True)
class _StageShape:
    """The compile-time part of a stage's launch."""

    number: int
    rows: slice
    kept: tuple[int, ...]
    kept_first: int
    reads: int
    hands_on: int  # -1 for the last stage


def _stages(program: Program) -> list[_StageShape]:
    shapes, split = [], program.split
    for number, (stage, rows) in enumerate(zip(program.stages, program.rows, strict=True)):
        kept = tuple(split.index(gate) if gate in split else -1 for gate in stage.gates)
        last = number == len(program.stages) - 1
        hands_on = -1 if last else len(carried_values(program, number + 1))
        own = [k for k in kept if k >= 0]
        shapes.append(_StageShape(number, rows, kept, min(own, default=0), len(carried_values(program, number)), hands_on))
    return shapes


class _Forward:
    """A number of forward steps over fixed buffers."""

    def __init__(self, program: Program, like: Tensor, steps: int, lengths: bool, bias: bool, save: bool) -> None:
        _, batch, n, gates, hidden = like.shape
        self.program, self.shapes, self.save, self.module = program, _stages(program), save, triton_module(program)
        compute, states = torch.float32, len(program.states)
        values = max(shape.reads for shape in self.shapes)
        self.gates = like.new_empty(steps, batch, n, gates, hidden)
        self.recurrent = like.new_empty(steps, batch, n, len(program.split), hidden)
        self.inner = like.new_empty(states - 1, steps, batch, n, hidden, dtype=compute)
        self.y = like.new_empty(steps, batch, n, hidden)
        self.states = like.new_empty(states, batch, n, hidden, dtype=compute)
        self.values = like.new_empty(values, batch, n, hidden, dtype=compute)
        self.entering = like.new_empty(n, batch, hidden)
        self.matrices = [like.new_empty(n, hidden, len(shape.kept) * hidden) for shape in self.shapes]
        self.b_hh = like.new_empty(n, gates, hidden) if bias else None
        self.params = like.new_empty(n, len(program.params), hidden)
        self.left = torch.empty(batch, dtype=torch.int64, device=like.device) if lengths else None

    def load(self, weights: Weights, states: list[Tensor]) -> None:
        for shape, matrix in zip(self.shapes, self.matrices, strict=True):
            matrix.copy_(weights.w_hh[:, shape.rows].flatten(1, 2).transpose(1, 2))
        if self.b_hh is not None and weights.b_hh is not None:
            self.b_hh.copy_(weights.b_hh)
        if weights.params is not None:
            self.params.copy_(weights.params)
        for buffer, state in zip(self.states, states, strict=True):
            buffer.copy_(state)
        self.entering.copy_(states[0].transpose(0, 1))

    def run(self, steps: int) -> None:
        from gpu_rnn.kernels.triton.step import step_forward

        _, batch, n, gates, hidden = self.gates.shape
        grid = (-(-batch * n * hidden // BLOCK),)
        for t in range(steps):
            for shape, matrix in zip(self.shapes, self.matrices, strict=True):
                product = torch.bmm(self.entering, matrix)
                step_forward[grid](
                    self.gates[t],
                    self.recurrent[t],
                    self.inner[:, t],
                    self.y[t],
                    self.states,
                    self.values,
                    self.entering,
                    product,
                    self.b_hh,
                    self.params,
                    self.left,
                    t,
                    self.inner.stride(0),
                    batch,
                    n,
                    hidden,
                    STEP=getattr(self.module, f"step_{shape.number}"),
                    KEPT=shape.kept,
                    FIRST=shape.rows.start,
                    G=gates,
                    R=len(self.program.split),
                    S=len(self.states),
                    P=len(self.program.params),
                    V_IN=shape.reads,
                    V_OUT=shape.hands_on,
                    SAVE=self.save,
                    BLOCK=BLOCK,
                )


class _Backward:
    """A number of backward steps over fixed buffers."""

    def __init__(self, program: Program, like: Tensor, steps: int, lengths: bool) -> None:
        _, batch, n, gates, hidden = like.shape
        self.program, self.shapes, self.module = program, _stages(program), triton_module(program)
        compute, states = torch.float32, len(program.states)
        values = [shape.reads for shape in self.shapes]
        self.gates, self.d_gates = (like.new_empty(steps, batch, n, gates, hidden) for _ in range(2))
        self.recurrent, self.d_recurrent = (
            like.new_empty(steps, batch, n, len(program.split), hidden) for _ in range(2)
        )
        self.before = like.new_empty(states, steps, batch, n, hidden, dtype=compute)
        self.values = [like.new_empty(count, steps, batch, n, hidden, dtype=compute) for count in values]
        self.d_y = like.new_empty(steps, batch, n, hidden)
        self.d_states = like.new_empty(states, batch, n, hidden, dtype=compute)
        self.d_seed = like.new_empty(n, batch, hidden)
        self.d_values = like.new_empty(max(values), batch, n, hidden, dtype=compute)
        self.products = [like.new_empty(n, batch, len(shape.kept) * hidden) for shape in self.shapes]
        self.matrices = [like.new_empty(n, len(shape.kept) * hidden, hidden) for shape in self.shapes]
        self.params = like.new_empty(n, len(program.params), hidden)
        self.d_params = like.new_empty(batch, n, len(program.params), hidden, dtype=compute)
        self.left = torch.empty(batch, dtype=torch.int64, device=like.device) if lengths else None

    def load(self, weights: Weights, d_final: list[Tensor]) -> None:
        for shape, matrix in zip(self.shapes, self.matrices, strict=True):
            matrix.copy_(weights.w_hh[:, shape.rows].flatten(1, 2))
        if weights.params is not None:
            self.params.copy_(weights.params)
        for buffer, state in zip(self.d_states, d_final, strict=True):
            buffer.copy_(state)
        self.d_seed.zero_()
        self.d_params.zero_()

    def run(self, steps: int) -> None:
        from gpu_rnn.kernels.triton.step import step_backward

        _, batch, n, gates, hidden = self.gates.shape
        grid = (-(-batch * n * hidden // BLOCK),)
        for t in reversed(range(steps)):
            for shape in reversed(self.shapes):
                step_backward[grid](
                    self.gates[t],
                    self.recurrent[t],
                    self.before[:, t],
                    self.values[shape.number][:, t],
                    self.d_y[t],
                    self.d_states,
                    self.d_seed,
                    self.d_values,
                    self.d_gates[t],
                    self.d_recurrent[t],
                    self.products[shape.number],
                    self.d_params,
                    self.params,
                    self.left,
                    t,
                    self.before.stride(0),
                    batch,
                    n,
                    hidden,
                    STEP=getattr(self.module, f"step_{shape.number}_backward"),
                    KEPT=shape.kept,
                    KEPT_FIRST=shape.kept_first,
                    FIRST=shape.rows.start,
                    G=gates,
                    R=len(self.program.split),
                    S=len(self.d_states),
                    P=len(self.program.params),
                    V_IN=shape.reads,
                    V_OUT=shape.hands_on,
                    BLOCK=BLOCK,
                )
                torch.bmm(self.products[shape.number], self.matrices[shape.number], out=self.d_seed)


_one_call = threading.RLock()


def _alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """On the tensors' device, and one at a time: two threads may share a stream, hence a graph and its buffers."""

    @wraps(function)
    def locked(call: Call, *rest: Any) -> Any:
        with _one_call, torch.cuda.device_of(call.weights.w_hh):
            return function(call, *rest)

    return locked


class _Chunks:
    """Runs steps in chunks: where there is a GPU full ones as a replayed graph, over buffers kept for the next call.

    The first call with a key runs without a graph; the second captures one.
    """

    kept: OrderedDict[tuple[Any, ...], _Chunks] = OrderedDict()  # noqa: RUF012

    def __init__(self, loop: Any, chunk: int, graphed: bool) -> None:
        self.loop, self.chunk, self.graphed = loop, chunk, graphed
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    @classmethod
    def get(cls, key: tuple[Any, ...], make: Callable[[int], Any], like: Tensor) -> _Chunks:
        steps = like.shape[0]
        if not like.is_cuda or steps < CHUNK or torch.cuda.is_current_stream_capturing():
            return cls(make(steps), steps, graphed=False)
        stream = torch.cuda.current_stream(like.device).cuda_stream
        key = (*key, tuple(like.shape[1:]), like.dtype, like.device, stream)
        if key not in cls.kept:
            while len(cls.kept) >= GRAPHS:
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


def _capture(loop: Any, steps: int) -> torch.cuda.CUDAGraph:
    """Capturing runs nothing: the buffers stay as they are. Other threads may go on with theirs."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
        loop.run(steps)
    return graph


@_alone
def forward(call: Call, gates: Tensor, save: bool) -> Result:
    """As `step.forward`."""
    program, weights, states, lengths, problem = call.program, call.weights, call.states, call.lengths, call.problem
    steps, batch, n, _, hidden = gates.shape
    order = processing_order(steps, lengths, call.reverse, gates.device)
    gates = reorder(gates, order)
    bias = weights.b_hh is not None
    chunks = _Chunks.get(
        ("forward", program.text, lengths is not None, bias, save, problem.precision),
        lambda count: _Forward(program, gates, count, lengths is not None, bias, save),
        gates,
    )
    loop = chunks.loop
    loop.load(weights, states)
    y = gates.new_empty(steps, batch, n, hidden)
    recurrent = gates.new_empty(steps, batch, n, len(program.split), hidden) if save else gates.new_empty(0)
    inner = y.new_empty(len(states) - 1, steps, batch, n, hidden, dtype=state_dtype(y.dtype)) if save else y.new_empty(0)
    for start in range(0, steps, chunks.chunk):
        count = min(chunks.chunk, steps - start)
        part = slice(start, start + count)
        loop.gates[:count].copy_(gates[part])
        if loop.left is not None and lengths is not None:
            loop.left.copy_(lengths - start)
        chunks.run(count)
        y[part] = loop.y[:count]
        if save:
            gates[part], recurrent[part] = loop.gates[:count], loop.recurrent[:count]
            inner[:, part] = loop.inner[:, :count]
    final = [state.to(gates.dtype) for state in loop.states.clone()]
    y = reorder(y, order)
    if not save:
        return Result(y, final, y.new_empty(0), recurrent, inner)
    return Result(y, final, reorder(gates, order), reorder(recurrent, order), reorder_each(inner, order))


@_alone
def backward(call: Call, saved: Result, d_y: Tensor, d_final: list[Tensor]) -> LoopGradients:
    """As `step.backward`, without a projection."""
    program, weights, lengths, problem = call.program, call.weights, call.lengths, call.problem
    steps = d_y.shape[0]
    order = processing_order(steps, lengths, call.reverse, d_y.device)
    over_time = inputs_over_time(call, saved)
    before = [reorder(over_time[f"s_{name}"], order) for name in program.state_names]
    read: list[list[Tensor]] = []
    for number, stage in enumerate(program.stages):
        read.append([reorder(over_time[name], order) for name in carried_values(program, number)])
        if number < len(program.stages) - 1:
            stage.run(over_time)
    gates, recurrent = reorder(saved.gates, order), reorder(saved.recurrent, order)
    d_y = reorder(d_y, order)
    chunks = _Chunks.get(
        ("backward", program.text, lengths is not None, problem.precision),
        lambda count: _Backward(program, gates, count, lengths is not None),
        gates,
    )
    loop = chunks.loop
    loop.load(weights, d_final)
    d_gates, d_recurrent = torch.empty_like(gates), torch.empty_like(recurrent)
    for start in reversed(range(0, steps, chunks.chunk)):
        count = min(chunks.chunk, steps - start)
        part = slice(start, start + count)
        loop.gates[:count].copy_(gates[part])
        loop.recurrent[:count].copy_(recurrent[part])
        loop.d_y[:count].copy_(d_y[part])
        for buffer, state in zip(loop.before, before, strict=True):
            buffer[:count].copy_(state[part])
        for buffers, values in zip(loop.values, read, strict=True):
            for buffer, value in zip(buffers, values, strict=True):
                buffer[:count].copy_(value[part])
        if loop.left is not None and lengths is not None:
            loop.left.copy_(lengths - start)
        chunks.run(count)
        d_gates[part], d_recurrent[part] = loop.d_gates[:count], loop.d_recurrent[:count]
    d_states = list(loop.d_states.clone())
    d_states[0] = d_states[0] + loop.d_seed.transpose(0, 1)
    d_params = loop.d_params.sum(0) if program.params else None
    return LoopGradients(reorder(d_gates, order), reorder(d_recurrent, order), d_states, d_params)
