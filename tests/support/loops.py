# SPDX-License-Identifier: Apache-2.0
"""One layer at the level of the time loops: random tensors in canonical layout, values and all gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gpu_rnn
from benchmarks.certifying.recurrences import RECURRENCES as RECURRENCES
from benchmarks.certifying.recurrences import WITH_ACTIVATIONS
from benchmarks.certifying.recurrences import minimal_gated_unit as minimal_gated_unit
from gpu_rnn import activations
from gpu_rnn.backends import tensors
from gpu_rnn.backends.problem import Problem
from gpu_rnn.backends.tensors import Call, LayerControls, Weights
from gpu_rnn.call import autograd
from gpu_rnn.call.passes import Options, call_of
from gpu_rnn.recurrence import Recurrence


def pairs() -> Iterator[tuple[str, str, str, Recurrence]]:
    """Every cell with every activation, and with every second activation: (cell, activation, second, recurrence)."""
    names = list(activations.ACTIVATIONS)
    for k, (cell, make) in enumerate(WITH_ACTIVATIONS.items()):
        for a, activation in enumerate(names):
            second = names[(3 * a + 5 * k + 1) % len(names)]
            yield cell, activation, second, make(activation, second)


class Inputs(NamedTuple):
    """What `gpu_rnn.call.autograd.layer` takes, in its layout."""

    x: Tensor  # (T, B, I)
    weights: Weights
    states: list[Tensor]  # (B, N, ·)
    controls: LayerControls = tensors.PLAIN
    reset_values: Sequence[Tensor] = ()
    reverse: str = "0"
    all_states: bool = False
    rms: bool = False

    @property
    def lengths(self) -> Tensor | None:
        return self.controls.lengths

    @property
    def layer(self) -> tensors.Inputs:
        """As `gpu_rnn.call.autograd.layer` takes them."""
        return tensors.Inputs(self.x, self.weights, self.controls, self.states, list(self.reset_values))

    def options(self, backend: str = "auto", save: bool = False) -> Options:
        return Options(backend, self.reverse, save, self.all_states, rms=self.rms)

    def call(self, recurrence: Recurrence, problem: Problem | None = None) -> Call:
        """As the backends take them."""
        return call_of(recurrence.text(), self.options(), self.layer, problem)

    def named(self) -> dict[str, Tensor]:
        """Everything that has a gradient."""
        weights = {name: w for name, w in self.weights._asdict().items() if w is not None}
        states = {f"state {k}": s for k, s in enumerate(self.states)}
        resets = {f"reset value {k}": s for k, s in enumerate(self.reset_values)}
        return {"x": self.x, **weights, **states, **resets}

    def on(self, device: str) -> Inputs:
        """The same on a device, as new leaves."""

        def move(tensor: Any) -> Any:
            return None if tensor is None else tensor.detach().to(device).requires_grad_(tensor.requires_grad)

        x, weights, states, controls, resets = self[:5]
        controls, weights = LayerControls(*map(move, controls)), Weights(*map(move, weights))
        return Inputs(move(x), weights, [*map(move, states)], controls, [*map(move, resets)], *self[5:])

    def detached(self) -> Inputs:
        """The same without gradients."""
        return self._replace(
            x=self.x.detach(),
            weights=Weights(*(None if w is None else w.detach() for w in self.weights)),  # type: ignore[arg-type]
            states=[state.detach() for state in self.states],
            reset_values=[value.detach() for value in self.reset_values],
        )

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values in another precision, as new leaves."""

        def cast(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.detach().to(dtype).requires_grad_()

        weights = Weights(*map(cast, self.weights))  # type: ignore[arg-type]
        drop = self.controls.drop
        return self._replace(
            x=cast(self.x),
            weights=weights,
            states=[cast(s) for s in self.states],  # type: ignore[misc]
            reset_values=[cast(s) for s in self.reset_values],  # type: ignore[misc]
            controls=self.controls._replace(drop=None if drop is None else drop.to(dtype)),
        )


def draw(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def make(
    recurrence: Recurrence,
    T: int = 5,
    B: int = 3,
    I: int = 2,  # noqa: E741
    H: int = 4,
    reverse: str = "0",
    bias: bool = True,
    proj: int = 0,
    lengths: tuple[int, ...] | None = None,
    seed: int = 0,
    scale: float = 0.5,
) -> Inputs:
    """Random tensors, float64 leaves. A projection needs a second state, which keeps the units' width."""
    n, gates, width = len(reverse), len(recurrence.gates), proj or H
    shapes = {
        "w_ih": (n, gates, H, I),
        "w_hh": (n, gates, H, width),
        "b_ih": (n, gates, H) if bias else None,
        "b_hh": (n, gates, H) if bias else None,
        "params": (n, len(recurrence.params), H) if recurrence.params else None,
        "w_hr": (n, proj, H) if proj else None,
    }
    weights = [s and draw(*s, seed=seed + k, scale=scale).requires_grad_() for k, s in enumerate(shapes.values(), 1)]
    states = [draw(B, n, width if k == 0 else H, seed=seed + 8 + k, scale=scale) for k in range(len(recurrence.states))]
    if "n" in recurrence.states:  # a normaliser is a sum of positive terms
        states[recurrence.states.index("n")].abs_().add_(0.5)
    return Inputs(
        draw(T, B, I, seed=seed).requires_grad_(),
        Weights(*weights),
        [state.requires_grad_() for state in states],
        LayerControls(None if lengths is None else torch.tensor(lengths)),
        reverse=reverse,
    )


def run(recurrence: Recurrence, inputs: Inputs, backend: str) -> list[Tensor]:
    """y (T, B, N, P), the final states (B, N, ·), and if wanted the other states of all steps."""
    y, turned, inner = autograd.layer(recurrence.text(), inputs.options(backend), inputs.layer)
    final = [state.transpose(0, 1) for state in turned]
    return [y, *final, *([inner] if inputs.all_states else [])]


def values_and_gradients(recurrence: Recurrence, inputs: Inputs, backend: str) -> dict[str, Tensor]:
    """All outputs, and the gradients of a fixed random sum of them by everything that has one."""
    outputs = run(recurrence, inputs, backend)
    total = sum((out * draw(*out.shape, seed=90 + k).to(out.dtype)).sum() for k, out in enumerate(outputs))
    wanted = inputs.named()
    grads = torch.autograd.grad(total, list(wanted.values()), allow_unused=True, materialize_grads=True)
    names = ["y", *(f"final {name}" for name in recurrence.states), *(["inner"] if inputs.all_states else [])]
    found = dict(zip(names, outputs, strict=True)) | {f"d {n}": g for n, g in zip(wanted, grads, strict=True)}
    return {name: value.detach() for name, value in found.items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Every tensor agrees, relative to its largest value."""
    assert actual.keys() == expected.keys()
    for name, truth in expected.items():
        scale = max(truth.abs().max().item(), 1.0) if truth.numel() else 1.0
        torch.testing.assert_close(
            actual[name], truth, rtol=0, atol=tolerance * scale, msg=lambda text, name=name: f"{name}: {text}"
        )


def layer(recurrence: Recurrence, backend: str = "auto", **options: object) -> gpu_rnn.Recurrent:
    """A small float64 layer with reproducible weights."""
    torch.manual_seed(0)
    # type: ignore[arg-type]
    return gpu_rnn.Recurrent(recurrence, 2, 3, dtype=torch.float64, backend=backend, **options)


def unmapped(outputs: Any, size: int) -> list[Any]:
    """What vmap gave, as the list of what the members gave."""
    if isinstance(outputs, Tensor):
        return list(outputs)
    parts = [unmapped(part, size) for part in outputs]
    return [tuple(part[k] for part in parts) for k in range(size)]
