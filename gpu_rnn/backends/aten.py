# SPDX-License-Identifier: Apache-2.0
"""PyTorch's own recurrent kernels (cuDNN, oneDNN) as a row of the table: whole stacks at standard options.

What a step takes on a GPU is published by others. On an H100, an LSTM in fp16 with 768 units and 16 rows over 1,024
steps takes cuDNN 1.96 µs a step forward and 5.07 in both passes (Pöppel, Beck, Hochreiter: FlashRNN, arXiv:2412.07752):
that is taken wherever cuDNN keeps the weights on chip, which the rules of ATen's native/cudnn/RNN.cpp say. cuDNN takes
bfloat16 since 9.13 (pytorch/pytorch#164411). Nobody has published a step outside those kernels; that is a model.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import _VF as VF
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from gpu_rnn.backends import cpu_cost, rates
from gpu_rnn.backends.problem import Problem
from gpu_rnn.backends.throughput import products
from gpu_rnn.devices import is_described
from gpu_rnn.memo import memoize

Output = tuple[Tensor, tuple[Tensor, ...]]

EVERYWHERE = frozenset((torch.float32, torch.float64))
"""The dtypes that ATen has kernels for on every CPU."""

# The most units of cuDNN's kernel for few, in inference and in training, by native/cudnn/RNN.cpp.
MOST_SMALL = {"RNN": (384, 256), "gated": (192, 128)}
FIRST_WITH_BFLOAT16 = 91300  # of cuDNN

# cudnnRNNMode_t
CUDNN_MODES = {"RNN_RELU": 0, "RNN_TANH": 1, "LSTM": 2, "GRU": 3}


def unsupported(problem: Problem) -> list[str]:
    """Why ATen cannot run a problem."""
    reasons = []
    if problem.recurrence.aten is None:
        reasons.append(
            "ATen has LSTM, GRU and RNN with torch.nn's activations and without clip only, "
            f"not this {problem.recurrence.name}"
        )
    if problem.heads > 1:
        reasons.append("ATen has no block-diagonal W_hh (heads)")
    if problem.transforms:
        reasons.append("ATen's recurrent kernels have no rules for torch.func transforms and forward-mode derivatives")
    if problem.lengths and not problem.packed:
        reasons.append("ATen takes rows of different lengths only as a PackedSequence")
    if problem.dtype.is_complex:
        reasons.append("ATen's recurrent kernels take real numbers only")
    if not reasons and problem.device_type == "cpu":
        lacking = missing(problem.recurrence.aten or "", problem.dtype, problem.training)
        reasons += [lacking] if lacking else []
    return reasons + problem.without("lengths")


def missing(mode: str, dtype: torch.dtype, training: bool) -> str:
    """What ATen says to a dtype that it has no kernel for on this CPU; empty where it has one."""
    return "" if dtype in EVERYWHERE else _tried(mode, dtype, training)


@memoize(64)
def _tried(mode: str, dtype: torch.dtype, training: bool) -> str:
    """oneDNN has its 16-bit kernels on some machines only, and PyTorch does not always know on which: one step is
    tried."""
    gates = {"LSTM": 4, "GRU": 3}.get(mode, 1)
    # Not the caller's grad mode, whose hooks would meet what is saved here, nor anything that records.
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        one, ones = (torch.ones(*size, dtype=dtype, device="cpu") for size in ((1, 1, 1), (gates, 1)))
        weights, states = [ones, ones, ones[:, 0], ones[:, 0]], (one, one) if mode == "LSTM" else one
        try:
            FUNCTIONS[mode](one, states, weights, True, 1, 0.0, training, False, False)
        except RuntimeError as error:
            return f"ATen has no kernel for {dtype} on this CPU: {str(error).splitlines()[0]}"
    return ""


def _persistent(problem: Problem) -> bool:
    """Where cuDNN keeps the weights on chip (the rules of ATen's native/cudnn/RNN.cpp, for sm_80 and later)."""
    if problem.packed or problem.proj_size or problem.dtype == torch.float64 or not _cudnn_takes(problem):
        return False
    return problem.H <= MOST_SMALL["RNN" if problem.G == 1 else "gated"][problem.training] or _static(problem)


def _static(problem: Problem) -> bool:
    """Whether it is the kernel for many units, which what is published was measured with."""
    return (
        problem.dtype == torch.float16
        and problem.recurrence.aten == "LSTM"
        and problem.layers == problem.N == 1
        and problem.H <= 1024
        and problem.H % 128 == problem.I % 128 == problem.B % 8 == 0
        and problem.B <= 128
    )


def _cudnn_takes(problem: Problem) -> bool:
    """Whether cuDNN runs a dtype: that of a described device is new enough."""
    version = torch.backends.cudnn.version() or 0
    return problem.dtype != torch.bfloat16 or is_described(problem.device) or version >= FIRST_WITH_BFLOAT16


def cost(problem: Problem, constants: rates.Rates | None = None) -> float:
    """Seconds by the cost model."""
    every = constants or rates.of(problem.device)
    if not problem.device.is_gpu:
        # oneDNN's threads share any LSTM; of the others torch's share products of several rows.
        most = problem.device.sms if cpu_model(problem) == "cpu_lstm" else problem.B
        return cpu_cost.seconds(problem, getattr(every, cpu_model(problem)), most=most)
    known, backward = every.aten, problem.direction == "backward"
    if _persistent(problem):
        step = known.persistent_backward if backward else known.persistent_step
    else:
        step = known.step * problem.N * (2.0 if backward else 1.0)
    return problem.T * problem.layers * step + known.products * products(problem)


def source(problem: Problem) -> str:
    """Where its time a step comes from: see `gpu_rnn.backends.Entry`."""
    same = problem.device.capability == (9, 0) and _static(problem) and _persistent(problem)
    return "published" if same else "modelled"


def cpu_model(problem: Problem) -> str:
    """The constants of a CPU's model: ATen's kernels differ as much as backends do. oneDNN has the LSTM's, but not that
    of a PackedSequence, which is a loop of torch operations as the GRU's is."""
    if problem.packed and problem.recurrence.aten == "LSTM":
        return "cpu_gru"
    return f"cpu_{(problem.recurrence.aten or '').partition('_')[0].lower()}"


def prepare(problem: Problem) -> None:
    """Nothing is to be compiled."""


def stack(
    mode: str,
    x: Tensor,
    hx: tuple[Tensor, ...],
    weights: Sequence[Tensor],
    bias: bool,
    num_layers: int,
    dropout: float,
    bidirectional: bool,
    batch_first: bool,
    batch_sizes: Tensor | None,
    recorded: bool = False,
) -> Output:
    """A whole stack of layers. Arguments as torch._VF's; dropout is 0 outside training, and on a GPU (`functional`)."""
    # oneDNN keeps what its backward needs only in training. A trace says yes: it may be run either way.
    training = dropout > 0 or torch.is_grad_enabled() or recorded
    if x.is_cuda and torch.cudnn_is_acceptable(x) and not recorded:
        return _cudnn(mode, x, hx, weights, num_layers, bidirectional, batch_first, batch_sizes)
    function = FUNCTIONS[mode]
    if len(weights) // (num_layers << bidirectional) & 1 and not recorded:  # weight_hr makes a direction's odd
        _hush(mode)
    states: Any = hx if mode == "LSTM" else hx[0]
    if batch_sizes is None:
        y, *final = function(x, states, weights, bias, num_layers, dropout, training, bidirectional, batch_first)
    else:
        y, *final = function(x, batch_sizes, states, weights, bias, num_layers, dropout, training, bidirectional)
    return y, tuple(final)


@memoize(4)
def _hush(mode: str) -> None:
    """Lets ATen say once, unheard, that oneDNN has no projections: the choice among backends knows it."""
    x, h, c, weights = torch.zeros(1, 1, 2), torch.zeros(1, 1, 1), torch.zeros(1, 1, 2), [(8, 2), (8, 1), (1, 2)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LSTM with projections")
        FUNCTIONS[mode](x, (h, c), [torch.zeros(shape) for shape in weights], False, 1, 0.0, False, False, False)


FUNCTIONS: dict[str, Any] = {"LSTM": VF.lstm, "GRU": VF.gru, "RNN_TANH": VF.rnn_tanh, "RNN_RELU": VF.rnn_relu}
STEPS: dict[str, Any] = {
    "LSTM": VF.lstm_cell,
    "GRU": VF.gru_cell,
    "RNN_TANH": VF.rnn_tanh_cell,
    "RNN_RELU": VF.rnn_relu_cell,
}


def _cudnn(
    mode: str,
    x: Tensor,
    hx: tuple[Tensor, ...],
    weights: Sequence[Tensor],
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    batch_sizes: Tensor | None,
) -> Output:
    """cuDNN called directly, with a weight buffer of our own, so that parameters stay ordinary tensors."""
    per_layer = len(weights) // (num_layers * (2 if bidirectional else 1))
    hidden = hx[-1].shape[-1]
    proj = hx[0].shape[-1] if hx[0].shape[-1] != hidden else 0
    shape = CUDNN_MODES[mode], hidden, proj, num_layers, batch_first
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *hx, *weights))
    y, h, c, *_ = torch._cudnn_rnn(
        x,
        list(weights),
        per_layer,
        _cudnn_buffer(weights, per_layer, x.shape[-1], (*shape, bidirectional)),
        hx[0].contiguous(),
        hx[1].contiguous() if len(hx) > 1 else None,
        *shape,
        0.0,  # no dropout: cuDNN's own would keep a random state that torch.manual_seed does not reach
        needs_grad,  # cuDNN keeps what its backward needs only in training
        bidirectional,
        batch_sizes.tolist() if batch_sizes is not None else [],
        None,
    )
    return y, (h, c) if mode == "LSTM" else (h,)


def _cudnn_buffer(weights: Sequence[Tensor], per_layer: int, width: int, layout: tuple[Any, ...]) -> Tensor:
    """The weights in one buffer as cuDNN wants it, copied at each call.

    Nothing says cheaply that a weight is what it was: ``p.data.copy_()`` leaves its version as it is. cuDNN reads the
    whole
    buffer: without biases their places are there all the same, and have to hold zeros.
    """
    like = weights[0]
    sizes = tuple(tuple(w.shape) for w in weights)
    length, places, filled = _cudnn_places(sizes, like.dtype, like.device, per_layer, width, layout)
    with torch.no_grad():
        make = torch.empty if filled else torch.zeros
        buffer = make(length, dtype=like.dtype, device=like.device)
        views = [buffer[start : start + w.numel()].view_as(w) for start, w in zip(places, weights, strict=True)]
        torch._foreach_copy_(views, list(weights))
    return buffer


@memoize(256)
def _cudnn_places(
    sizes: tuple[tuple[int, ...], ...],
    dtype: torch.dtype,
    device: torch.device,
    per_layer: int,
    width: int,
    layout: tuple[Any, ...],
) -> tuple[int, tuple[int, ...], bool]:
    """The length of cuDNN's buffer, where each weight begins in it, and whether they fill it."""
    blanks = [torch.empty(size, dtype=dtype, device=device) for size in sizes]
    with torch.no_grad():
        buffer = torch._cudnn_rnn_flatten_weight(blanks, per_layer, width, *layout)  # makes them views of it
    places = tuple(int(blank.storage_offset()) for blank in blanks)
    return buffer.numel(), places, buffer.numel() == sum(blank.numel() for blank in blanks)
