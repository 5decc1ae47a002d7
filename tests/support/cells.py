# SPDX-License-Identifier: Apache-2.0
"""Cells of several products a step, which hand values on from one to the next."""

from __future__ import annotations

import torch

from gpu_rnn.recurrence import Recurrence


def two_products() -> Recurrence:
    """Split gates, parameters and both states on either side of the second product."""

    def first(x, r, s, p):  # type: ignore[no-untyped-def]
        gate = torch.sigmoid(x.a + r.a + p.own * s.c)
        return gate * s.h + p.own * torch.tanh(x.b + gate * r.b), gate * s.c, x.b

    def second(x, r, s, p, values):  # type: ignore[no-untyped-def]
        kept, b = values
        c = kept + torch.tanh(x.d + p.other * r.d) * torch.sigmoid(x.e + r.e)
        return torch.tanh(c + b) * p.own + s.h / 2, c

    return Recurrence(
        [(("a", "b"), first), (("d", "e"), second)], states=("h", "c"), params=("own", "other"), name="two"
    )


def of_three_products() -> Recurrence:
    def hand_on(x, r, s):  # type: ignore[no-untyped-def]
        return x.a + r.a, torch.sigmoid(x.a)

    def once_more(x, r, s, p, values):  # type: ignore[no-untyped-def]
        return (x.b + r.b) * values[0], torch.tanh(x.b + r.b) - values[0]

    def end(x, r, s, p, values):  # type: ignore[no-untyped-def]
        return torch.tanh(x.c + r.c * values[0])

    stages = [(("a",), hand_on), (("b",), once_more), (("c",), end)]
    return Recurrence(stages, states=("h",), name="three")
