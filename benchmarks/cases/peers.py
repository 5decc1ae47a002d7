# SPDX-License-Identifier: Apache-2.0
"""What else people have, beside ours: other libraries, where they are installed and can take the case, and loops by
hand.

    pip install 'gpu-rnn[peers]'        # flashrnn and torchrl, on a GPU
    pip install 'gpu-rnn[benchmark]'    # ONNX Runtime, on a CPU

Each adapter gets torch.nn's layers and gives a variant with their weights: it brings them to the peer's layout inside
the call, by views where it can, so that the check sees the gradients of torch.nn's own weights. What a user of the peer
has to do besides its kernel (input projection, layer after layer) is done here as its documentation does it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import by_hand, onnx_runtime, streaming
from benchmarks.cases.names import BY_HAND, COMPILED, FLASHRNN, LIBRARIES, ON_A_CPU, ONNXRUNTIME, PEERS, TORCHRL
from benchmarks.cases.variants import DTYPES, Case, Variant

Call = Mapping[str, Any]
# What they raise for a shape that they cannot take or build, besides what our own backends raise.
ERRORS = (AssertionError, ImportError, OSError)


def find(case: Case, layers: list[nn.Module], call: Call, names: list[str]) -> tuple[list[Variant], dict[str, str]]:
    """The named peers' variants of a case, and for each of the others why there is none."""
    found, left_out = [], {}
    for name in [name for name in PEERS if name in names]:
        refuse, build = (STREAMING if case.problem.streams else ADAPTERS).get(name, NO_STREAMS)
        whole = "takes whole layers" if case.problem.stepwise and name in LIBRARIES else ""
        reason = _absent(name, layers) or whole or refuse(case)
        if reason:
            left_out[name] = reason
            continue
        try:
            found.append(build(case, layers, call))
        except ImportError as error:  # of another version, or without what it needs itself
            left_out[name] = f"cannot be imported: {error}"
    return found, left_out


def _absent(name: str, layers: list[nn.Module]) -> str:
    if not runs_on(next(layers[0].parameters()).device, name):
        return "is measured on a CPU" if name in ON_A_CPU else "needs an NVIDIA GPU"
    return f"not installed (pip install {name})" if name in LIBRARIES and not find_spec(name) else ""


def runs_on(device: torch.device, name: str) -> bool:
    """Whether a peer is measured there."""
    return device.type == ("cpu" if name in ON_A_CPU else "cuda")


def _stacked(layers: list[nn.Module]) -> dict[str, Tensor]:
    """The weights by name with the heads in front, also where there is one only."""
    return {
        name: torch.stack([layer.get_parameter(name).detach() for layer in layers]).requires_grad_()
        for name, _ in layers[0].named_parameters()
    }


# FlashRNN 1.0 (arXiv:2412.07752): T steps, B rows, G gates in the order of torch.nn's LSTM, N heads of D units each.
# flashrnn(Wx (B, T, G, N, D), R (G, N, D, D), b (G, N, D), function=, backend=, dtype=) gives all states
# (S, B, T, N, D) and the last (S, B, 1, N, D), h first.
WIDEST_TRITON = 64  # units of a head in its fused Triton kernel, by its documentation


def _flashrnn_refuses(case: Case) -> str:
    p = case.problem
    if p.cell != "LSTM":
        return "has a fused kernel for the LSTM only"
    if p.bidirectional or p.option:
        return "runs forward in time, without masks, resets or other options"
    if case.dtype == "ieee":
        return "multiplies fp32 in tf32"
    if _flashrnn_kernel() == "triton_fused" and (p.H & (p.H - 1) or not 16 <= p.H <= WIDEST_TRITON):
        return f"without nvcc, takes heads of a power of two from 16 to {WIDEST_TRITON} units"
    return ""


def _flashrnn_kernel() -> str:
    """Its default, which it builds at the first call of each shape, or without CUDA's compiler its Triton kernel."""
    from torch.utils.cpp_extension import CUDA_HOME

    built = shutil.which("nvcc") or (CUDA_HOME and (Path(CUDA_HOME) / "bin" / "nvcc").exists())
    return "cuda_fused" if built else "triton_fused"


def _flashrnn(case: Case, layers: list[nn.Module], call: Call) -> Variant:
    from flashrnn import flashrnn

    problem, weights, kernel = case.problem, _stacked(layers), _flashrnn_kernel()
    dtype = str(DTYPES[case.dtype]).removeprefix("torch.")
    single = problem.heads == 1

    def forward(x: Tensor) -> tuple[Tensor, ...]:  # (T, B, I) or (T, B, N, I)
        h, last = (x.unsqueeze(2) if single else x), []
        for k in range(problem.layers):
            w_ih, w_hh, b_ih, b_hh = (weights[f"{name}_l{k}"].unflatten(1, (4, -1)).transpose(0, 1) for name in NAMES)
            projected = torch.einsum("tbni,gndi->btgnd", h, w_ih)
            states, final = flashrnn(projected, w_hh, b_ih + b_hh, function="lstm", backend=kernel, dtype=dtype)
            h = states[0].transpose(0, 1)  # (T, B, N, D)
            last.append(final[:, :, 0].transpose(1, 2))  # (S, N, B, D)
        final_h, final_c = torch.stack(last, 2)  # (N, layers, B, D) each
        return (h.squeeze(2), final_h[0], final_c[0]) if single else (h, final_h, final_c)

    return Variant(FLASHRNN, forward, {name: (w,) for name, w in weights.items()}, f"backend {kernel}")


# torchrl 0.14: lstm_triton(x (B, T, I), h and c (B, T, H) after resets, torch.nn's weights, is_init (B, T)) gives h and
# c of all steps and the last; gru_triton the same with h alone. They are what `recurrent_backend="triton"` of its
# LSTMModule and GRUModule calls; called without the modules, because their TensorDicts take time that is not the
# kernels'.
def _torchrl_refuses(case: Case) -> str:
    p = case.problem
    if p.cell not in ("LSTM", "GRU"):
        return "has kernels for LSTM and GRU only"
    if case.dtype not in ("fp32", "ieee"):
        return "takes fp32 only"
    if p.bidirectional or p.heads > 1 or p.option not in ("", "resets"):
        return "runs forward in time, without heads, with no option but resets"
    return ""


def _torchrl(case: Case, layers: list[nn.Module], call: Call) -> Variant:
    from torchrl.modules.tensordict_module import _rnn_triton as kernels

    problem, layer = case.problem, layers[0]
    run = kernels.lstm_triton if problem.cell == "LSTM" else kernels.gru_triton
    states = 2 if problem.cell == "LSTM" else 1
    weight = next(layer.parameters())
    is_init = torch.zeros(problem.B, problem.T, dtype=torch.bool, device=weight.device)
    if "resets" in call:
        is_init = call["resets"].transpose(0, 1).contiguous()
    zeros = [weight.new_zeros(problem.B, problem.T, problem.H)] * states  # what a reset sets the states to
    precision = "ieee" if case.dtype == "ieee" else "tf32"

    def forward(x: Tensor) -> tuple[Tensor, ...]:  # (T, B, I)
        h, last = x.transpose(0, 1).contiguous(), []
        for k in range(problem.layers):
            weights = [layer.get_parameter(f"{name}_l{k}") for name in NAMES]
            found = run(h, *zeros, *weights, is_init, input_precision=precision)
            h, final = found[0], found[states:]
            last.append(final)
        return h.transpose(0, 1), *(torch.stack(each) for each in zip(*last, strict=True))

    return Variant(TORCHRL, forward, {name: (w,) for name, w in layer.named_parameters()}, "its Triton kernels")


NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
Adapter = tuple[Callable[[Case], str], Callable[[Case, list[nn.Module], Call], Variant]]
ADAPTERS: dict[str, Adapter] = {
    FLASHRNN: (_flashrnn_refuses, _flashrnn),
    TORCHRL: (_torchrl_refuses, _torchrl),
    BY_HAND: (by_hand.refuses, by_hand.by_hand),
    COMPILED: (by_hand.refuses, by_hand.compiled),
    ONNXRUNTIME: (onnx_runtime.refuses, onnx_runtime.variant),
}
STREAMING: dict[str, Adapter] = {
    BY_HAND: (by_hand.refuses, streaming.by_hand),
    ONNXRUNTIME: (onnx_runtime.refuses, streaming.onnxruntime),
}
NO_STREAMS: Adapter = (lambda case: "is not measured on streams", ADAPTERS[BY_HAND][1])
