# SPDX-License-Identifier: Apache-2.0
"""`describe`: a call, of a whole stack or of one layer, as dispatch sees it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gpu_rnn.backends import precision
from gpu_rnn.backends.problem import Problem
from gpu_rnn.dispatch import choice
from gpu_rnn.recurrence import Recurrence


def describe(
    *,
    recurrence: Recurrence,
    x: Tensor,
    steps: int,
    batch: int,
    hidden: int,
    direction: str,
    reverse: str,
    layers: int,
    proj_size: int,
    bias: bool,
    norm: bool,
    rms: bool,
    rebuilds: bool,
    controls: Mapping[str, Any],
    all_states: bool,
    packed: bool = False,
    transforms: bool = False,
) -> Problem:
    """What is asked of dispatch for one call; see `Problem` for the words. From `x` come the number of its features,
    its dtype and its device; `controls` has the fields that steer the steps (`CONTROL_FIELDS`).

    Both who asks for a stack and who asks for one of its layers come here, so that a stack of one layer asks the
    question that its layer asks.
    """
    return Problem(
        recurrence=recurrence,
        T=steps,
        B=batch,
        N=len(reverse),
        I=x.shape[-1],
        H=hidden,
        dtype=x.dtype,
        device_type=x.device.type,
        device=choice.device_of(x.device),
        direction=direction,
        # On a CPU too: kernels that are interpreted there are those that a GPU would run.
        precision=precision.of_rnn(),
        packed=packed,
        reverse=reverse,
        proj_size=proj_size,
        layers=layers,
        transforms=transforms,
        **controls,
        all_states=all_states,
        norm=norm,
        rms=rms,
        rebuilds=rebuilds,
        bias=bias,
    )
