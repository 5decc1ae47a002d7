# SPDX-License-Identifier: Apache-2.0
"""What surrounds a launch where h is projected (`proj_size`): the kernel runs a recurrence that projects nothing.

With h = W_hr m, where m is what the units make, W_hh h is (W_hh W_hr) m. So a step takes one product and one exchange,
those of as many units without projection, and all h are one product after the loop. An h that no step made enters no
such product: what a row begins with, and what it is reset to. Its own product is added to the gates of the step that
starts from it, and m is 0 there.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gpu_rnn.backends import linear, onednn
from gpu_rnn.backends.group.outside import Outside
from gpu_rnn.backends.normalisation import Normalised
from gpu_rnn.backends.problem import Problem
from gpu_rnn.backends.step.product import normalised_products
from gpu_rnn.backends.tensors import Call, LoopGradients, Result, chunks, state_dtype, turned, within_lengths
from gpu_rnn.backends.throughput import product_rate
from gpu_rnn.compiler.evaluation import runner
from gpu_rnn.compiler.operations import live
from gpu_rnn.compiler.program import lookup
from gpu_rnn.once import once

Index = int | tuple[Tensor, ...]

# Options that do not act on h between two steps.
BESIDE = ("lengths", "flags", "reset_values", "all_states", "norm", "rms", "rebuilds")
LAUNCH = 2e-6  # seconds, as in `rates.Rates.group` those of what clears an exchange
LAUNCHES = {"inference": 6, "training": 6, "backward": 16}  # torch's, counted in a call without options
REMADE = 30  # bytes read and written to make a unit's m of a step again, in three operations and a cast


def plain(problem: Problem) -> Problem:
    """What the kernel runs."""
    return problem.but(proj_size=0) if problem.proj_size else problem


def refused(problem: Problem) -> list[str]:
    """Why the products with W_hr and W_hh cannot be one: factors and kept units act on h between the two. And where not
    all gates are sums, the product of an h that no step made has no place."""
    program = problem.program
    if not problem.proj_size:
        return []
    reasons = [f"{reason} with a projection of h (proj_size)" for reason in problem.without(*BESIDE)]
    if program.split:
        reasons.append(f"projects h (proj_size) where all gates are sums, not {', '.join(program.split)}")
    if problem.flags and program.initial[0]:
        reasons.append("resets a projected h (proj_size) to 0 or to values given")
    return reasons


def around(problem: Problem) -> float:
    """Seconds of what surrounds the launches, products at the peak rate; 0 without projection."""
    if not problem.proj_size:
        return 0.0
    H, P, G = problem.H, problem.proj_size, problem.G
    rows, matrices = problem.layers * problem.N * problem.T * problem.B, problem.layers * problem.N
    products = matrices * G * H * P * H
    if problem.direction == "backward":
        products += rows * (3 * H * P + G * H * P)
    else:
        products += rows * (H * P + G * H * P * problem.flags)
    remaking = REMADE * rows * H / (problem.device.memory_rate * 1e9) if problem.direction == "backward" else 0.0
    return 2 * products / product_rate(problem) + remaking + LAUNCH * LAUNCHES[problem.direction]


class Folded:
    """A call with a projection, and as one without it.

    Attributes:
        projected: the call itself, of h.
        call: of m.
    """

    def __init__(self, call: Call) -> None:
        weights, states, values = call.weights, call.states, call.reset_values
        assert weights.w_hr is not None
        self.projected, self.w_hr = call, weights.w_hr
        self.w_hh = weights.w_hh.flatten(1, 2)  # (N, G·H, P)
        both = onednn.bmm(self.w_hh, self.w_hr).view(*weights.w_hh.shape[:3], self.w_hr.shape[-1])
        self.call = replace(
            call,
            weights=weights._replace(w_hh=both, w_hr=None),
            states=[_nothing(states[0], both), *states[1:]],
            reset_values=[_nothing(value, both) for value in values[:1]] + values[1:],
            problem=plain(call.problem),
        )

    @once
    def outside(self) -> Outside | None:
        """Where steps are skipped or rows reset."""
        flags = self.projected.controls.flags
        return None if flags is None or not len(flags) else Outside.of(self.projected)

    def enter(self, gates: Tensor) -> None:
        """Adds what h from outside makes to the gates, (T, B, N, G, H)."""
        if self.outside is not None:
            gates += self._products(self.outside.entering())
        elif len(gates):
            first = self._place(len(gates), last=False)
            gates[first] += self._products(self.projected.states[0].contiguous()[None])[0]

    def _products(self, h: Tensor) -> Tensor:
        """(T, B, N, G, H): what h, (T, B, N, P), is in the gates."""
        call, weights = self.projected, self.projected.weights
        products = _times(h, self.w_hh.mT).unflatten(-1, weights.w_hh.shape[1:3])
        if weights.norm is None:
            return products
        normal = call.normaliser.normalise(products.to(state_dtype(products.dtype)))  # 0 of an h of 0
        return (normal.values * weights.norm).to(products.dtype)

    def leave(self, result: Result) -> Result:
        """What the kernel gave, with h in place of m."""
        call, steps = self.projected, len(result.y)
        y = _times(result.y, self.w_hr.mT)
        if self.outside is not None:
            y = self.outside.leaving(y)
        h = y[self._place(steps, last=True)].clone() if steps else call.states[0].clone()
        return result._replace(y=y, final=[self._of_rows_without_steps(call.states[0], h), *result.final[1:]])

    def saved(self, saved: Result) -> Result:
        """What a forward pass saved, of m, which is made again; with the normalised products of h, those of an h from
        outside too, where the kernel would have them of m."""
        made, lengths = _made(self.projected, saved), self.projected.controls.lengths
        if self.outside is not None:
            made = self.outside.carried(made)
        of_m = saved._replace(y=made if lengths is None else _within(made, lengths))
        if self.projected.weights.norm is None:
            return of_m
        normal = normalised_products(self.projected, saved)
        return of_m._replace(kept=Normalised(*(part.expand(2, *part.shape) for part in normal)))

    def of_outputs(self, d_y: Tensor, d_final: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The gradients of the kernel's outputs from those of h, (T, B, N, P), and of the final states."""
        return _times(d_y, self.w_hr), [_times(d_final[0][None], self.w_hr)[0], *d_final[1:]]

    def gradients(self, saved: Result, loop: LoopGradients, d_y: Tensor, d_h: Tensor) -> LoopGradients:
        """The gradients that the loop makes, with those of W_hr and of h in place of m.

        `saved` is that of m, `d_y` the gradient of h after each step, `d_h` of the last.
        """
        call, steps = self.projected, len(d_y)
        d_products = loop.d_gates if loop.d_products is None else loop.d_products
        d_entering = _times(d_products.flatten(3), self.w_hh)
        d_y = d_y if call.controls.lengths is None else _within(d_y, call.controls.lengths)
        d_w_hr = linear.of_projection(d_y, saved.y)
        d_w_hr += linear.of_projection(d_entering, linear.entered(self.call, saved, 0))
        d_first, d_values = d_h, list[Tensor]()
        if steps:
            d_w_hr += linear.of_projection(d_h[None], saved.y[self._place(steps, last=True)][None])
            d_first = self._of_rows_without_steps(d_h, d_entering[self._place(steps, last=False)])
        if self.outside is not None:
            d_first, d_values = self.outside.gradients(d_entering, d_y, d_h)
        return loop._replace(
            d_states=[d_first, *loop.d_states[1:]], d_resets=[*d_values, *loop.d_resets[1:]], d_w_hr=d_w_hr
        )

    def _of_rows_without_steps(self, theirs: Tensor, others: Tensor) -> Tensor:
        """(B, N, P): those where a row has a length of 0."""
        lengths = self.projected.controls.lengths
        return others if lengths is None else torch.where((lengths > 0)[:, None, None], others, theirs)

    def _place(self, steps: int, *, last: bool) -> Index:
        """Where the first or the last step of each row lies, in tensors of all steps."""
        call, lengths = self.projected, self.projected.controls.lengths
        if "1" not in call.reverse and (lengths is None or not last):
            return steps - 1 if last else 0
        first = call.states[0]
        rows = torch.arange(len(first), device=first.device)[:, None]
        end = torch.full_like(rows, steps - 1) if lengths is None else (lengths[:, None] - 1).clamp(min=0)
        reverse = turned(call.reverse, first.device)
        return torch.where(reverse == last, 0, end), rows, torch.arange(len(reverse), device=first.device)


def _times(values: Tensor, weights: Tensor) -> Tensor:
    """(T, B, N, X) times (N, X, Y), without gaps."""
    return torch.einsum("tbnx,nxy->tbny", values, weights).contiguous()


def _nothing(h: Tensor, like: Tensor) -> Tensor:
    """The m of an h that no step made."""
    return h.new_zeros(*h.shape[:-1], like.shape[-1])


def _within(values: Tensor, lengths: Tensor) -> Tensor:
    """(T, B, N, X), 0 beyond a row's length."""
    return torch.where(within_lengths(lengths, len(values))[..., None, None], values, 0)


def _made(call: Call, saved: Result) -> Tensor:
    """(T, B, N, H): m of each step, from the gates and the other states after it; whatever it is where there was none.

    Of the step this takes but what comes after those states, in an LSTM two activations and their product.
    """
    program, (stage,), params = call.program, call.program.stages, call.weights.params
    output, wide = stage.outputs[0], state_dtype(saved.gates.dtype)
    over_time = {f"a_{gate}": saved.gates[..., g, :] for g, gate in enumerate(program.gates)}
    over_time |= dict(zip(map(str, stage.outputs[1:]), saved.inner, strict=True))
    ops = live([op for op in stage.ops if op.result not in over_time], [output])
    read = {str(output), *(str(arg) for op in ops for arg in op.args)}
    for k, name in enumerate(program.state_names):
        if f"s_{name}" in read - over_time.keys():
            over_time[f"s_{name}"] = linear.entered(call, saved, k)
    alike = {} if params is None else {f"p_{name}": params[:, i].to(wide) for i, name in enumerate(program.params)}
    made, run = saved.gates.new_empty(saved.gates[..., 0, :].shape), runner(ops, (output,))
    for part in chunks(saved.gates):
        values = {name: value[part].to(wide) for name, value in over_time.items() if name in read} | alike
        run(values)
        made[part] = lookup(values, output, made[part])
    return made
