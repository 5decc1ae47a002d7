# SPDX-License-Identifier: Apache-2.0
"""The layers and cells without modules: what they are given is checked here, and then run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from inspect import signature
from typing import Never

from torch import Tensor

from gpu_rnn.call import arguments, cell_op, run, stack_ops  # noqa: F401  # what torch.compile records
from gpu_rnn.call.controls import NONE, StackControls
from gpu_rnn.call.stack import Stack, States
from gpu_rnn.recurrence import Recurrence
from gpu_rnn.spelling import unexpected


def rnn(
    x: Tensor,
    hx: States | None,
    weights: Sequence[Tensor],
    recurrence: Recurrence,
    *,
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    proj_size: int = 0,
    backend: str = "auto",
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reset_state: States | None = None,
    recurrent_mask: Tensor | None = None,
    zone: Tensor | None = None,
    norm: bool = False,
    rms: bool = False,
    all_states: bool = False,
    heads: int = 1,
    time_parallel: float | None = None,
    save: str = "gates",
    **unknown: Never,
) -> tuple[Tensor, States] | tuple[Tensor, States, States]:
    """Runs a stack of recurrent layers.

    Args:
        x: (T, B, I); (B, T, I) with `batch_first`; packed data (sum of batch_sizes, I) with `batch_sizes`.
        hx: one tensor per state of the recurrence, (D·num_layers, B, H); h has proj_size features with a projection.
            None: the recurrence's initial values.
        weights: for each layer and direction in torch's order: w_ih (G·H, I), w_hh (G·H, P), then b_ih and b_hh (G·H)
            with `bias`, w_hr (P, H) with `proj_size`, (params, H) if the recurrence has per-unit parameters, and with
            `norm` the scales (G·H) of the normalised input products and of the normalised recurrent products.
        recurrence: the cell.
        dropout, training: dropout between layers, in training.
        batch_sizes: (T,) int64 on the CPU, as in PackedSequence.
        backend: "auto" or a name from `gpu_rnn.dispatch.BACKENDS`.
        mask: bool, (T, B) or with `batch_first` (B, T): True where a step counts. States carry over the other steps,
            whose outputs are 0; what x holds there, NaN too, reaches nothing.
        lengths: integers (B,), 0 allowed: rows end there, as with pack_padded_sequence, and the reverse direction
            starts there.
        resets: bool, shaped like mask: True where an episode begins. States are set before such a step to
            `reset_state`, and the reverse direction is cut at the same place.
        reset_state: a tensor for each state, (D·num_layers, B, ·) or for each step (T, D·num_layers, B, ·). None: the
            recurrence's initial values.
        recurrent_mask: (D·num_layers, B, 1 or G, P), factors of h where it enters the products, the same at all steps:
            recurrent dropout with one mask for all gates (Gal & Ghahramani, arXiv:1512.05287) or one for each.
        zone: bool, (states, T, D·num_layers, B, H): units that keep their state (Krueger et al., arXiv:1606.01305).
        norm: layer-normalise the products, gate by gate: LN(W_ih x)·g_ih + b_ih and LN(W_hh h)·g_hh + b_hh
            (Ba et al., arXiv:1607.06450).
        rms: with `norm`, divide by the root mean square instead (Zhang and Sennrich, arXiv:1910.07467).
        all_states: return all states of all steps as well.
        heads: k blocks on the diagonal of W_hh: each direction is k recurrences of H/k units that read one x. Each
            weight has k in front, the rest as of a layer of H/k units: w_ih (k, G·H/k, I), w_hh (k, G·H/k, P/k), ...
        time_parallel: a tolerance: chunks of steps run side by side, where that is predicted to be faster, until no
            state differs by more between the end of a chunk and the beginning of the next. None: one step after the
            other.
        save: what each layer saves for its backward pass: the "gates" of every step, or the "states" alone, from which
            it computes the gates again.
        unknown: nothing.

    Returns:
        The h of every step, like x with D·P features, and the final states, shaped like hx; with `all_states` also the
        states after every step, (T, D·num_layers, B, ·) each.

    Raises:
        ValueError: a backend that does not exist or cannot run this call, with every reason; a number out of range.
            A mask, lengths, resets or reset_state of another shape, or beside batch_sizes.
        TypeError: an argument of another kind: no tensor where one belongs, a flag that is not a bool, a mask or resets
            that are not bool, lengths that are not integers.
        RuntimeError: no time steps; tensors on different devices or of different dtypes; x, hx or weights of another
            shape.

    Example::

        >>> import torch
        >>> from gpu_rnn import cells, functional
        >>> weights = [torch.randn(32, 3), torch.randn(32, 8), torch.zeros(32), torch.zeros(32)]
        >>> y, (h, c) = functional.rnn(torch.randn(5, 2, 3), None, weights, cells.lstm())
        >>> y.shape, c.shape
        (torch.Size([5, 2, 8]), torch.Size([1, 2, 8]))
    """
    if unknown:
        raise unexpected("rnn()", unknown, signature(rnn).parameters)
    stack = Stack(
        recurrence=recurrence,
        bias=bias,
        num_layers=num_layers,
        dropout=dropout,
        bidirectional=bidirectional,
        batch_first=batch_first,
        proj_size=proj_size,
        backend=backend,
        norm=norm,
        rms=rms,
        all_states=all_states,
        heads=heads,
        time_parallel=0.0 if time_parallel is None else arguments.tolerance("time_parallel", time_parallel),
        rebuilds=arguments.rebuilds(save),
    )
    arguments.check(stack, x, hx, weights, batch_sizes)
    arguments.flag("training", training)
    if dropout and not training:
        stack = replace(stack, dropout=0.0)
    if reset_state is not None:
        arguments.each_tensor("reset_state", reset_state, recurrence.states)
    controls = StackControls.of(x, mask, lengths, resets, reset_state, recurrent_mask, zone)
    if controls is not NONE:
        controls.refuse_packed(batch_sizes)
        controls = controls.transposed() if batch_first else controls
        steps, batch = stack.sizes(x, batch_sizes)
        controls = controls.checked(steps, stack.state_shapes(weights, batch), len(recurrence.gates), x)
    y, states, every = run.sequence(stack, x, hx, weights, batch_sizes, controls, alike=True)
    return (y, states, every) if all_states else (y, states)


def cell(
    x: Tensor,
    hx: States | None,
    weights: Sequence[Tensor],
    recurrence: Recurrence,
    *,
    bias: bool = True,
    backend: str = "auto",
    heads: int = 1,
    **unknown: Never,
) -> States:
    """One step.

    Args:
        x: (B, I), fp32, fp64, fp16, bf16 or complex.
        hx: for each state (B, H); None: the recurrence's initial values, zeros for those of `gpu_rnn.cells`.
        weights: W_ih (G·H, I), W_hh (G·H, H), with bias b_ih and b_hh (G·H), and the recurrence's parameters (P, H).
        recurrence, bias, backend, heads: as for `rnn`.
        unknown: nothing.

    Returns:
        The new states, (B, H) each.

    Raises:
        Exception: as `rnn`.

    Example::

        >>> import torch
        >>> from gpu_rnn import cells, functional
        >>> weights = [torch.randn(24, 3), torch.randn(24, 8), torch.zeros(24), torch.zeros(24)]
        >>> (h,) = functional.cell(torch.randn(2, 3), None, weights, cells.gru())
        >>> h.shape
        torch.Size([2, 8])
    """
    if unknown:
        raise unexpected("cell()", unknown, signature(cell).parameters)
    stack = Stack(recurrence=recurrence, bias=bias, backend=backend, heads=heads)
    arguments.check_cell(stack, x, hx, weights)
    return run.one_step(stack, x, hx, weights)
