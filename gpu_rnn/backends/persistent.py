# SPDX-License-Identifier: Apache-2.0
"""What the launchers of the persistent kernels share: limits, forms of arguments, and the rates that their models count
with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gpu_rnn import devices
from gpu_rnn.backends.problem import Problem
from gpu_rnn.backends.tensors import Call, LoopGradients
from gpu_rnn.devices import CPU_FLOPS

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# The first architecture with bfloat16 products, asynchronous copies, and a maximum that passes NaN on.
OLDEST = (8, 0)

# Rates of a multiprocessor, per cycle: CUDA C++ programming guide, table of arithmetic throughput.
SHARED_BYTES = 128  # from shared memory
L2 = 50 << 20  # bytes that stay near from step to step: an H100's; an A100 has 40 MB
LANES, SPECIAL = 128, 16  # fp32 operations, and exponentials or roots
FUNCTIONS = (
    "tanh",
    "sigmoid",
    "exp",
    "expm1",
    "log",
    "log1p",
    "sqrt",
    "erf",
    "sin",
    "cos",
)  # an exponential and a root each


def product_rate(problem: Problem) -> float:
    """Floating-point operations a second that large products of a problem reach at most."""
    device = problem.device
    if not device.is_gpu:
        return CPU_FLOPS
    if problem.dtype.itemsize == 2:
        return device.tensor_flops * 1e12
    if problem.dtype == torch.float32 and problem.precision == "tf32":
        return device.tensor_flops * 1e12 / 2
    return 2 * LANES * device.sms * device.clock * 1e9


def products(problem: Problem) -> float:
    """Seconds that all products of a pass take at least, one a step, which reads a large W_hh from memory each time."""
    operations = problem.flops / product_rate(problem)
    weights = problem.N * problem.G * problem.H * (problem.proj_size or problem.H) * problem.dtype.itemsize
    if not problem.device.is_gpu or weights < L2:
        return operations
    return max(operations, problem.T * problem.layers * weights / (problem.device.memory_rate * 1e9))


def here(problem: Problem) -> list[torch.device]:
    """The devices at hand that a problem may be on: only such as are in use already, for to ask another would make a
    context there, which takes memory and seconds."""
    each = [torch.device("cuda", index) for index in range(torch.cuda.device_count()) if _in_use(index)]
    return [device for device in each if devices.of(device) == problem.device]


def _in_use(index: int) -> bool:
    return bool(torch._C._cuda_hasPrimaryContext(index))  # type: ignore[attr-defined]  # builds without CUDA lack it


def unsupported(problem: Problem) -> list[str]:
    """What speaks against both kernels."""
    device, reasons = problem.device, []
    if device.is_gpu and device.capability < OLDEST:
        reasons.append(f"needs compute capability {OLDEST[0]}.{OLDEST[1]} or newer, which {device.name} has not")
    if problem.proj_size:
        reasons.append("has no projection of h (proj_size)")
    if problem.dtype not in DTYPES:
        reasons.append(f"takes float16, bfloat16 and float32, not {str(problem.dtype).removeprefix('torch.')}")
    return reasons + problem.without("lengths", "flags", "reset_values", "drop", "zone", "all_states")


def summed(call: Call, found: LoopGradients) -> LoopGradients:
    """The gradients, those of per-unit parameters summed over the kernel's shares (shares, N, P, H)."""
    shares = found.d_params if call.program.params else None
    return found._replace(d_params=None if shares is None else shares.sum(0))


def beside(call: Call, gates: Tensor) -> tuple[Tensor, Tensor]:
    """The saved gates as a backward kernel reads them, and where their gradients go, with the same strides, gaps too:
    the kernels have one set of offsets for both. Gates that share memory, as vmap makes them, are copied: gradients do
    not."""
    gates = rows(gates)
    if call.d_gates is not None and call.d_gates.stride() == gates.stride():
        return gates, call.d_gates
    gates = gates.contiguous() if not gates.is_contiguous() and may_overlap(gates) else gates
    return gates, torch.empty_strided(gates.shape, gates.stride(), dtype=gates.dtype, device=gates.device)


def may_overlap(tensor: Tensor) -> bool:
    """Whether two elements may lie at one place, as those of an expanded tensor do; by strides alone, so true of some
    that interleave as well."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def bits(reverse: str) -> tuple[int, int]:
    """`reverse` as a bit mask over its shortest period, and that period."""
    lengths = (p for p in range(1, len(reverse) + 1) if reverse[:p] * (len(reverse) // p) == reverse)
    period = next(lengths, 1)
    return int(reverse[:period][::-1] or "0", 2), period


def rows(tensor: Tensor) -> Tensor:
    """The tensor with its last dimension contiguous, which is all that the kernels ask of it."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


# Which build of a kernel runs depends on how its tensors lie. What comes from outside is brought to one form, so that a
# user's CUDA graph, which cannot load another build while it is captured, needs the one that the call before it had.


def whole(tensor: Tensor) -> Tensor:
    """The tensor contiguous and at a multiple of 16 bytes, which an allocation is and a part of one need not be."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def even_rows(tensor: Tensor) -> Tensor:
    """As `rows`, with rows that all lie at the multiples at which those of a contiguous tensor lie, up to 16
    elements."""
    apart, (*strides, last) = math.gcd(16, tensor.shape[-1]), tensor.stride()
    even = last == 1 and tensor.data_ptr() % 16 == 0 and all(stride % apart == 0 for stride in strides)
    return tensor if even else tensor.clone(memory_format=torch.contiguous_format)
