# SPDX-License-Identifier: Apache-2.0
"""A projection of h on the group kernel, which projects nothing: W_hh W_hr in its loop and products around it.

``python -m tests.backends.group.test_projection``, where CuPy is, writes the table of kernels/README.md.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap

import gpu_rnn
from gpu_rnn.backends import chains
from gpu_rnn.backends.group.choice import cost, floor, modelled
from gpu_rnn.backends.group.launch import unsupported
from gpu_rnn.backends.group.projecting import around, plain
from gpu_rnn.backends.problem import Problem
from gpu_rnn.backends.tensors import RESET, SKIP
from gpu_rnn.diagnostics.explanation import Explanation
from gpu_rnn.dispatch import choice
from tests.support import tables
from tests.support.cuda.machines import NEEDS_COMPILER
from tests.support.group import pretend
from tests.support.layer_options import Case, inputs_of
from tests.support.loops import draw, values_and_gradients
from tests.support.paths import ROOT
from tests.support.resident import TIGHT, compare, settings  # noqa: F401

PAGE, COMMAND, STEPS = ROOT / "kernels" / "README.md", "python -m tests.backends.group.test_projection", 500
PLACES = [
    pytest.param("cpu", marks=[pytest.mark.cuda_cpu, NEEDS_COMPILER]),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
SHAPE = (5, 4, 20)  # T, B, H
CASES: list[Case] = [
    ("lstm", "proj", "", torch.float32, SHAPE, "0", True),
    ("lstm", "proj lengths", "", torch.float32, SHAPE, "01", True),
    ("lstm", "proj mask", "all_states", torch.float32, SHAPE, "01", True),
    ("lstm", "proj mask reset_values_per_step", "", torch.float32, SHAPE, "10", True),
    ("lstm", "proj", "", torch.bfloat16, (6, 9, 130), "0", True),
    ("lstm", "proj lengths", "", torch.float16, (6, 9, 64), "01", True),
]
FURTHER: list[Case] = [
    ("lstm", "proj mask reset_values", "all_states", torch.float32, SHAPE, "0", False),
    ("peephole_lstm", "proj resets", "", torch.float32, SHAPE, "1", True),
    ("slstm", "proj mask resets", "all_states", torch.float32, SHAPE, "01", True),
    ("coupled_lstm", "proj mask resets", "", torch.bfloat16, (5, 17, 260), "01", True),
    ("lstm", "proj reset_values", "all_states", torch.float16, (1, 1, 2), "0", True),
]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device that tensors lie on; a CPU counts as an H100."""
    if request.param == "cpu":
        pretend(monkeypatch)
    return str(request.param)


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in FURTHER)], ids=str)
def test_values_and_gradients(case: Case, place: str) -> None:
    compare(*inputs_of(case), place, "group")


NORMALISED = [
    ("norm", ("proj mask reset_values", "all_states", torch.float32, SHAPE, "01")),
    pytest.param("norm", ("proj lengths", "", torch.float32, SHAPE, "01"), marks=pytest.mark.slow),
    pytest.param("rms", ("proj mask resets", "", torch.bfloat16, (6, 9, 130), "0"), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "case"), NORMALISED, ids=str)
def test_normalised_products(name: str, case: Case, place: str) -> None:
    """An h from outside has a product of its own to normalise."""
    recurrence, inputs = inputs_of(("lstm", *case, True))
    scales = (1 + draw(*inputs.weights.w_hh.shape[:3], seed=77, scale=0.3)).to(inputs.x.dtype).requires_grad_()
    weights = inputs.weights._replace(norm=scales)
    compare(recurrence, inputs._replace(weights=weights, rms=name == "rms"), place, "group")


def test_a_stack_in_training_and_by_a_plan(place: str) -> None:
    """Two layers of both directions, and calls in inference that are made once more."""
    layer = gpu_rnn.LSTM(3, 20, 2, bidirectional=True, proj_size=6, backend="group", device=place)
    x, hx = (
        torch.randn(4, 2, 3, device=place),
        (torch.randn(4, 2, 6, device=place), torch.randn(4, 2, 20, device=place)),
    )
    found = []
    for layer.backend in ("group", "reference"):
        y, states = layer(x, hx)
        grads = torch.autograd.grad(y.sin().sum() + states[0].sum(), layer.parameters())
        with torch.no_grad():
            again = [layer(x, hx)[0] for _ in range(4)]
        assert all(torch.equal(each, again[0]) for each in again) and torch.equal(states[0][-2], y[-1, :, :6])
        found.append((y, *states, again[0], *grads))
    torch.testing.assert_close(*found, rtol=0, atol=2e-5 * max(1.0, *(g.abs().max().item() for g in found[1])))


def test_members_and_second_derivatives(place: str) -> None:
    """vmap over the weights of three layers, and the gradient of a gradient, beside the reference."""
    members = [gpu_rnn.LSTM(2, 5, proj_size=3, device=place) for _ in range(3)]
    params, _ = stack_module_state(members)
    x = torch.randn(4, 2, 2, device=place)

    def results(backend: str) -> list[Tensor]:
        layer = gpu_rnn.LSTM(2, 5, proj_size=3, backend=backend, device=place)
        leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
        y = vmap(lambda p: functional_call(layer, p, (x,))[0])(leaves)
        first = torch.autograd.grad(y.sin().sum(), list(leaves.values()), create_graph=True)
        second = torch.autograd.grad(sum((g**2).sum() for g in first), list(leaves.values()))
        return [y, *first, *second]

    for found, truth in zip(results("group"), results("reference"), strict=True):
        torch.testing.assert_close(found, truth, rtol=0, atol=TIGHT * max(1.0, truth.abs().max().item()))


@pytest.mark.parametrize(("option", "which"), [("mask", SKIP), ("reset_values_per_step", RESET)])
def test_nan_that_no_step_uses_does_not_leak(option: str, which: int, place: str) -> None:
    """What skipped steps are given, or an h that a reset drops."""
    found = []
    for padding in (float("nan"), 0.0):
        recurrence, inputs = inputs_of(("lstm", f"proj {option}", "", torch.float32, SHAPE, "01", True))
        flagged = (inputs.controls.flags & which).bool()
        with torch.no_grad():
            if which == SKIP:
                inputs.x[flagged.all(-1)] = padding
            else:
                inputs.states[0][torch.stack([flagged[0, :, 0], flagged[-1, :, 1]], 1)] = padding
                for value in inputs.reset_values:
                    value[~flagged] = padding
        results = values_and_gradients(recurrence, inputs.on(place), "group")
        found.append({name: value for name, value in results.items() if name != "d w_ih"})  # a product with x itself
    torch.testing.assert_close(*found, rtol=0, atol=0)


BESIDE = {"recurrent dropout": {"recurrent_dropout": 0.1}, "zoneout": {"zoneout": (0.0, 0.1)}}


@pytest.mark.parametrize("words", BESIDE)
def test_what_acts_on_h_between_the_products_is_refused(words: str, with_cupy: None) -> None:
    layer = gpu_rnn.LSTM(64, 512, proj_size=256, dtype=torch.bfloat16, device="meta", **BESIDE[words])
    rows = {row.backend: row for row in explained(layer).rows}
    assert rows["group"].reasons == (f"does not take {words} with a projection of h (proj_size)",)
    assert rows["step"].chosen


def explained(layer: gpu_rnn.LSTM) -> Explanation:
    return gpu_rnn.explain(layer, torch.empty(500, 64, 64, dtype=torch.bfloat16, device="meta"), device="H100")


def test_other_recurrences_are_refused_in_words() -> None:
    split = Problem(recurrence=gpu_rnn.cells.gru(), T=1, B=1, N=1, I=1, H=64, proj_size=8)
    assert any("projects h (proj_size) where all gates are sums, not n" in reason for reason in unsupported(split))
    begins = gpu_rnn.Recurrence(lambda x, r, s: torch.tanh(x.a + r.a), gates=("a",), states={"h": 0.5})
    assert any(
        "to 0 or to values given" in reason for reason in unsupported(replace(split, recurrence=begins, flags=True))
    )
    assert not any("values given" in reason for reason in unsupported(replace(split, recurrence=begins)))


def test_it_costs_what_it_costs_without_and_the_products_around_it(with_cupy: None) -> None:
    """A step is that of as many units, simulated too; what surrounds the loop is less than the loop."""
    sizes = {"T": 500, "B": 64, "N": 1, "I": 256, "H": 512}
    given = choice.described(Problem(recurrence=gpu_rnn.cells.lstm(), **sizes, dtype=torch.bfloat16), "H100")
    for direction in ("inference", "training", "backward"):
        whole = given.but(direction=direction)
        folded = whole.but(proj_size=256)
        assert cost(folded) == pytest.approx(cost(whole) + around(folded))
        assert 0 < around(folded) < cost(whole) / 2 and around(folded) <= around(folded.but(flags=True))
        assert floor(folded) < floor(whole) < cost(whole)
    layer = gpu_rnn.LSTM(64, 512, proj_size=256, dtype=torch.bfloat16, device="meta")
    assert {row.backend: row.source for row in explained(layer).rows}["group"] == "simulated"


def test_the_table_is_what_dispatch_takes(with_cupy: None) -> None:
    assert tables.written(PAGE, COMMAND) == table()


def table() -> str:
    """µs a step of what a training call takes, as a table in Markdown."""
    lines = [
        "| H to P, B | forward, loop | around | backward, loop | around | `resident` | `step` | `aten` | chosen |",
        "|---" * 9 + "|",
    ]
    for hidden, width, batch in ((128, 64, 16), (256, 128, 64), (512, 256, 64), (1024, 512, 16), (2048, 512, 64)):
        sizes = {"T": STEPS, "B": batch, "N": 1, "I": width, "H": hidden, "proj_size": width}
        given = Problem(recurrence=gpu_rnn.cells.lstm(), **sizes, dtype=torch.bfloat16, direction="training")
        forward = choice.described(given, "H100")
        figures = [
            f"{seconds * 1e6:.2f}"
            for each in (forward, forward.but(direction="backward"))
            for seconds in (chains.step(plain(each), "group", modelled), around(each) / STEPS)
        ]
        for name in ("resident", "step", "aten"):
            refused = choice.BACKENDS[name].unsupported(forward)
            figures.append("no" if refused else f"{choice.total_cost(forward, name) / STEPS * 1e6:.1f}")
        figures.append(f"`{choice.select(forward)}`")
        lines.append(" | ".join([f"| {hidden} to {width}, {batch}", *figures]) + " |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    tables.write(PAGE, COMMAND, table())
