# SPDX-License-Identifier: Apache-2.0
"""A stack on the time loops: one layer after the other, or all of them as a wavefront."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_rnn import environment
from gpu_rnn.backends.tensors import Inputs, Weights, counted
from gpu_rnn.call import autograd, direct, heads, onlookers
from gpu_rnn.call.controls import NONE, StackControls
from gpu_rnn.call.passes import Options
from gpu_rnn.call.stack import Stack, States
from gpu_rnn.call.transfer import to_device
from gpu_rnn.dispatch import choice


def run(
    stack: Stack,
    x: Tensor,
    states: States,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    controls: StackControls = NONE,
    zeros: bool = False,
) -> tuple[Tensor, States, States]:
    """One layer after the other in canonical layout: y, the final states and, if wanted, those of all steps. `zeros` as
    in `Options`."""
    controls = controls if controls is NONE else controls.to(x.dtype)
    if batch_sizes is not None:
        padded, lengths, places = _unpack(x, batch_sizes)
        controls = controls._replace(lengths=lengths)
        directly = None
        if x.is_cpu and not stack.time_parallel and not onlookers.recorded(x):
            directly = direct.run(stack.time_first, padded, states, weights, controls)
        y, final, every = directly or _layers(stack, padded, states, weights, controls, zeros)
        return y.flatten(0, 1).index_select(0, places), final, every
    batch_first = stack.batch_first
    if batch_first:
        x, stack = x.transpose(0, 1), stack.time_first
    valid = controls.valid(x.shape[0])
    if valid is not None:  # whatever stands in the padding, NaN too, must not reach a gradient
        x = counted(x, valid)
    y, final, every = _layers(stack, x, states, weights, controls, zeros)
    y = controls.silenced(y, valid, stack.all_states)
    return y.transpose(0, 1) if batch_first else y, final, every


def _layers(
    stack: Stack, x: Tensor, states: States, weights: Sequence[Tensor], controls: StackControls, zeros: bool
) -> tuple[Tensor, States, States]:
    """x (T, B, I), states (D·layers, B, ·) -> y (T, B, D·P), final states, all states (T, D·layers, B, ·)."""
    if _staggered(stack, x, states, weights, controls):
        return _wavefront(stack, x, states, weights, controls)
    text = stack.recurrence.text(stack.recurrence.identity)
    options = Options(
        stack.backend,
        stack.reverse,
        all_states=stack.all_states,
        zeros=zeros,
        rms=stack.rms,
        time_parallel=stack.time_parallel,
        rebuilds=stack.rebuilds,
    )
    flags = controls.flags(stack.reverse, x.shape[0], stack.all_states)
    final: list[list[Tensor]] = []
    every: list[list[Tensor]] = []
    for number in range(stack.num_layers):
        rows = slice(number * stack.directions, (number + 1) * stack.directions)
        entering = [heads.apart(state[rows].transpose(0, 1), stack.heads) for state in states]  # (B, N, ·)
        layer_controls, reset_values = controls.of_layer(rows, "01"[: stack.directions], x.shape[0], flags, stack.heads)
        inputs = stack.inputs(x, weights, number, entering, layer_controls, reset_values)
        y, after, inner = autograd.layer(text, options, inputs)
        final.append(after if stack.heads == 1 else [_of_directions(state, stack.heads) for state in after])
        if stack.all_states:
            in_steps = (y, *_other_states(inner, y, states))
            every.append([heads.together(state, stack.heads).transpose(1, 2) for state in in_steps])
        x = y.flatten(2)
        if stack.dropout and number < stack.num_layers - 1:
            x = F.dropout(x, stack.dropout)
    leaving = tuple(map(joined, zip(*final, strict=True)))
    return x, leaving, tuple(torch.cat(parts, 1) for parts in zip(*every, strict=True))


def _of_directions(state: Tensor, k: int) -> Tensor:
    """(N, B, ·) -> (D, B, ·), all heads of a direction in a row."""
    return heads.together(state.transpose(0, 1), k).transpose(0, 1)


def joined(parts: tuple[Tensor, ...]) -> Tensor:
    """A state of all layers, (D·layers, B, ·), from that of each, (D, B, ·): no view, as views cannot be detached in
    place."""
    if len(parts) > 1 or onlookers.recorded(parts[0]) or parts[0]._is_view():
        return torch.cat(parts)
    return parts[0]


def _staggered(stack: Stack, x: Tensor, states: States, weights: Sequence[Tensor], controls: StackControls) -> bool:
    """Whether the layers run as a wavefront. What is recorded decides as it runs: its T may be any."""
    others = stack.norm or stack.proj_size or stack.heads > 1 or stack.time_parallel or stack.rebuilds
    if stack.num_layers == 1 or stack.bidirectional or others:
        return False
    lowest, wanting = weights[: len(weights) // stack.num_layers], (x, *states, *weights)
    frozen = not any(t.requires_grad for t in (x, *lowest)) and any(t.requires_grad for t in wanting)
    if frozen and torch.is_grad_enabled():  # a wavefront would run its layers backward all the same
        return False
    if onlookers.recorded(x):
        asked = (stack.backend, environment.unchecked_backend())
        return x.is_cuda and "reference" not in asked and not x.is_complex()
    problem = stack.problem(x, states, weights, None, controls)
    return choice.staggers(problem, stack.backend)


def _wavefront(
    stack: Stack, x: Tensor, states: States, weights: Sequence[Tensor], controls: StackControls
) -> tuple[Tensor, States, States]:
    """As `_layers`: all layers by one operation, along N."""
    steps, reverse = x.shape[0], "0" * stack.num_layers
    flags = controls.flags(stack.reverse, steps, all_states=True)  # each layer of a launch is at other steps
    layer_controls, reset_values = controls.of_layer(slice(None), reverse, steps, flags)
    if stack.dropout:  # drawn as layer after layer would draw it
        like = x.new_ones(*x.shape[:2], stack.hidden(weights))
        between = [F.dropout(like, stack.dropout) for _ in range(stack.num_layers - 1)]
        layer_controls = layer_controls._replace(between=torch.stack(between))
    inputs = Inputs(
        x,
        _side_by_side(stack, weights),
        layer_controls,
        [state.transpose(0, 1) for state in states],
        list(reset_values),
    )
    options = Options(stack.backend, reverse, all_states=stack.all_states)
    every, after, inner = autograd.layer(stack.recurrence.text(stack.recurrence.identity), options, inputs)
    # A copy, as what is handed out would share memory, and y by itself hold that of all layers.
    y, final = every[-1].clone(), tuple(after)
    valid = controls.valid(steps)
    if valid is not None and not controls.flagged(stack.all_states):  # lengths alone: of the others `run` takes care
        y = counted(y, valid)
    if not stack.all_states:
        return y, final, ()
    return y, final, tuple(state.transpose(0, 1) for state in (every, *_other_states(inner, y, states)))


def _side_by_side(stack: Stack, weights: Sequence[Tensor]) -> Weights:
    """The weights of all layers along N, those that take a layer's input to the next in a tensor of their own."""
    lowest, *upper = (stack.canonical(weights, number) for number in range(stack.num_layers))
    along = zip(*(layer[1:] for layer in (lowest, *upper)), strict=True)
    after_w_ih: list[Any] = [None if parts[0] is None else torch.cat(parts) for parts in along]
    return Weights(lowest.w_ih, *after_w_ih)._replace(w_between=torch.cat([layer.w_ih for layer in upper]))


def _other_states(inner: Tensor, like: Tensor, states: States) -> Sequence[Tensor]:
    """Those of `Result.inner`, in the dtype of y. Where there are none nothing is taken apart: torch.export writes such
    a file, but cannot read it."""
    return inner.to(like.dtype).unbind(0) if len(states) > 1 else ()


def _unpack(data: Tensor, batch_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Packed data (sum, I) -> (T, B, I) padded with zeros, the lengths (B,) of its rows, and the places of the data in
    (T·B).

    All that depends on values is found on the host, where batch_sizes are.
    """
    valid = torch.arange(int(batch_sizes[0]), device="cpu") < batch_sizes[:, None]  # (T, B)
    places = valid.flatten().nonzero().squeeze(1)
    words = "the batch sizes of a PackedSequence", "the padded tensor, with lengths,"
    both = to_device(torch.cat([valid.sum(0), places]), data.device, *words)
    lengths, places = both.split([valid.shape[1], len(places)])
    padded = torch.index_put(data.new_zeros(valid.numel(), data.shape[-1]), (places,), data)
    return padded.unflatten(0, valid.shape), lengths, places
