# SPDX-License-Identifier: Apache-2.0
"""What people write where torch.nn has no layer: a loop over time of torch operations, one for every option.

The products of the input with its weights are taken for all steps at once, and of ragged batches the rows that have
ended drop out, as a careful user would have it. With torch.compile the formula of a step is what Inductor gets: a
whole loop of 100 steps takes it minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases.names import BY_HAND, COMPILED
from benchmarks.cases.options import Option
from benchmarks.cases.variants import Case, Variant
from gpu_rnn.layers import regularization

States = tuple[Tensor, ...]
# (x_t, r_t, states, peepholes) -> the new states; x_t and r_t are the step's two products.
Step = Callable[[Tensor, Tensor, States, Tensor | None], States]

FUNCTIONS = {"softsign": F.softsign, "hard_sigmoid": F.hardsigmoid}


def refuses(case: Case) -> str:
    problem = case.problem
    if problem.layers > 1 or problem.bidirectional or problem.heads > 1:
        return "one layer, forward in time, is what is written by hand"
    if case.option.layer.get("recurrent_dropout_per_gate"):
        return "dropout with a mask for each gate is not written by hand"
    return ""


def by_hand(case: Case, layers: list[nn.Module], call: Mapping[str, Any]) -> Variant:
    return _variant(BY_HAND, case, layers[0], call, _step(case))


def compiled(case: Case, layers: list[nn.Module], call: Mapping[str, Any]) -> Variant:
    """The same with the formula of a step compiled, as if it were the process's first: Dynamo compiles a function for
    few kinds of call only."""
    torch._dynamo.reset()
    return _variant(COMPILED, case, layers[0], call, torch.compile(_step(case)))


def _step(case: Case) -> Step:
    given = case.option.layer
    phi = FUNCTIONS.get(given.get("activation", ""), torch.tanh)
    sigma = FUNCTIONS.get(given.get("recurrent_activation", ""), torch.sigmoid)
    if case.option.recurrence is not None:
        return _coupled_lstm
    if case.problem.cell == "LSTM":
        return partial(_lstm, phi=phi, sigma=sigma)
    return partial(_gru, phi=phi, sigma=sigma) if case.problem.cell == "GRU" else _rnn


def _lstm(x: Tensor, r: Tensor, s: States, p: Tensor | None, phi: Any, sigma: Any) -> States:
    i, f, g, o = (x + r).chunk(4, 1)
    if p is not None:
        i, f = i + p[0] * s[1], f + p[1] * s[1]
    c = sigma(f) * s[1] + sigma(i) * phi(g)
    if p is not None:
        o = o + p[2] * c
    return sigma(o) * phi(c), c


def _coupled_lstm(x: Tensor, r: Tensor, s: States, p: Tensor | None) -> States:
    """`options.coupled_lstm`"""
    i, f, g, o = (x + r).chunk(4, 1)
    f = f.sigmoid()
    c = f * s[1] + (1 - f) * i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(x: Tensor, r: Tensor, s: States, p: Tensor | None, phi: Any, sigma: Any) -> States:
    (x_r, x_z, x_n), (r_r, r_z, r_n) = x.chunk(3, 1), r.chunk(3, 1)
    z = sigma(x_z + r_z)
    return ((1 - z) * phi(x_n + sigma(x_r + r_r) * r_n) + z * s[0],)


def _rnn(x: Tensor, r: Tensor, s: States, p: Tensor | None) -> States:
    return (torch.tanh(x + r),)


def _variant(name: str, case: Case, layer: nn.Module, call: Mapping[str, Any], step: Step) -> Variant:
    weights = dict(layer.named_parameters())
    plain = {name.removeprefix("cell.").removesuffix("_l0"): weight for name, weight in weights.items()}
    loop = _Loop(case, plain, step)
    forward = partial(_ragged, loop, call["lengths"]) if "lengths" in call else partial(loop, call=call)
    return Variant(name, forward, {name: (weight,) for name, weight in weights.items()})


class _Loop:
    """The loop of a case, its options as branches of a Python program."""

    def __init__(self, case: Case, weights: dict[str, Tensor], step: Step) -> None:
        self.option: Option = case.option
        self.units, self.count = case.problem.H, 2 if case.problem.cell == "LSTM" else 1
        self.weights, self.step = weights, step
        self.before = case.option.layer.get("reset_after") is False
        self.stepwise = case.problem.stepwise
        self.training = case.direction == "training"

    def __call__(self, x: Tensor, call: Mapping[str, Any]) -> tuple[Tensor, ...]:
        states = (x.new_zeros(x.shape[1], self.units),) * self.count
        drop, keeps, every = self.dropped(x), self.zones(x), []
        for t, inputs in enumerate(self.products(x)):
            if "resets" in call:
                states = tuple(torch.where(call["resets"][t, :, None], 0, s) for s in states)
            new = self.once(inputs, states, drop)
            new = self.zoned(new, states, keeps, t)
            if "mask" in call:
                new = tuple(torch.where(call["mask"][t, :, None], n, s) for n, s in zip(new, states, strict=True))
            states = new
            every.append(states if "mask" not in call else (torch.where(call["mask"][t, :, None], new[0], 0), *new[1:]))
        y, *others = (torch.stack(each) for each in zip(*every, strict=True))
        last = [state[None] for state in states]
        if "return_all_states" in call:
            return y, *last, *(each[:, None] for each in (y, *others))
        return y, *last

    def products(self, x: Tensor) -> States:
        w = self.weights
        if self.stepwise:  # a decoder's input is there no sooner
            return tuple(F.linear(each, w["weight_ih"], w["bias_ih"]) for each in x)
        if "norm_ih" not in w:
            return F.linear(x, w["weight_ih"], w["bias_ih"]).unbind()
        return (self.normalised(F.linear(x, w["weight_ih"]), w["norm_ih"]) + w["bias_ih"]).unbind()

    def once(self, inputs: Tensor, states: States, drop: Tensor | None) -> States:
        w = self.weights
        h = states[0] if drop is None else states[0] * drop
        if self.before:
            return self.reset_before(inputs, h)
        if "norm_hh" in w:
            r = self.normalised(F.linear(h, w["weight_hh"]), w["norm_hh"]) + w["bias_hh"]
        else:
            r = F.linear(h, w["weight_hh"], w["bias_hh"])
        return self.step(inputs, r, states, w.get("weight_peephole"))

    def reset_before(self, inputs: Tensor, h: Tensor) -> States:
        """A GRU whose reset gate acts before the product."""
        (w_rz, w_n), (b_rz, b_n) = (
            self.weights[name].split([2 * self.units, self.units]) for name in ("weight_hh", "bias_hh")
        )
        r, z = (inputs[:, : 2 * self.units] + F.linear(h, w_rz, b_rz)).sigmoid().chunk(2, 1)
        n = torch.tanh(inputs[:, 2 * self.units :] + F.linear(r * h, w_n, b_n))
        return ((1 - z) * n + z * h,)

    def normalised(self, values: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(values.unflatten(-1, (-1, self.units)), (self.units,)).flatten(-2) * scale

    def dropped(self, x: Tensor) -> Tensor | None:
        probability = self.option.layer.get("recurrent_dropout")
        if not (probability and self.training):
            return None
        return regularization.recurrent_mask(x, probability, (1, x.shape[1], 1, self.units))[0, :, 0]

    def zones(self, x: Tensor) -> list[Tensor]:
        """Of each state the units that keep it, (T, B, H); at evaluation none, as `zoned` has it."""
        probability = self.option.layer.get("zoneout")
        if not (probability and self.training):
            return []
        return [torch.rand(*x.shape[:2], self.units) < probability for _ in range(self.count)]

    def zoned(self, new: States, old: States, keeps: list[Tensor], t: int) -> States:
        probability = self.option.layer.get("zoneout")
        if not probability:
            return new
        if keeps:
            return tuple(torch.where(k[t], o, n) for k, n, o in zip(keeps, new, old, strict=True))
        return tuple(probability * o + (1 - probability) * n for n, o in zip(new, old, strict=True))


def _ragged(loop: _Loop, lengths: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """Rows in the order of their lengths, so that those which have ended leave the batch."""
    order = lengths.argsort(descending=True)
    running = (torch.arange(len(x))[:, None] < lengths).sum(1).tolist()
    states = (x.new_zeros(x.shape[1], loop.units),) * loop.count
    outputs = []
    for inputs, rows in zip(loop.products(x[:, order]), running, strict=True):
        if rows == 0:
            outputs.append(torch.zeros_like(states[0]))
            continue
        new = loop.once(inputs[:rows], tuple(state[:rows] for state in states), None)
        states = tuple(torch.cat([n, old[rows:]]) for n, old in zip(new, states, strict=True))
        outputs.append(F.pad(new[0], (0, 0, 0, len(lengths) - rows)))
    back = order.argsort()
    return torch.stack(outputs)[:, back], *(state[back][None] for state in states)
