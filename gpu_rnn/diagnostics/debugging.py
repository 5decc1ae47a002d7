# SPDX-License-Identifier: Apache-2.0
"""`debug`: runs a layer's backend beside the reference and names the first step, gate and unit that differ."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gpu_rnn.backends import reference
from gpu_rnn.backends.tensors import Inputs, Result, processing_order, reorder
from gpu_rnn.call import heads, passes
from gpu_rnn.call.passes import Options
from gpu_rnn.call.stack import Stack
from gpu_rnn.compiler.program import Program
from gpu_rnn.dispatch import choice
from gpu_rnn.spelling import names_meant

if TYPE_CHECKING:
    from gpu_rnn.layers.base import LayerBase

# Largest difference, relative to the largest value, that rounding explains over a sequence.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Difference:
    """What `debug` found in one layer of a stack; ``str()`` of it is a sentence."""

    layer: int
    backend: str
    worst: float
    where: str = ""

    def __str__(self) -> str:
        if not self.where:
            return f"layer {self.layer}: {self.backend} agrees with the reference (largest difference {self.worst:.2e})"
        return f"layer {self.layer}: {self.backend} first differs from the reference at {self.where}"


@names_meant
def debug(layer: LayerBase, x: Tensor, *, backend: str | None = None) -> list[Difference]:
    """Compares a layer's backend with the reference in float64, layer by layer, on x.

    Args:
        layer: a layer of this package.
        x: its input, (T, B, input_size) or with batch_first (B, T, input_size).
        backend: the loop to look at, such as "resident" or "step"; "auto": the one that dispatch chooses among the
            loops; None: the layer's own, which stands for "auto" where it is no loop.

    Returns:
        One `Difference` per layer of the stack; print it. Each layer is given the reference's output of the one
        below, so that a fault is named where it arises.

    Raises:
        ValueError: the backend cannot run this call; every reason is given. x and the layer are not on
            one CPU or CUDA device.

    Example::

        >>> import gpu_rnn, torch
        >>> layer = gpu_rnn.GRU(4, 8, activation="softsign")
        >>> for found in gpu_rnn.debug(layer, torch.randn(10, 2, 4), backend="step"):
        ...     print(found)
        layer 0: step agrees with the reference (largest difference ...)
    """
    from gpu_rnn.layers.base import LayerBase

    if not isinstance(layer, LayerBase) or not isinstance(x, Tensor) or x.dim() not in (2, 3) or not x.numel():
        given = f"a {type(x).__name__}" if not isinstance(x, Tensor) else f"one of shape {tuple(x.shape)}"
        raise TypeError(
            "debug takes a layer of this package, such as gpu_rnn.LSTM, and an input with steps and samples, not a "
            f"{type(layer).__name__} and {given}"
        )
    layer.check_input(x, None)
    if x.dtype not in TOLERANCE:
        raise TypeError(f"debug compares with float64, so it takes real input, not {x.dtype}")
    place = layer._flat_weights[0].device
    if place.type not in ("cpu", "cuda") or x.device != place:
        raise ValueError(
            f"debug runs on one CPU or CUDA device, and x is on {x.device}, the layer on {place}: move them there"
        )
    if x.dim() == 2:
        x = x.unsqueeze(1)
    elif layer.batch_first:
        x = x.transpose(0, 1)
    if backend is None:
        backend = layer.backend if layer.backend in choice.LOOPS else "auto"
    program, stack, all_weights = layer.recurrence.program, layer._stack(), layer._flat_weights
    options = Options(backend, stack.reverse, save=True, rms=stack.rms)
    differences = []
    with torch.no_grad():
        for number in range(layer.num_layers):
            initial = replace(stack, num_layers=1).initial(x, all_weights, x.shape[1])
            entering = [heads.apart(state.transpose(0, 1), stack.heads) for state in initial]
            inputs = stack.inputs(x, all_weights, number, entering)
            problem = passes.problem_of(program.text, options, inputs, "training")
            name = choice.select(problem, backend, choice.LOOPS)
            result = passes.run(program.text, options._replace(backend=name), inputs)
            doubled = _double(inputs)
            exact = reference.forward(passes.call_of(program.text, options, doubled), doubled.x, save=True)
            where, worst = _first(program, result, exact, stack, TOLERANCE[x.dtype])
            differences.append(Difference(number, name, worst, where))
            x = exact.y.flatten(2).to(x.dtype)
    return differences


def _double(inputs: Inputs) -> Inputs:
    return inputs.with_primals([None if p is None else p.double() for p in inputs.primals])


def _first(program: Program, result: Result, exact: Result, stack: Stack, tolerance: float) -> tuple[str, float]:
    """Where the backend first goes wrong in processing order, and the largest difference."""
    order = processing_order(result.y.shape[0], None, stack.reverse, result.y.device)
    compared: list[tuple[list[str], Tensor, Tensor]] = [
        ([f"the pre-activation of gate {gate}" for gate in program.gates], result.gates, exact.gates),
        ([f"the product of gate {gate}" for gate in program.split], result.recurrent, exact.recurrent),
        (["the output h"], result.y[:, :, :, None], exact.y[:, :, :, None]),
    ]
    compared += [
        ([f"the state {name}"], states[:, :, :, None], exact_states[:, :, :, None])
        for name, states, exact_states in zip(program.state_names[1:], result.inner, exact.inner, strict=True)
    ]
    first: tuple[int, str] | None = None
    worst = 0.0
    for names, values, truths in compared:
        if not names:
            continue
        values, truths = reorder(values.double(), order), reorder(truths, order)  # (T, B, N, names, H)
        same = (values == truths) | (values.isnan() & truths.isnan())
        gap = torch.where(same, 0.0, (values - truths).abs()).nan_to_num(nan=float("inf"), posinf=float("inf"))
        worst = max(worst, gap.max().item())
        scale = (
            max([1.0, *truths[truths.isfinite()].abs().amax().reshape(-1).tolist()]) if truths.isfinite().any() else 1.0
        )
        bad = (gap > tolerance * scale).nonzero()
        if len(bad) and (first is None or bad[0, 0] < first[0]):
            t, b, n, which, unit = bad[0].tolist()
            recurrence = f"direction {n // stack.heads}" + f", head {n % stack.heads}" * (stack.heads > 1)
            off = f"{names[which]} is off by {gap[t, b, n, which, unit]:.3g}"
            first = (t, f"step {t}, sample {b}, {recurrence}, unit {unit}: {off}")
    return (first[1] if first else ""), worst
