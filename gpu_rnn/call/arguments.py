# SPDX-License-Identifier: Apache-2.0
"""What `functional.rnn` and `functional.cell` are given, checked before any backend, in words.

ATen's kernels and ours read and write wherever the shapes given lead them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gpu_rnn.call import autocast, onlookers
from gpu_rnn.dispatch import choice
from gpu_rnn.recurrence import Recurrence

if TYPE_CHECKING:
    from gpu_rnn.call.stack import Stack


SWITCHES = ("bias", "bidirectional", "batch_first", "norm", "rms", "all_states")  # of a stack
PROJECTED = "proj_size argument is only supported for LSTM, not RNN or GRU"


def check(stack: Stack, x: Any, hx: Any, weights: Any, batch_sizes: Any = None) -> None:
    """Every argument of `functional.rnn` but for the controls; `StackControls.checked` has those.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a number out of range; a backend that does not exist.
        RuntimeError: a tensor of another shape, dtype or device; no time steps.
    """
    _options(stack)
    _input(x)
    rank, axes = (
        (3, "(B, T, I)" if stack.batch_first else "(T, B, I)") if batch_sizes is None else (2, "packed, (rows, I)")
    )
    if x.dim() != rank:
        raise RuntimeError(f"x is {axes}, got {tuple(x.shape)}")
    if batch_sizes is not None:
        _batch_sizes(batch_sizes, x.shape[0])
    _, batch = stack.sizes(x, batch_sizes)
    _weights(stack, x, weights)
    if hx is not None:
        each_tensor("hx", hx, stack.recurrence.states)
        _shapes(hx, stack.state_shapes(weights, batch))
    check_alike(x, weights, hx or ())


def check_cell(stack: Stack, x: Any, hx: Any, weights: Any) -> None:
    """Every argument of `functional.cell`; errors as `check`'s."""
    _options(stack)
    _input(x)
    if x.dim() != 2:
        raise RuntimeError(f"x is (B, I), got {tuple(x.shape)}")
    _weights(stack, x, weights)
    if hx is not None:
        each_tensor("hx", hx, stack.recurrence.states)
        _cell_states(stack.recurrence.states, hx, [s[1:] for s in stack.state_shapes(weights, x.shape[0])])
    check_alike(x, weights, hx or ())


def _cell_states(names: Sequence[str], hx: Sequence[Tensor], expected: Sequence[tuple[int, ...]]) -> None:
    for name, state in zip(names, hx, strict=True):
        if state.dim() != 2:
            raise RuntimeError(f"hx is (B, H) each, got {tuple(state.shape)} for {name}")
    _shapes(hx, expected)


def _input(x: Any) -> None:
    tensor("x", x)
    if not (x.dtype.is_floating_point or x.dtype.is_complex):
        raise TypeError(
            f"x holds floating-point or complex numbers, got {x.dtype}: convert it with .to(weights[0].dtype)"
        )


def _shapes(hx: Sequence[Tensor], expected: Sequence[tuple[int, ...]]) -> None:
    if [state.shape for state in hx] != expected:
        raise RuntimeError(f"hx is {expected}, got {[tuple(state.shape) for state in hx]}")


def _options(stack: Stack) -> None:
    a_recurrence(stack.recurrence)
    for name in SWITCHES:
        value = getattr(stack, name)
        if value is not True and value is not False:
            flag(name, value)  # raises
    for name, least in (("num_layers", 1), ("proj_size", 0)):
        value = getattr(stack, name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} should be an integer, got: {value!r}")
        if value < least:
            raise ValueError(f"{name} should be {least} or more, got: {value}")
    if stack.rms and not stack.norm:
        raise ValueError("rms says how the products are normalised: give norm=True, too")
    heads(stack.heads, None, stack.proj_size)
    probability("dropout", stack.dropout)
    choice.check_name(stack.backend)
    if stack.proj_size:
        _projected(stack.recurrence)


def heads(value: Any, hidden: int | None, proj_size: int) -> None:
    """A number of heads, for so many units if they are known.

    Raises:
        TypeError: no integer.
        ValueError: below 1, or one that does not divide the widths.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"heads should be an integer, got: {value!r}")
    if value < 1:
        raise ValueError(f"heads should be 1 or more, got: {value}")
    for name, width in (("hidden_size", hidden), ("proj_size", proj_size)):
        if width and width % value:
            raise ValueError(
                f"heads has to divide {name}, of which each head has an equal part, got: heads={value}, {name}={width}"
            )


def _projected(recurrence: Recurrence) -> None:
    if recurrence.aten not in (None, "LSTM"):
        raise ValueError(PROJECTED)
    h = f"s_{recurrence.states[0]}"
    stages = recurrence.program.stages
    if any(h in (*stage.outputs, *(arg for op in stage.ops for arg in op.args)) for stage in stages):
        raise ValueError(f"proj_size makes h narrower than the units, and {recurrence.name} takes h unit by unit")


def a_recurrence(value: Any) -> None:
    """Raises TypeError for anything else."""
    if not isinstance(value, Recurrence):
        raise TypeError(
            "recurrence should be a gpu_rnn.Recurrence, such as gpu_rnn.cells.gru() or one of your own, "
            f"got: {type(value).__name__}"
        )


def flag(name: str, value: Any) -> None:
    """Raises TypeError for what is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} should be True or False, got: {value!r}")


def probability(name: str, value: Any) -> float:
    """A number between 0 and 1, NumPy's too.

    Raises:
        TypeError: no number.
        ValueError: another one.
    """
    if isinstance(value, bool) or not hasattr(value, "__float__") or isinstance(value, (str, Tensor)):
        raise TypeError(f"{name} should be a number between 0 and 1, got: {value!r}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} should be a number in range [0, 1] representing the probability, got: {value}")
    return float(value)


def tolerance(name: str, value: Any) -> float:
    """What states may differ by: a positive number, NumPy's too; 0.0 of None and False, which ask for nothing.

    Raises:
        TypeError: no number.
        ValueError: one that is not positive, or not finite.
    """
    if value is None or value is False:
        return 0.0
    if value is True or not hasattr(value, "__float__") or isinstance(value, (str, Tensor)):
        raise TypeError(f"{name} should be a tolerance, such as 1e-6, or None, got: {value!r}")
    if not 0 < float(value) < math.inf:
        raise ValueError(f"{name} is what states may differ by, a positive number such as 1e-6, got: {value}")
    return float(value)


def rebuilds(save: Any) -> bool:
    """Whether the backward pass computes the gates again.

    Raises:
        ValueError: neither "gates" nor "states".
    """
    if save not in ("gates", "states"):
        raise ValueError(f"save is 'gates' or 'states', what a layer saves for its backward pass, got: {save!r}")
    return bool(save == "states")


def tensor(name: str, value: Any, number: int | None = None) -> None:
    """Raises TypeError for what is no strided tensor; `number`: its place in a sequence of that name."""
    if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested:
        return
    name = name if number is None else f"{name}[{number}]"
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} should be a Tensor, got {type(value).__name__}")
    if value.is_nested:
        raise TypeError(
            f"{name} should be a strided tensor, got a nested one: a layer takes one made with layout=torch.jagged, "
            f"(B, j, I); or pad it with torch.nested.to_padded_tensor({name}, 0.0) and give lengths=, the number of "
            "steps of each row"
        )
    raise TypeError(f"{name} should be a strided tensor, got a {value.layout} one: use .to_dense()")


def floating(name: str, value: Tensor) -> None:
    """Raises TypeError for a quantized tensor."""
    if value.is_quantized:
        raise TypeError(f"{name} should hold floating-point numbers, got a quantized tensor: use .dequantize()")


def each_tensor(name: str, values: Any, names: Sequence[str]) -> None:
    """A sequence with a tensor for each of those named.

    Raises:
        TypeError: no sequence, or with something else in it.
        RuntimeError: of another length.
    """
    wanted = f"{name} should be {len(names)} Tensors ({', '.join(names)})"
    if not isinstance(values, (tuple, list)):
        raise TypeError(f"{wanted} in a tuple, got {type(values).__name__}")
    if len(values) != len(names):
        raise RuntimeError(f"{wanted}, got {len(values)}")
    for each, value in zip(names, values, strict=True):
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{wanted}, got {type(value).__name__} for {each}; to begin at the initial values, give {name}=None"
            )


def _batch_sizes(sizes: Any, rows: int) -> None:
    if not isinstance(sizes, Tensor) or sizes.dtype != torch.int64 or not sizes.is_cpu or sizes.dim() != 1:
        kind = (
            f"{sizes.dtype}, {tuple(sizes.shape)} on {sizes.device}"
            if isinstance(sizes, Tensor)
            else type(sizes).__name__
        )
        raise TypeError(f"batch_sizes is an int64 tensor (T) on the CPU, as of a PackedSequence, got {kind}")
    if not len(sizes):
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if onlookers.recorded(sizes):
        return
    values = sizes.tolist()
    if values[-1] < 1 or values != sorted(values, reverse=True):
        raise ValueError(f"batch_sizes never grow and end above 0: how many rows have a step, got {values}")
    if sum(values) != rows:
        raise ValueError(f"batch_sizes add up to the rows of x, {rows}, got {sum(values)}")


def _weights(stack: Stack, x: Tensor, weights: Any) -> None:
    if not isinstance(weights, (tuple, list)):
        raise TypeError(f"weights should be a sequence of Tensors, got {type(weights).__name__}")
    for number, weight in enumerate(weights):
        if not isinstance(weight, Tensor) or weight.layout != torch.strided or weight.is_nested:
            tensor("weights", weight, number)  # raises
    gates, features, shapes = len(stack.recurrence.gates), x.shape[-1], [weight.shape for weight in weights]
    w_ih: tuple[int, ...] = shapes[0] if shapes else ()
    several = stack.heads > 1
    has_hidden = len(w_ih) == 2 + several and w_ih[-2] > 0 and w_ih[-2] % gates == 0
    hidden = stack.heads * (w_ih[-2] // gates) if has_hidden else 0
    expected = stack.weight_shapes(features, hidden) if has_hidden else []
    if not has_hidden or shapes != expected:
        front, units = (f"{stack.heads}, ", f"H/{stack.heads}") if several else ("", "H")
        rows = f"{front}{gates}·{units}"
        wanted = expected if has_hidden else f"in a row w_ih ({rows}, {features}), w_hh ({rows}, {units}), and so on"
        raise RuntimeError(
            f"for an input of {features} features the weights are {wanted}, got {[tuple(s) for s in shapes]}"
        )
    if stack.proj_size >= hidden:
        raise ValueError(f"proj_size has to be smaller than hidden_size, {hidden}, got {stack.proj_size}")


def check_alike(x: Tensor, weights: Sequence[Tensor], states: Sequence[Tensor]) -> None:
    """One device and, as torch.nn's kernels ask, one dtype, or what autocast makes one of.

    Raises:
        RuntimeError: others.
    """
    for number, tensor in enumerate((*weights, *states)):
        if tensor.device == x.device and tensor.dtype == x.dtype:
            continue
        kind = "parameter" if number < len(weights) else "hidden"
        if tensor.device != x.device:
            raise RuntimeError(
                f"Input and {kind} tensors are not at the same device, found input tensor at {x.device} and "
                f"{kind} tensor at {tensor.device}"
            )
        if autocast.dtype_of(tensor) != autocast.dtype_of(x):
            raise RuntimeError(
                f"Input and {kind} tensors are not the same dtype, found input tensor with {x.dtype} and "
                f"{kind} tensor with {tensor.dtype}"
            )
