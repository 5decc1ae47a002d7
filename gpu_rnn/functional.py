# SPDX-License-Identifier: Apache-2.0
"""From a layer's call to a backend: describe the call, choose, and run the whole stack or layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_rnn import autograd, dispatch
from gpu_rnn.launch import aten
from gpu_rnn.ops import Options
from gpu_rnn.problem import Problem, rnn_precision
from gpu_rnn.recurrence import Recurrence
from gpu_rnn.reference import Weights

States = tuple[Tensor, ...]


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
) -> tuple[Tensor, States]:
    """Runs a stack of recurrent layers.

    Args:
        x: (T, B, I); (B, T, I) with `batch_first`; packed data (sum of batch_sizes, I) with `batch_sizes`.
        hx: one tensor per state of the recurrence, (D·num_layers, B, H); h has proj_size features with a projection.
            None: the recurrence's initial values.
        weights: for each layer and direction in torch's order: w_ih (G·H, I), w_hh (G·H, P), then b_ih and b_hh (G·H)
            with `bias`, w_hr (P, H) with `proj_size`, and (params, H) if the recurrence has per-unit parameters.
        recurrence: the cell.
        dropout, training: dropout between layers, in training.
        batch_sizes: (T,) int64 on the CPU, as in PackedSequence.
        backend: "auto" or a name from `gpu_rnn.dispatch.BACKENDS`.

    Returns:
        The h of every step, like x with D·P features, and the final states, shaped like hx.

    Raises:
        ValueError: a backend that does not exist or cannot run this call, with every reason.
        RuntimeError: no time steps; tensors on different devices.

    Example::

        >>> weights = [torch.randn(32, 3), torch.randn(32, 8), torch.zeros(32), torch.zeros(32)]
        >>> y, (h, c) = functional.rnn(torch.randn(5, 2, 3), None, weights, cells.lstm())
        >>> y.shape, c.shape
        (torch.Size([5, 2, 8]), torch.Size([1, 2, 8]))
    """
    steps, batch = _sizes(x, batch_first, batch_sizes)
    if not torch.compiler.is_compiling():
        problem = _problem(x, hx, weights, recurrence, steps, batch, num_layers, bidirectional, batch_sizes, proj_size)
        if dispatch.select(problem, backend) == "aten":
            states = hx or _initial(x, weights, recurrence, batch, num_layers, bidirectional, proj_size)
            return aten.stack(
                recurrence.aten or "",
                x,
                states,
                weights,
                bias,
                num_layers,
                dropout,
                training,
                bidirectional,
                batch_first,
                batch_sizes,
            )
    states = hx or _initial(x, weights, recurrence, batch, num_layers, bidirectional, proj_size)
    _check_devices(x, weights, states)
    stack = _Stack(recurrence, bias, num_layers, 2 if bidirectional else 1, bool(proj_size), weights)
    if batch_sizes is not None:
        padded, lengths = _unpack(x, batch_sizes)
        y, final = stack.run(padded, states, lengths, dropout if training else 0.0, backend)
        return y[_valid(lengths, steps)], final
    y, final = stack.run(x.transpose(0, 1) if batch_first else x, states, None, dropout if training else 0.0, backend)
    return y.transpose(0, 1) if batch_first else y, final


def cell(
    x: Tensor,
    hx: States | None,
    weights: Sequence[Tensor],
    recurrence: Recurrence,
    *,
    bias: bool = True,
    backend: str = "auto",
) -> States:
    """One step: x (B, I) and states (B, H) -> new states (B, H). Arguments and errors as `rnn`'s."""
    states = None if hx is None else tuple(state[None] for state in hx)
    standard = recurrence.aten and not recurrence.params and backend in ("auto", "aten")
    if standard and not torch.compiler.is_compiling() and not autograd.transforms_active():
        given = hx or tuple(s[0] for s in _initial(x[None], weights, recurrence, x.shape[0], 1, False, 0))
        found = aten.CELLS[recurrence.aten or ""](x, given if len(given) > 1 else given[0], *_four(weights))
        return tuple(found) if len(given) > 1 else (found,)
    _, final = rnn(x[None], states, weights, recurrence, bias=bias, backend=backend)
    return tuple(state[0] for state in final)


def _four(weights: Sequence[Tensor]) -> list[Tensor | None]:
    return [*weights, None, None] if len(weights) == 2 else list(weights)


def _sizes(x: Tensor, batch_first: bool, batch_sizes: Tensor | None) -> tuple[int, int]:
    """T and B."""
    if batch_sizes is not None:
        return batch_sizes.shape[0], int(batch_sizes[0])
    steps, batch = (x.shape[1], x.shape[0]) if batch_first else (x.shape[0], x.shape[1])
    if steps == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    return steps, batch


def _problem(
    x: Tensor,
    hx: States | None,
    weights: Sequence[Tensor],
    recurrence: Recurrence,
    steps: int,
    batch: int,
    num_layers: int,
    bidirectional: bool,
    batch_sizes: Tensor | None,
    proj_size: int,
) -> Problem:
    tensors = (x, *weights, *(hx or ()))
    wants_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    gates = weights[0].shape[0] // len(recurrence.gates)
    return Problem(
        recurrence,
        steps,
        batch,
        2 if bidirectional else 1,
        x.shape[-1],
        gates,
        x.dtype,
        x.device.type,
        dispatch.device_of(x.device),
        "training" if wants_grad else "inference",
        rnn_precision() if x.is_cuda else "ieee",
        batch_sizes is not None,
        batch_sizes is not None,
        "01" if bidirectional else "0",
        proj_size,
        num_layers,
        autograd.transforms_active(),
    )


def _initial(
    x: Tensor,
    weights: Sequence[Tensor],
    recurrence: Recurrence,
    batch: int,
    num_layers: int,
    bidirectional: bool,
    proj_size: int,
) -> States:
    """The recurrence's own initial values, (D·num_layers, B, ·)."""
    hidden = weights[0].shape[0] // len(recurrence.gates)
    rows = num_layers * (2 if bidirectional else 1)
    widths = [proj_size or hidden, *[hidden] * (len(recurrence.states) - 1)]
    kinds = list(zip(widths, recurrence.initial, strict=True))
    made = {kind: x.new_full((rows, batch, kind[0]), kind[1]) for kind in dict.fromkeys(kinds)}
    return tuple(made[kind] for kind in kinds)


def _check_devices(x: Tensor, weights: Sequence[Tensor], states: States) -> None:
    for kind, tensors in (("parameter", weights), ("hidden", states)):
        for tensor in tensors:
            if tensor.device != x.device:
                raise RuntimeError(
                    f"Input and {kind} tensors are not at the same device, found input tensor at {x.device} and "
                    f"{kind} tensor at {tensor.device}"
                )


class _Stack(NamedTuple):
    """The layers of a call, run one after another in canonical layout."""

    recurrence: Recurrence
    bias: bool
    num_layers: int
    directions: int
    projected: bool
    weights: Sequence[Tensor]

    def run(
        self, x: Tensor, states: States, lengths: Tensor | None, dropout: float, backend: str
    ) -> tuple[Tensor, States]:
        """x (T, B, I), states (D·layers, B, ·) -> y (T, B, D·P), final states."""
        text = self.recurrence.text()
        options = Options(backend, "01" if self.directions == 2 else "0")
        x, states, weights = _autocast(x, states, self.weights)
        final: list[list[Tensor]] = []
        for number in range(self.num_layers):
            rows = slice(number * self.directions, (number + 1) * self.directions)
            entering = [state[rows].transpose(0, 1) for state in states]  # (B, N, ·)
            y, after = autograd.layer(text, options, x, self._canonical(weights, number), lengths, entering)
            final.append([state.transpose(0, 1) for state in after])
            x = y.flatten(2)
            if dropout and number < self.num_layers - 1:
                x = F.dropout(x, dropout)
        return x, tuple(torch.cat(parts) for parts in zip(*final, strict=True))

    def _canonical(self, weights: Sequence[Tensor], number: int) -> Weights:
        """The weights of one layer, the directions stacked along N."""
        gates = len(self.recurrence.gates)
        per_direction = 2 + 2 * self.bias + self.projected + bool(self.recurrence.params)
        first = number * self.directions * per_direction
        own = [
            weights[first + d * per_direction : first + (d + 1) * per_direction] for d in range(self.directions)
        ]
        stacked = [parts[0][None] if len(parts) == 1 else torch.stack(parts) for parts in zip(*own, strict=True)]
        rest = iter(stacked[2:])
        biases: list[Any] = [next(rest).unflatten(1, (gates, -1)) for _ in range(2 * self.bias)] or [None, None]
        projection = next(rest) if self.projected else None
        params = next(rest) if self.recurrence.params else None
        w_ih, w_hh = (w.unflatten(1, (gates, -1)) for w in stacked[:2])
        return Weights(w_ih, w_hh, biases[0], biases[1], params, projection)


def _autocast(
    x: Tensor, states: States, weights: Sequence[Tensor]
) -> tuple[Tensor, States, Sequence[Tensor]]:
    """Under autocast a layer computes in autocast's dtype, as torch's do."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x, states, weights
    dtype = torch.get_autocast_dtype(kind)
    return x.to(dtype), tuple(s.to(dtype) for s in states), [w.to(dtype) for w in weights]


def _unpack(data: Tensor, batch_sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Packed data (sum, I) -> (T, B, I) padded with zeros, and the lengths (B,) of its rows."""
    lengths = (batch_sizes[None] > torch.arange(int(batch_sizes[0]))[:, None]).sum(1).to(data.device)
    valid = _valid(lengths, len(batch_sizes))
    padded = data.new_zeros(*valid.shape, data.shape[-1])
    return padded.index_put(torch.where(valid), data), lengths


def _valid(lengths: Tensor, steps: int) -> Tensor:
    """(T, B): which steps of which rows exist. Indexing with it gives packed order."""
    return torch.arange(steps, device=lengths.device)[:, None] < lengths
