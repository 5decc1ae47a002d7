# SPDX-License-Identifier: Apache-2.0
"""Exported programs that run without this package: layers as torch's own operations, step after step."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gpu_rnn.backends import scanned
from gpu_rnn.backends.tensors import Inputs
from gpu_rnn.call import loops, passes, stack_ops
from gpu_rnn.call.passes import Options


def decompositions(loop: str = "unrolled") -> dict[Any, Callable[..., Any]]:
    """torch's own decompositions, and what layers are made of, for ``ExportedProgram.run_decompositions``.

    The program then holds torch's operations alone, and whatever runs those runs it, such as a process without gpu_rnn.
    It has all options and every cell; the batch may be of any size.

    Args:
        loop: "unrolled": steps stand one after the other, operations of ATen alone, so that the program grows with
            their number. It is the one it was exported with: a warning says so where T was left open. "scan": one step
            in torch's `scan`, whose number may be open; torch marks it as a prototype.

    Returns:
        A table of torch's default decompositions with those of gpu_rnn's operations.

    Raises:
        ValueError: another loop.

    Example::

        >>> import gpu_rnn.export, torch
        >>> layer = gpu_rnn.LSTM(3, 8, layer_norm=True).eval()
        >>> x = torch.randn(5, 2, 3)
        >>> program = torch.export.export(layer, (x,), dynamic_shapes=({1: torch.export.Dim("batch")},))
        >>> program = program.run_decompositions(gpu_rnn.export.decompositions())
        >>> torch.export.save(program, folder / "layer.pt2")
    """
    if loop not in ("unrolled", "scan"):
        raise ValueError(f"loop is 'unrolled' or 'scan', how the steps of a layer stand in a program, got: {loop!r}")
    operations = torch.ops.gpu_rnn
    table: dict[Any, Callable[..., Any]] = {**torch.export.default_decompositions()}
    of_stacks = dict.fromkeys((operations.stack.default, operations.stack_forward.default), _stack)
    return table | of_stacks | {operations.rnn.default: _unrolled if loop == "unrolled" else _scanned}


def _unrolled(*arguments: Any) -> list[Tensor]:
    """`gpu_rnn::rnn` of a pass that keeps nothing, by the reference."""
    *tensors, program, words = arguments
    inputs, options = Inputs.of(*tensors), Options.decode(words)
    if isinstance(steps := inputs.x.shape[0], torch.SymInt):
        warnings.warn(
            f"unrolled, a program takes the {int(steps)} steps that it was exported with and no others: "
            'decompositions(loop="scan") leaves their number open',
            stacklevel=2,
        )
    primals = [primal for primal in inputs.primals if primal is not None]
    results = [*passes.pure(program, options, inputs)(*primals)]
    nothing = inputs.x.new_empty(0)
    inner = results.pop() if options.all_states else nothing
    return [*results, nothing, nothing, inner]


def _scanned(*arguments: Any) -> list[Tensor]:
    """Likewise, by one step of the reference in torch's `scan`."""
    *tensors, program, words = arguments
    inputs, options = Inputs.of(*tensors), Options.decode(words)
    result = scanned.forward(passes.call_of(program, options, inputs), inputs.x, options.all_states)
    return [result.y, *result.final, result.gates, result.recurrent, result.inner]


def _stack(
    x: Tensor,
    states: list[Tensor] | None,
    weights: list[Tensor],
    program: str,
    words: str,
    batch_sizes: Tensor | None = None,
) -> list[Tensor]:
    """`gpu_rnn::stack`, layer after layer."""
    stack, _ = stack_ops.decode(program, words)
    stack = replace(stack, backend="auto")
    entering = tuple(states) if states else stack.initial(x, weights, x.shape[1])
    y, final, _ = loops.run(stack, x, entering, weights, batch_sizes)
    return [y, *final]
