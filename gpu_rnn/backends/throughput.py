# SPDX-License-Identifier: Apache-2.0
"""What a device does at most, which the backends' cost models count with."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gpu_rnn.backends.problem import Problem
from gpu_rnn.compiler.operations import Op
from gpu_rnn.devices import CPU_FLOPS

L2 = 50 << 20  # bytes that stay near from step to step: an H100's; an A100 has 40 MB

# Of a multiprocessor: CUDA C++ programming guide, table of arithmetic throughput.
SHARED_BYTES_PER_CYCLE = 128  # from shared memory
FP32_PER_CYCLE = 128
SPECIAL_PER_CYCLE = 16  # exponentials or roots

# Operations of a program that are an exponential and a root each.
SPECIAL_FUNCTIONS = ("tanh", "sigmoid", "exp", "expm1", "log", "log1p", "sqrt", "erf", "sin", "cos")


def product_rate(problem: Problem) -> float:
    """Floating-point operations a second that large products of a problem reach at most."""
    device = problem.device
    if not device.is_gpu:
        return CPU_FLOPS
    if problem.dtype.itemsize == 2:
        return device.tensor_flops * 1e12
    if problem.dtype == torch.float32 and problem.precision == "tf32":
        return device.tensor_flops * 1e12 / 2
    return 2 * FP32_PER_CYCLE * device.sms * device.clock * 1e9


def products(problem: Problem) -> float:
    """Seconds that all products of a pass take at least, one a step, which reads a large W_hh from memory each time."""
    operations = problem.flops / product_rate(problem)
    weights = problem.N * problem.G * problem.H * (problem.proj_size or problem.H) * problem.dtype.itemsize
    if not problem.device.is_gpu or weights < L2:
        return operations
    return max(operations, problem.T * problem.layers * weights / (problem.device.memory_rate * 1e9))


def projection(problem: Problem) -> float:
    """Seconds that the input products of a pass take at least."""
    return problem.flops * problem.I / (problem.I + (problem.proj_size or problem.H)) / product_rate(problem)


def multiplications(problem: Problem, tensor_share: float, shuffled: float = 1.0) -> float:
    """Those of a step's products that a multiprocessor does in a cycle: on tensor cores this share of their peak rate,
    in full fp32 none on tensor cores, and this many times as long as the multiplications alone."""
    device = problem.device
    rate = tensor_share * device.tensor_flops * 1e12 / 2 / (device.sms * device.clock * 1e9)
    if problem.dtype.itemsize == 2:
        return rate
    return rate / 2 if problem.precision == "tf32" else FP32_PER_CYCLE / shuffled


def special(operations: Sequence[Op]) -> int:
    """Exponentials and roots in some operations of a program."""
    return 2 * sum(op.name in SPECIAL_FUNCTIONS for op in operations)
