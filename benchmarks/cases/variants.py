# SPDX-License-Identifier: Apache-2.0
"""The terms of a comparison: a case, its inputs, and the variants that compute it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import options
from benchmarks.cases.problems import Problem

# "fp32" multiplies as torch's recurrent layers do by default (tf32 on a GPU), "ieee" in full precision.
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16, "ieee": torch.float32}

Outputs = dict[str, Tensor]
Forward = Callable[[Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """A problem in one dtype and direction: what its variants are compared on. `threads` are a CPU's."""

    set: str
    problem: Problem
    dtype: str
    direction: str
    threads: int | None = None

    def __str__(self) -> str:
        words = f"{self.set}/{self.problem.name} {self.dtype} {self.direction}"
        return words if self.threads is None else f"{words} threads {self.threads}"

    @property
    def key(self) -> tuple[str, str, str, str, str]:
        """The columns that name it."""
        return self.set, self.problem.name, self.dtype, self.direction, str(self.threads or "")

    @property
    def option(self) -> options.Option:
        return options.OPTIONS[self.problem.option] if self.problem.option else options.NONE


@dataclass(frozen=True)
class Inputs:
    """(T, B, I), or (T, B, heads, I), and in training the gradients of y, of the final states and, if they are
    returned, of the states of all steps."""

    x: Tensor
    d_outputs: tuple[Tensor, ...] = ()

    def to(self, dtype: torch.dtype) -> Inputs:
        x = self.x.detach().to(dtype).requires_grad_(self.x.requires_grad)
        return Inputs(x, tuple(d.to(dtype) for d in self.d_outputs))


@dataclass(frozen=True)
class Variant:
    """A name, a function from x to (y, states …), and the weights it uses: one tensor of each name, or one a head.

    `note` says what else there is to know of it.
    """

    name: str
    forward: Forward
    weights: Mapping[str, tuple[Tensor, ...]]
    note: str = ""

    def call(self, inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
        """What is checked and then timed: inference, or forward and backward to x and the weights."""

        def inference() -> tuple[Tensor, ...]:
            with torch.inference_mode():
                return self.forward(inputs.x)

        wanted = [inputs.x, *(tensor for tensors in self.weights.values() for tensor in tensors)]

        def training() -> tuple[Tensor, ...]:
            outputs = self.forward(inputs.x)
            return (*outputs, *torch.autograd.grad(outputs, wanted, inputs.d_outputs))

        return training if inputs.d_outputs else inference

    def results(self, inputs: Inputs) -> Outputs:
        """One call's outputs and gradients by name, the heads' gradients one after another."""
        found = iter(self.call(inputs)())
        states = len(inputs.d_outputs) - 1
        named = {"y": next(found)}
        if not inputs.d_outputs:
            return named | {f"state {k}": state for k, state in enumerate(found)}
        named |= {f"state {k}": next(found) for k in range(states)} | {"d_x": next(found)}
        for name, tensors in self.weights.items():
            named[f"d_{name}"] = torch.cat([next(found).flatten() for _ in tensors])
        return named
