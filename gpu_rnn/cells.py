# SPDX-License-Identifier: Apache-2.0
"""The recurrences of the library, a few lines each. Formulas and gate orders: docs of each function."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
import torch.nn.functional as F

from gpu_rnn import activations, spelling
from gpu_rnn.activations import Activation
from gpu_rnn.compiler.program import Program
from gpu_rnn.memo import memoize
from gpu_rnn.recurrence import Recurrence

Name = str | Activation
STAYS = "a cell of the library is one object, by which torch.compile knows a graph again; their names are few"


def _remembered(make: Callable[..., Recurrence]) -> Callable[..., Recurrence]:
    """One recurrence for each set of names and flags, all else by default. Those of functions and numbers are made
    anew: a closure may hold a whole model, and numbers are many."""
    signature, by_name = inspect.signature(make), memoize(None, stays=STAYS)(make)

    @wraps(make)
    def cell(*args: Name | bool, **options: Any) -> Recurrence:
        try:
            call = signature.bind(*args, **options)
        except TypeError as error:
            near = spelling.meant(min(options.keys() - signature.parameters, default=""), signature.parameters)
            raise TypeError(f"{make.__name__}() {error}{near}") from None
        call.apply_defaults()
        given = call.arguments
        if "clip" in given:
            given["clip"] = activations.checked_clip(given["clip"])
        if all(isinstance(v, (str, bool)) or v == signature.parameters[name].default for name, v in given.items()):
            return by_name(*call.args, **call.kwargs)
        recurrence = make(*call.args, **call.kwargs)
        _ = recurrence.program  # what a function cannot be is said here, not at the first call
        return recurrence

    return cell


@_remembered
def rnn(activation: Name = "tanh", *, clip: float | None = None) -> Recurrence:
    """Elman RNN: h' = φ(W_ih x + b_ih + W_hh h + b_hh). Each cell's `clip` cuts what enters φ and σ to ±clip."""
    phi = activations.get(activation, clip)

    def elman(x: Any, r: Any, s: Any) -> Any:
        return phi(x.h + r.h)

    standard = clip is None and isinstance(activation, str) and activation in ("tanh", "relu")
    aten = f"RNN_{str(activation).upper()}" if standard else None
    return Recurrence.lazy([(("h",), elman)], states=("h",), name="rnn", aten=aten)


@_remembered
def lstm(
    activation: Name = "tanh",
    recurrent_activation: Name = "sigmoid",
    peephole: bool = False,
    *,
    clip: float | None = None,
) -> Recurrence:
    """LSTM, gates i, f, g, o: c' = σ(f) c + σ(i) φ(g), h' = σ(o) φ(c').

    With `peephole`, i and f also see p·c and o sees p·c' (Gers & Schmidhuber, IJCNN 2000).
    """
    phi, sigma = activations.get(activation, clip), activations.get(recurrent_activation, clip)

    def step(x: Any, r: Any, s: Any) -> Any:
        i, f, g, o = sigma(x.i + r.i), sigma(x.f + r.f), phi(x.g + r.g), sigma(x.o + r.o)
        c = f * s.c + i * g
        return o * phi(c), c

    def peephole_step(x: Any, r: Any, s: Any, p: Any) -> Any:
        i, f = sigma(x.i + r.i + p.i * s.c), sigma(x.f + r.f + p.f * s.c)
        c = f * s.c + i * phi(x.g + r.g)
        return sigma(x.o + r.o + p.o * c) * phi(c), c

    gates, states = ("i", "f", "g", "o"), ("h", "c")
    if peephole:
        return Recurrence.lazy([(gates, peephole_step)], states=states, params=("i", "f", "o"), name="peephole_lstm")
    return Recurrence.lazy(
        [(gates, step)], states=states, name="lstm", aten=_standard(activation, recurrent_activation, clip, "LSTM")
    )


@_remembered
def gru(
    activation: Name = "tanh",
    recurrent_activation: Name = "sigmoid",
    reset_after: bool = True,
    *,
    clip: float | None = None,
) -> Recurrence:
    """GRU, gates r, z, n: h' = (1 − z) n + z h.

    The reset gate acts after the product as in torch, n = φ(x_n + r · (W_hn h + b_hn)), or with
    ``reset_after=False`` before it, n = φ(x_n + W_hn (r·h) + b_hn) (Cho et al., arXiv:1406.1078): two dependent
    products a step.
    """
    phi, sigma = activations.get(activation, clip), activations.get(recurrent_activation, clip)

    def step(x: Any, r: Any, s: Any) -> Any:
        reset, z = sigma(x.r + r.r), sigma(x.z + r.z)
        n = phi(x.n + reset * r.n)
        return (1 - z) * n + z * s.h

    def first(x: Any, r: Any, s: Any) -> Any:
        return sigma(x.r + r.r) * s.h, sigma(x.z + r.z)

    def second(x: Any, r: Any, s: Any, p: Any, values: Any) -> Any:
        (z,) = values
        return (1 - z) * phi(x.n + r.n) + z * s.h

    if not reset_after:
        return Recurrence.lazy([(("r", "z"), first), (("n",), second)], states=("h",), name="gru_reset_before")
    aten = _standard(activation, recurrent_activation, clip, "GRU")
    return Recurrence.lazy([(("r", "z", "n"), step)], states=("h",), name="gru", aten=aten)


@_remembered
def coupled_lstm(
    activation: Name = "tanh", recurrent_activation: Name = "sigmoid", *, clip: float | None = None
) -> Recurrence:
    """LSTM with coupled input and forget gates, gates f, g, o: c' = σ(f) c + (1 − σ(f)) φ(g) (Greff et al.,
    arXiv:1503.04069)."""
    phi, sigma = activations.get(activation, clip), activations.get(recurrent_activation, clip)

    def step(x: Any, r: Any, s: Any) -> Any:
        f = sigma(x.f + r.f)
        c = f * s.c + (1 - f) * phi(x.g + r.g)
        return sigma(x.o + r.o) * phi(c), c

    return Recurrence.lazy([(("f", "g", "o"), step)], states=("h", "c"), name="coupled_lstm")


@memoize(1, stays=STAYS)
def slstm() -> Recurrence:
    """sLSTM of xLSTM with exponential input gate, gates i, f, z, o (Beck et al., arXiv:2405.04517, eqs. 8 to 17).

    States: h, the cell c, the normaliser n and the stabiliser m, which starts at −∞ so that the first step takes the
    input gate's own scale.
    """

    def step(x: Any, r: Any, s: Any) -> Any:
        i, f = x.i + r.i, F.logsigmoid(x.f + r.f)
        m = torch.maximum(f + s.m, i)
        keep, write = torch.exp(f + s.m - m), torch.exp(i - m)
        c = keep * s.c + write * torch.tanh(x.z + r.z)
        n = keep * s.n + write
        return torch.sigmoid(x.o + r.o) * c / n, c, n, m

    return Recurrence(
        step,
        gates=("i", "f", "z", "o"),
        states={"h": 0.0, "c": 0.0, "n": 0.0, "m": -float("inf")},
        name="slstm",
    )


CELLS: dict[str, Callable[..., Recurrence]] = {
    "rnn": rnn,
    "lstm": lstm,
    "gru": gru,
    "gru_reset_before": partial(gru, reset_after=False),
    "peephole_lstm": partial(lstm, peephole=True),
    "coupled_lstm": coupled_lstm,
    "slstm": slstm,
}
"""Every cell by name; called without arguments, at its defaults."""


def of_text(text: str) -> Recurrence:
    """The recurrence of a program's text: the library's own, which ATen knows, where the text comes from that."""
    # None is traced for it, which nothing can be below torch's dispatcher.
    alike = _of_aten().get(Program.parse(text).name, ())
    own = (cell for cell in alike if cell.is_traced and cell.program.text == text)
    return next(own, None) or _from_program(text)


@memoize(1, stays=STAYS)
def _of_aten() -> dict[str, tuple[Recurrence, ...]]:
    """The cells that ATen has, by the names of their programs."""
    return {"rnn": (rnn(), rnn("relu")), "lstm": (lstm(),), "gru": (gru(),)}


_from_program = memoize(256)(Recurrence.from_program)


def _standard(activation: Name, recurrent_activation: Name, clip: float | None, mode: str) -> str | None:
    """ATen's name for the cell, where the activations are the ones it knows."""
    return mode if (activation, recurrent_activation, clip) == ("tanh", "sigmoid", None) else None
