# SPDX-License-Identifier: Apache-2.0
"""Random combinations of every option, values and gradients, beside the loops by hand of `options_by_hand`."""

from __future__ import annotations

from collections import Counter
from typing import Any

import options_by_hand as by_hand
import pytest
import torch
from cuda_cpu.machines import NEEDS_COMPILER
from group_support import pretend
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from options_by_hand import Given
from torch import Tensor

from gpu_rnn import cells, functional
from gpu_rnn.recurrence import Recurrence

OPTIONS = (
    "mask",
    "lengths",
    "resets",
    "reset_state",
    "reset_state_per_step",
    "recurrent_dropout",
    "recurrent_dropout_per_gate",
    "zoneout",
    "layer_norm",
    "all_states",
    "bidirectional",
    "num_layers",
    "proj_size",
    "no_bias",
    "batch_first",
)
RECURRENCES: dict[str, Recurrence] = {name: cells.CELLS[name]() for name in by_hand.CELLS}
TIGHT, SINGLE = 1e-9, 2e-5  # float64 and float32, sums in another order

counted: Counter[str] = Counter()


@st.composite
def calls(draw: Any, without: frozenset[str] = frozenset()) -> dict[str, Any]:
    """A combination of options that makes sense, and sizes."""
    cell = draw(st.sampled_from(sorted(RECURRENCES)))
    chosen = draw(st.sets(st.sampled_from([name for name in OPTIONS if name not in without]), max_size=6))
    if "proj_size" in chosen:
        cell = "lstm"
        chosen -= {"zoneout"}  # of a projected h there is none
    if "reset_state_per_step" in chosen:
        chosen -= {"reset_state"}
    if chosen & {"reset_state", "reset_state_per_step"}:
        chosen |= {"resets"}
    if "recurrent_dropout_per_gate" in chosen:
        chosen -= {"recurrent_dropout"}
    sizes = {name: draw(st.integers(1, most)) for name, most in (("T", 5), ("B", 3), ("I", 3), ("H", 4))}
    return {"cell": cell, "options": frozenset(chosen), "seed": draw(st.integers(0, 2**20)), **sizes}


def tensors(call: dict[str, Any]) -> Given:
    """The call's tensors, float64, differentiable ones as leaves."""
    options, cell = call["options"], call["cell"]
    generator = torch.Generator().manual_seed(call["seed"])

    def normal(*shape: int) -> Tensor:
        return (0.7 * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()

    def chance(*shape: int, p: float = 0.4) -> Tensor:
        return torch.rand(shape, generator=generator) < p

    T, B, I, H = (call[name] for name in "TBIH")  # noqa: E741
    gates, states = by_hand.CELLS[cell][1], len(RECURRENCES[cell].states)
    directions, layers = 1 + ("bidirectional" in options), 1 + ("num_layers" in options)
    P = max(1, H - 1) if "proj_size" in options else H
    weights = []
    for index in range(layers * directions):
        own = {"weight_ih": normal(gates * H, directions * P if index >= directions else I), "weight_hh": normal(gates * H, P)}
        if "no_bias" not in options:
            own |= {"bias_ih": normal(gates * H), "bias_hh": normal(gates * H)}
        if "proj_size" in options:
            own["weight_hr"] = normal(P, H)
        if cell == "peephole_lstm":
            own["weight_peephole"] = normal(3, H)
        if "layer_norm" in options:
            own |= {"norm_ih": normal(gates * H), "norm_hh": normal(gates * H)}
        weights.append(own)
    rows, widths = layers * directions, [P, H][:states]
    steps = (T,) if "reset_state_per_step" in options else ()
    resetting = options & {"reset_state", "reset_state_per_step"}
    masks = gates if "recurrent_dropout_per_gate" in options else 1
    dropping = options & {"recurrent_dropout", "recurrent_dropout_per_gate"}
    return Given(
        cell,
        normal(T, B, I),
        weights,
        [normal(rows, B, width) for width in widths],
        directions,
        mask=~chance(T, B) if "mask" in options else None,
        lengths=torch.randint(0, T + 1, (B,), generator=generator) if "lengths" in options else None,
        resets=chance(T, B) if "resets" in options else None,
        reset_state=[normal(*steps, rows, B, width) for width in widths] if resetting else None,
        recurrent_mask=chance(rows, B, masks, P, p=0.6).double() / 0.6 if dropping else None,
        zone=chance(states, T, rows, B, H) if "zoneout" in options else None,
    )


def leaves(made: Given) -> list[Tensor]:
    return [made.x, *(w for own in made.weights for w in own.values()), *made.states, *(made.reset_state or [])]


def ours(made: Given, options: frozenset[str], backend: str) -> list[Tensor]:
    """The library's results: y, the final states and, if wanted, all states."""
    first = "batch_first" in options

    def laid(tensor: Tensor | None) -> Tensor | None:
        return tensor.transpose(0, 1) if first and tensor is not None else tensor

    y, *states = functional.rnn(
        laid(made.x),
        tuple(made.states),
        [w for own in made.weights for w in own.values()],
        RECURRENCES[made.cell],
        bias="no_bias" not in options,
        num_layers=len(made.weights) // made.directions,
        bidirectional=made.directions == 2,
        batch_first=first,
        proj_size=made.states[0].shape[-1] if "proj_size" in options else 0,
        backend=backend,
        mask=laid(made.mask),
        lengths=made.lengths,
        resets=laid(made.resets),
        reset_state=made.reset_state and tuple(made.reset_state),
        recurrent_mask=made.recurrent_mask,
        zone=made.zone,
        norm="layer_norm" in options,
        all_states="all_states" in options,
    )
    return [laid(y), *(state for parts in states for state in parts)]


def values_and_gradients(outputs: list[Tensor], made: Given) -> list[Tensor]:
    """Outputs, and the gradients of a fixed sum of them with weights of its own for every element."""
    total = sum((out.double() * torch.arange(1.0, out.numel() + 1).view(out.shape).sin()).sum() for out in outputs)
    total = total + 0 * made.x.sum()  # where all steps are masked and reset, nothing else wants a gradient
    grads = torch.autograd.grad(total, leaves(made), allow_unused=True, materialize_grads=True)
    return [value.detach().double() for value in (*outputs, *grads)]


def compare(call: dict[str, Any], backend: str, dtype: torch.dtype, tolerance: float) -> None:
    made, options = tensors(call), call["options"]
    y, final, every = by_hand.run(made)
    expected = values_and_gradients([y, *final, *(every if "all_states" in options else [])], made)
    low = made if dtype == torch.float64 else made.to(dtype)
    found = values_and_gradients(ours(low, options, backend), low)
    for value, truth in zip(found, expected, strict=True):
        scale = max(1.0, truth.abs().max().item()) if truth.numel() else 1.0
        torch.testing.assert_close(value, truth, rtol=0, atol=tolerance * scale)
    counted[backend] += 1
    counted.update(f"{backend} {name}" for name in (*options, call["cell"]))


def combinations(count: int) -> Any:
    """The same `count` combinations at every run."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=checks)


@combinations(1000)
@given(calls())
def test_reference(call: dict[str, Any]) -> None:
    compare(call, "reference", torch.float64, TIGHT)


@combinations(400)
@given(calls())
def test_step(call: dict[str, Any]) -> None:
    compare(call, "step", torch.float64, TIGHT)


@pytest.mark.interpreter
@combinations(150)
@given(calls())
def test_step_in_the_interpreter(call: dict[str, Any]) -> None:
    compare(call, "step", torch.float32, SINGLE)


@pytest.mark.interpreter
@combinations(150)
@given(calls(without=frozenset({"layer_norm", "proj_size"})))
def test_resident_in_the_interpreter(call: dict[str, Any]) -> None:
    compare(call, "resident", torch.float32, SINGLE)


# Each is a build of the group kernel, with every option that it takes in one of them at least.
BUILDS = (
    ("lstm", {"mask", "all_states", "bidirectional"}),
    ("lstm", {"resets", "reset_state", "recurrent_dropout", "num_layers"}),
    ("lstm", {"zoneout", "all_states", "batch_first"}),
    ("gru", {"lengths", "recurrent_dropout_per_gate", "no_bias"}),
    ("gru", {"mask", "resets", "zoneout", "batch_first"}),
    ("peephole_lstm", {"lengths", "zoneout", "recurrent_dropout"}),
    ("peephole_lstm", {"mask", "recurrent_dropout_per_gate", "bidirectional", "num_layers"}),
    ("rnn", {"resets", "reset_state_per_step", "mask", "all_states"}),
)


@pytest.mark.cuda_cpu
@NEEDS_COMPILER
@combinations(150)
@given(st.sampled_from(BUILDS), calls())
def test_group_on_the_cpu(build: tuple[str, set[str]], call: dict[str, Any]) -> None:
    cell, options = build
    with pytest.MonkeyPatch.context() as monkeypatch:
        pretend(monkeypatch)
        monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")
        compare(call | {"cell": cell, "options": frozenset(options)}, "group", torch.float32, SINGLE)


def report(test: str, without: tuple[str, ...] = ()) -> None:
    """Prints how many calls had each option; an option that none had fails."""
    found = {name: counted[f"{test} {name}"] for name in (*OPTIONS, *RECURRENCES) if name not in without}
    print(f"\n{test}: {counted[test]} calls;", ", ".join(f"{name} {count}" for name, count in found.items()))
    assert all(found.values()), [name for name, count in found.items() if not count]


@pytest.mark.parametrize("test", ["reference", "step", "group"])
def test_every_option_was_drawn(test: str) -> None:
    if not counted[test]:
        pytest.skip("counts what the tests above drew in the same run")
    report(test, ("layer_norm", "proj_size", "gru_reset_before") if test == "group" else ())


@pytest.mark.interpreter
@pytest.mark.parametrize("test", ["step", "resident"])
def test_every_option_was_drawn_in_the_interpreter(test: str) -> None:
    if not counted[test]:
        pytest.skip("counts what the tests above drew in the same run")
    report(test, ("layer_norm", "proj_size") if test == "resident" else ())
