# SPDX-License-Identifier: Apache-2.0
"""A number of steps on a GPU over fixed buffers: a batched product and one pointwise kernel a stage.

Everything a step reads stands in these buffers, so that a CUDA graph of the steps can be replayed for another call.

A projection of h is a recurrence of its own, whose one gate is the product with W_hr and whose new h is that product:
so the kernels that steer states steer a projected h too, of P units. The h of the recurrence itself is the one before
its projection then, which no control concerns: what the kernels keep of it is never read.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpu_rnn.backends.linear import runs
from gpu_rnn.backends.normalisation import Normalised, Normaliser
from gpu_rnn.backends.step.product import Product, masks
from gpu_rnn.backends.tensors import OF_STATES, PLAIN, Call
from gpu_rnn.compiler.derivative import carried_values
from gpu_rnn.compiler.program import Program
from gpu_rnn.compiler.triton_module import triton_module

BLOCK = 256  # elements a program of the pointwise kernels
# elements: each step begins at a multiple of it, so that the kernels' variants do not depend on the step, T or B
ALIGN = 16
PROJECTION = Program.parse("program 1 projection\nstate h 0.0\nstage h:split\nreturn r_h\n")


class Kind(NamedTuple):
    """What decides which buffers there are, and which instructions in the kernels."""

    bias: bool
    flags: bool  # masked steps or resets
    reset_values: int  # 0: none given, 1: the same at all steps, 2: some of each step
    of_states: tuple[str, ...]  # `tensors.OF_STATES` that there are
    drop: int  # 0, 1 or the number of gates
    norm: bool
    save: bool = False
    inner: bool = False  # forward: the states of all steps are kept; backward: they have gradients
    projection: int = 0  # P of a projected h
    rms: bool = False  # the products are normalised by their root mean square

    @staticmethod
    def of(call: Call, save: bool = False, inner: bool = False) -> Kind:
        weights, controls, values = call.weights, call.controls, call.reset_values
        flags = controls.flags is not None or controls.lengths is not None
        reset_values = max((min(len(value), 2) for value in values), default=0)
        drop = 0 if controls.drop is None else controls.drop.shape[2]
        of_states = tuple(name for name in OF_STATES if getattr(controls, name) is not None)
        bias, norm = weights.b_hh is not None, weights.norm is not None
        projection = 0 if weights.w_hr is None else weights.w_hr.shape[1]
        return Kind(bias, flags, reset_values, of_states, drop, norm, save, inner, projection, call.rms)

    @property
    def of_projection(self) -> Kind:
        """What there is of it in a projection's own steps."""
        return Kind(False, self.flags, self.reset_values, self.of_states, 0, False)


class _StageShape(NamedTuple):
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
        kept_first = min((k for k in kept if k >= 0), default=0)
        reads = len(carried_values(program, number))
        shapes.append(_StageShape(number, rows, kept, kept_first, reads, hands_on))
    return shapes


def over_time(like: Tensor, outer: tuple[int, ...], each: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """(*outer, *each) of steps that are contiguous, (*each), each at a multiple of `ALIGN` elements."""
    count = math.prod(each)
    room = like.new_empty(*outer, -(-count // ALIGN) * ALIGN, dtype=dtype)
    return room[..., :count].view(*outer, *each)


def _nbytes(value: Any) -> int:
    if isinstance(value, (list, tuple)):
        return sum(map(_nbytes, value))
    if isinstance(value, _Steps):
        return value.nbytes()
    return value.nbytes if isinstance(value, Tensor) else 0


class _Steps:
    """What both directions have: the weights and what steers the steps."""

    projection: Any  # the steps of the projection of h, in the same direction; None without one

    def __init__(self, program: Program, like: Tensor, steps: int, kind: Kind, width: int = 0) -> None:
        """`like` (T, B, N, G, H); `width` of what enters the products, by default P of a projection, else H."""
        _, batch, n, gates, hidden = like.shape
        width = width or kind.projection or hidden
        self.program, self.kind, self.steps, self.normaliser = program, kind, steps, Normaliser.of(kind.rms)
        self.shapes, self.module = _stages(program), triton_module(program)
        self.gates = over_time(like, (steps,), (batch, n, gates, hidden))
        self.recurrent = over_time(like, (steps,), (batch, n, len(program.split), hidden))
        self.params = like.new_empty(n, len(program.params), hidden)
        self.flags = over_time(like, (steps,), (batch, n), torch.uint8) if kind.flags else None
        self.of_states = {name: self.states_over(like, torch.uint8) for name in kind.of_states}
        self.weights, self.drops, self.products, self.scales = [], [], [], []
        for shape in self.shapes:
            count = len(shape.kept)
            weights = like.new_empty(n, count, hidden, width)
            drop = like.new_empty(n, min(kind.drop, count), batch, width) if kind.drop else None
            product = Product.of(weights, drop)
            self.weights.append(weights)
            self.drops.append(drop)
            self.products.append(product)
            self.scales.append(
                like.new_empty(*product.batched_shape(n, 1), hidden, dtype=torch.float32) if kind.norm else None
            )
        self.grid = (-(-batch * n * hidden // BLOCK),)
        self.projection = self._with_projection(like) if kind.projection else None

    def _with_projection(self, like: Tensor) -> Any:
        """The steps of the projection of h. Only there units of h are kept: none of the h that is projected."""
        _, batch, n, _, hidden = like.shape
        projected = like.new_empty(0, batch, n, 1, self.kind.projection)
        projection = type(self)(PROJECTION, projected, self.steps, self.kind.of_projection, hidden)
        projection.flags = self.flags
        for buffer in self.of_states.values():
            buffer[0].zero_()
        return projection

    @property
    def of_h(self) -> Any:
        """The steps whose first state is the h that is steered, handed out, and enters the next step."""
        return self if self.projection is None else self.projection

    def each_state(self, name: str) -> list[Tensor]:
        """A buffer (S, ...) by state, with the h that is steered; empty where there is none."""
        buffer, of_h = (s.of_states[name] if name in OF_STATES else getattr(s, name) for s in (self, self.of_h))
        return [] if buffer is None else [of_h[0], *buffer[1:]]

    def states_over(self, like: Tensor, dtype: torch.dtype = torch.float32, count: int | None = None) -> Tensor:
        """(S or another number, steps, B, N, H)"""
        _, batch, n, _, hidden = like.shape
        count = len(self.program.states) if count is None else count
        return over_time(like, (count, self.steps), (batch, n, hidden), dtype)

    def nbytes(self) -> int:
        """Of all buffers, those of the projection too."""
        return sum(map(_nbytes, vars(self).values()))

    def load(self, call: Call) -> None:
        """What all steps of a call share."""
        weights, drop = call.weights, call.controls.drop
        for shape, w_hh, mask, scale in zip(self.shapes, self.weights, self.drops, self.scales, strict=True):
            w_hh.copy_(weights.w_hh[:, shape.rows])
            drop_mask = masks(drop, shape.rows)
            if mask is not None and drop_mask is not None:
                mask.copy_(drop_mask)
            if scale is not None and weights.norm is not None:
                scale.copy_(weights.norm[:, shape.rows].view_as(scale))
        if weights.params is not None:
            self.params.copy_(weights.params)
        if self.projection is not None and weights.w_hr is not None:
            own_weights = weights._replace(w_hh=weights.w_hr.unsqueeze(1), params=None, w_hr=None, norm=None)
            self.projection.load(replace(call, weights=own_weights, controls=PLAIN))

    def at(self, t: int, states: Tensor | None) -> Tensor | None:
        """One step of (S, steps, B, N, H)."""
        return None if states is None else states[:, t]

    def common(self, t: int, shape: _StageShape) -> dict[str, Any]:
        """The arguments that both kernels have."""
        _, batch, n, gates, hidden = self.gates.shape
        step = -(-batch * n * hidden // ALIGN)
        return {
            "p_gates": self.gates[t],
            "p_recurrent": self.recurrent[t],
            "p_params": self.params,
            "p_flags": None if self.flags is None else self.flags[t],
            **{f"p_{name}": self.at(t, self.of_states.get(name)) for name in OF_STATES},
            "state_stride": self.steps * step,
            "B": batch,
            "N": n,
            "H": hidden,
            "FIRST": shape.rows.start,
            "KEPT": shape.kept,
            "G": gates,
            "R": len(self.program.split),
            "S": len(self.program.states),
            "P": len(self.program.params),
            "V_IN": shape.reads,
            "V_OUT": shape.hands_on,
            "BY_GATE": self.products[shape.number].BY_GATE,
            "BLOCK": BLOCK,
        }


class ForwardSteps(_Steps):
    """A number of forward steps."""

    def __init__(self, program: Program, like: Tensor, steps: int, kind: Kind, width: int = 0) -> None:
        super().__init__(program, like, steps, kind, width)
        _, batch, n, gates, hidden = like.shape
        states, values = len(program.states), max(shape.reads for shape in self.shapes)
        self.inner = self.states_over(like, count=states - 1) if kind.inner else None
        self.y = over_time(like, (steps,), (batch, n, hidden))
        self.states = like.new_empty(states, batch, n, hidden, dtype=torch.float32)
        self.values = like.new_empty(values, batch, n, hidden, dtype=torch.float32)
        self.entering = like.new_empty(n, batch, hidden)
        self.b_hh = like.new_empty(n, gates, hidden) if kind.bias else None
        each = steps if kind.reset_values > 1 else 1
        self.reset = over_time(like, (states, each), (batch, n, hidden), torch.float32) if kind.flags else None

    def load(self, call: Call) -> None:
        super().load(call)
        if self.b_hh is not None and call.weights.b_hh is not None:
            self.b_hh.copy_(call.weights.b_hh)

    def start(self, states: list[Tensor]) -> None:
        """The states that the first step enters with."""
        for buffer, state in zip(self.each_state("states"), states, strict=True):
            buffer.copy_(state)
        self.of_h.entering.copy_(states[0].transpose(0, 1))

    def arguments(self, t: int, shape: _StageShape, product: Tensor) -> dict[str, Any]:
        """Of `step_forward`, for a stage of a step."""
        return self.common(t, shape) | {
            "p_inner": self.at(t, self.inner),
            "p_y": self.y[t],
            "p_states": self.states,
            "p_values": self.values,
            "p_entering": self.entering,
            "p_product": product,
            "p_b_hh": self.b_hh,
            "p_reset": self.at(t if self.kind.reset_values > 1 else 0, self.reset),
            "reset_stride": 0 if self.reset is None else self.reset.stride(0) // ALIGN,
            "STEP": getattr(self.module, f"step_{shape.number}"),
            "SAVE": self.kind.save,
        }

    def run(self, steps: int) -> None:
        for t in range(steps):
            self.step(t, self.of_h.entering)
            if self.projection is not None:
                self.projection.step(t, self.y[t].transpose(0, 1))

    def step(self, t: int, entering: Tensor) -> None:
        """`entering` (N, B, ·): the buffer of what enters the products."""
        from gpu_rnn.kernels.triton.step import step_forward

        for shape, product, scale in zip(self.shapes, self.products, self.scales, strict=True):
            multiplied = product.batched(entering)
            if scale is not None:
                multiplied = self.normaliser.normalise(multiplied).values.mul_(scale)
            step_forward[self.grid](**self.arguments(t, shape, multiplied))


class BackwardSteps(_Steps):
    """A number of backward steps."""

    def __init__(self, program: Program, like: Tensor, steps: int, kind: Kind, width: int = 0) -> None:
        super().__init__(program, like, steps, kind, width)
        _, batch, n, _, hidden = like.shape
        states, values = len(program.states), [shape.reads for shape in self.shapes]
        self.d_gates, self.d_recurrent = (
            over_time(like, (steps,), each.shape[1:]) for each in (self.gates, self.recurrent)
        )
        self.before = self.states_over(like)
        self.values = [self.states_over(like, count=count) for count in values]
        self.d_y = over_time(like, (steps,), (batch, n, hidden))
        self.d_inner = self.states_over(like, count=states - 1) if kind.inner else None
        self.d_entered = self.states_over(like) if kind.reset_values else None
        self.d_states = like.new_empty(states, batch, n, hidden, dtype=torch.float32)
        self.d_seed = like.new_empty(n, batch, hidden)
        self.d_values = like.new_empty(max(values), batch, n, hidden, dtype=torch.float32)
        self.d_params = like.new_empty(batch, n, len(program.params), hidden, dtype=torch.float32)
        batched = [product.batched_shape(n, batch) for product in self.products]
        self.d_products = [like.new_empty(*size, hidden) for size in batched]
        # With normalisation: the normalised products of all steps, and the gradients of the products.
        normed = batched if kind.norm else []
        wide = like.new_empty(0, dtype=torch.float32)
        self.normalised = [Normalised(*(wide.new_empty(steps, *size, last) for last in (hidden, 1))) for size in normed]
        self.through = [self.normaliser.back(products.rstd[0]) for products in self.normalised]
        self.d_raw = [like.new_empty(steps, *size, hidden) for size in normed]

    def start(self, d_final: list[Tensor]) -> None:
        """The gradients of the states after the last step."""
        self.d_states[0].zero_()  # and stays so with a projection: nothing of a step before is in its h
        for buffer, state in zip(self.each_state("d_states"), d_final, strict=True):
            buffer.copy_(state)
        for seed in (self.d_seed, self.of_h.d_seed):
            seed.zero_()
        self.d_params.zero_()

    def finish(self) -> list[Tensor]:
        """The gradients of the states that the first step entered with, (B, N, ·) each."""
        d_h, *d_others = (d.clone() for d in self.each_state("d_states"))
        return [d_h.add_(self.of_h.d_seed.transpose(0, 1)), *d_others]

    def run(self, steps: int) -> None:
        for t in reversed(range(steps)):
            if self.projection is not None:
                self.projection.step(t, self.d_y[t].transpose(0, 1))
            self.step(t, self.of_h.d_seed)

    def step(self, t: int, d_entering: Tensor) -> None:
        """`d_entering` (N, B, ·): the buffer of the gradients of what entered the products."""
        from gpu_rnn.kernels.triton.step import step_backward

        for shape in reversed(self.shapes):
            step_backward[self.grid](**self.arguments(t, shape))
            d, scale = self.d_products[shape.number], self.scales[shape.number]
            if scale is not None:
                d = self._through_norm(t, shape.number, d, scale)
            self.products[shape.number].batched_back(d, out=d_entering)

    def normalise(self, entering: list[Tensor]) -> None:
        """The products of a chunk again, from what entered each stage, (steps, B, N, H)."""
        for number, (product, values) in enumerate(zip(self.products, entering, strict=True)):
            raw = product.to_batched(product.over_time(values).float()).contiguous()
            self.normaliser.normalise(raw, self.normalised[number].at(slice(len(values))))

    def of_norm(self, d_gates: Tensor, d_recurrent: Tensor, d_products: Tensor, d_norm: Tensor) -> None:
        """Writes the gradients of a chunk's products, and adds those of the scales."""
        count = len(d_gates)
        for number, (shape, product) in enumerate(zip(self.shapes, self.products, strict=True)):
            d = torch.cat([source for _, source in runs(self.program, shape.rows, d_gates, d_recurrent)], 3)
            d_norm[:, shape.rows] += (d * product.from_batched(self.normalised[number].values[:count])).sum((0, 1))
            d_products[:, :, :, shape.rows] = product.from_batched(self.d_raw[number][:count])

    def _through_norm(self, t: int, number: int, d: Tensor, scale: Tensor) -> Tensor:
        return self.through[number](d * scale, self.normalised[number].at(t), self.d_raw[number][t])

    def arguments(self, t: int, shape: _StageShape) -> dict[str, Any]:
        """Of `step_backward`, for a stage of a step."""
        return self.common(t, shape) | {
            "p_before": self.before[:, t],
            "p_values": self.values[shape.number][:, t],
            "p_d_y": self.d_y[t],
            "p_d_inner": self.at(t, self.d_inner),
            "p_d_states": self.d_states,
            "p_d_seed": self.d_seed,
            "p_d_values": self.d_values,
            "p_d_gates": self.d_gates[t],
            "p_d_recurrent": self.d_recurrent[t],
            "p_d_product": self.d_products[shape.number],
            "p_d_params": self.d_params,
            "p_d_entered": self.at(t, self.d_entered),
            "STEP": getattr(self.module, f"step_{shape.number}_backward"),
            "KEPT_FIRST": shape.kept_first,
        }
