# SPDX-License-Identifier: Apache-2.0
"""The table of backends: what follows from an entry, and that an entry is all that a new backend needs."""

from __future__ import annotations

import re

import pytest
import torch

import gpu_rnn
from gpu_rnn import backends
from gpu_rnn.backends.problem import Problem
from gpu_rnn.call import loop_plan, passes
from gpu_rnn.diagnostics import debugging, tuning
from gpu_rnn.dispatch import choice, lines
from tests.support import toy_backend
from tests.support.profiling import operations

READERS = (backends, choice, lines, loop_plan, passes, debugging, tuning)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy in the table, before the reference."""
    table = dict(backends.TABLE)
    reference = table.pop("reference")
    names = backends.Names.of(table | {"toy": backends.Entry(toy_backend, toy_backend), "reference": reference})
    for field, value in names._asdict().items():
        for module in (each for each in READERS if hasattr(each, field)):
            monkeypatch.setattr(module, field, value)
    for name in ("_select", "_candidates"):
        monkeypatch.setattr(choice, name, getattr(choice, name).__wrapped__)
    monkeypatch.setattr(choice, "way", lines.Way)


def test_what_follows_from_the_table() -> None:
    assert list(backends.BACKENDS) == ["resident", "group", "aten", "native", "step", "reference"]
    assert list(backends.KERNELS) == ["resident", "group", "native", "step"]
    assert backends.LOOPS == ("resident", "group", "native", "step", "reference")
    assert backends.WAVEFRONTS == ("resident", "group")


@pytest.mark.parametrize("name", [name for name in backends.BACKENDS if name != "reference"])
def test_an_option_that_a_backend_was_not_taught_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = gpu_rnn.explain(gpu_rnn.LSTM(3, 4), torch.empty(5, 2, 3)).problem
    monkeypatch.setattr(Problem, "options", {"novel": "what is new"})
    assert "does not take what is new" in backends.BACKENDS[name].unsupported(problem)


@pytest.mark.usefixtures("toy")
def test_a_module_and_an_entry_make_a_backend() -> None:
    layer = gpu_rnn.LSTM(3, 4, 2, bidirectional=True, backend="toy")
    explanation = gpu_rnn.explain(layer, torch.empty(5, 2, 3))
    assert {row.backend: row.source for row in explanation.rows}["toy"] == "modelled"  # no fit has its constants
    assert explanation.chosen == "toy" and re.search(r"^toy +chosen", str(explanation), re.M)
    assert gpu_rnn.explain(gpu_rnn.LSTM(3, 4), torch.empty(5, 2, 3)).chosen == "aten"  # which is said to be faster

    x = torch.randn(5, 2, 3, requires_grad=True)
    events = ["gpu_rnn::toy_forward"] * 2 + ["gpu_rnn::toy_backward"] * 2
    ran = operations(lambda: layer(x)[0].sum().backward())
    assert [name for name in ran if name.startswith("gpu_rnn::toy")] == events
    found, x.grad = x.grad, None
    layer.backend = "reference"
    layer(x)[0].sum().backward()
    torch.testing.assert_close(found, x.grad)


@pytest.mark.usefixtures("toy")
def test_its_reasons_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = gpu_rnn.LSTM(3, 4, dtype=torch.complex64, backend="toy")
    with pytest.raises(ValueError, match="backend='toy' cannot run this call:\n  - the toy takes real numbers"):
        layer(torch.randn(5, 2, 3, dtype=torch.complex64))
    monkeypatch.setattr(toy_backend, "cost", lambda problem, constants: 0.0)
    assert gpu_rnn.explain(gpu_rnn.LSTM(3, 4), torch.empty(5, 2, 3)).chosen == "toy"
