# SPDX-License-Identifier: Apache-2.0
"""Calls with something wrong in them, drawn at random: an error in the library's own words, or the reference's result.

A crash would end the process that draws; the `slow` test draws many in processes of their own and sees it.
"""

from __future__ import annotations

import linecache
import os
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import gpu_rnn
from gpu_rnn import cells, functional
from tests.support import native
from tests.support.op_calls import CALLS, ROW

SWEEP = int(os.environ.get("MALFORMED_EXAMPLES", "0"))  # 0 outside of a sweep
PACKAGE = Path(gpu_rnn.__file__).parent
TORCHS_CHECKS = Path("torch", "nn", "modules", "rnn.py")  # what nn.RNNBase says of an input, the layers say too
T, B, I, H = 4, 3, 5, 2  # noqa: E741
LOOPS = ["auto", "step", "reference"]
MACHINES = [*LOOPS, native.SLOW_BACKEND, pytest.param("resident", marks=pytest.mark.interpreter)]


def drawn(test: Callable[..., None]) -> Callable[..., None]:
    """The same calls at every run, but for a sweep's."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    count = {"max_examples": SWEEP or 60, "derandomize": not SWEEP}
    return settings(**count, deadline=None, database=None, suppress_health_check=checks)(test)


DTYPES = [torch.float32] * 4 + [torch.float64, torch.bfloat16, torch.complex64, torch.int64, torch.uint8, torch.bool]


@st.composite
def tensors(draw: Any) -> Tensor:
    """Of any shape and dtype, on the CPU or "meta", dense or with strides of its own."""
    shape = draw(st.lists(st.sampled_from([0, 1, 1, 2, 3, 4, 5, 8, 127]), max_size=5))
    while np.prod(shape) > 10_000:
        shape.pop()
    made = torch.arange(int(np.prod(shape))).reshape(shape).to(draw(st.sampled_from(DTYPES)))
    match draw(st.integers(0, 9)):
        case 0:
            return made.to("meta")
        case 1:
            return made[..., None].expand(*shape, 2)
        case 2:
            return made.transpose(0, -1) if made.dim() > 1 else made
        case 3:
            return made.to_sparse() if made.dim() else made
    return made


def others(value: Any) -> st.SearchStrategy[Any]:
    """What may stand in the place of a value: nearly the same, or anything."""
    anything = [st.none(), st.integers(-2, 400_000), st.floats(), st.text(max_size=3), st.booleans(), tensors()]
    if isinstance(value, Tensor):
        near = [
            st.just(other) for other in (value[None], value[..., :1], value[:1], value.double(), value.numpy(), [value])
        ]
        return st.one_of(*near, tensors(), *anything)
    if isinstance(value, (list, tuple)):
        parts = st.lists(st.one_of(tensors(), st.none(), *(st.just(part) for part in value)), max_size=len(value) + 2)
        one = st.integers(0, len(value) - 1).flatmap(
            lambda n: others(value[n]).map(lambda new: [*value[:n], new, *value[n + 1 :]])
        )
        return st.one_of(parts, parts.map(tuple), one, one.map(tuple), *anything)
    return st.one_of(*anything)


@st.composite
def spoiled(draw: Any, calls: st.SearchStrategy[dict[str, Any]]) -> dict[str, Any]:
    """A call with some of its arguments replaced, or none."""
    call = dict(draw(calls))
    for name in draw(st.lists(st.sampled_from(sorted(call)), max_size=3, unique=True)):
        call[name] = draw(others(call[name]))
    return call


def own_words(error: BaseException) -> bool:
    """Whether the package, not something that it called, raised an error."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    path = Path(frame.filename)
    ours = path.is_relative_to(PACKAGE) or path.parts[-4:] == TORCHS_CHECKS.parts
    return ours and linecache.getline(frame.filename, frame.lineno or 0).lstrip().startswith("raise")


answers: Counter[str] = Counter()


@pytest.fixture(scope="module", autouse=True)
def both_answers_are_met() -> Iterator[None]:
    yield
    assert not answers or len(answers) == 2, answers


def check(run: Callable[[], Any], truth: Callable[[], Any]) -> None:
    """An error in own words, or what the reference returns."""
    try:
        found = leaves(run())
    except (ValueError, TypeError, RuntimeError) as error:
        answers["refused"] += 1
        if not own_words(error):
            raise AssertionError(f"not in the library's own words: {type(error).__name__}: {error}") from error
        return
    answers["taken"] += 1
    for own, expected in zip(found, leaves(truth()), strict=True):
        if not own.is_meta:
            torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-3, equal_nan=True)


def leaves(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [leaf for part in value for leaf in leaves(part)]


def weights(recurrence: gpu_rnn.Recurrence, **options: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = gpu_rnn.Recurrent(recurrence, I, H, **options)
    return [torch.randn(w.shape, generator=generator) for w in made._weights()]


KINDS = {name: make() for name, make in cells.CELLS.items() if name in ("rnn", "lstm", "gru", "peephole_lstm", "slstm")}


@st.composite
def whole_calls(draw: Any) -> dict[str, Any]:
    recurrence, layers = KINDS[draw(st.sampled_from(sorted(KINDS)))], draw(st.integers(1, 2))
    states = len(recurrence.states)
    call = {"x": torch.ones(T, B, I), "hx": (torch.ones(layers, B, H),) * states, "recurrence": recurrence}
    call |= {"weights": weights(recurrence, num_layers=layers), "num_layers": layers, "training": False}
    call |= {"bias": True, "dropout": 0.5, "bidirectional": False, "batch_first": False, "proj_size": 0, "norm": False}
    if draw(st.booleans()):
        return call | {"x": torch.ones(7, I), "batch_sizes": torch.tensor([3, 2, 1, 1])}
    pad, where = torch.ones(T, B, dtype=torch.bool), torch.zeros(T, B, dtype=torch.bool)
    call |= {"mask": pad, "lengths": torch.tensor([4, 0, 2]), "resets": where, "reset_state": call["hx"]}
    call |= {
        "recurrent_mask": torch.ones(layers, B, 1, H),
        "zone": torch.zeros(states, T, layers, B, H, dtype=torch.bool),
    }
    kept = draw(st.sets(st.sampled_from(["mask", "lengths", "resets", "recurrent_mask", "zone"])))
    left = {"mask", "lengths", "resets", "reset_state", "recurrent_mask", "zone"} - kept
    return {name: value for name, value in call.items() if name not in left}


def rnn(call: dict[str, Any], backend: str) -> Any:
    rest = {name: value for name, value in call.items() if name not in ("x", "hx", "weights", "recurrence")}
    return functional.rnn(call["x"], call["hx"], call["weights"], call["recurrence"], backend=backend, **rest)


@pytest.mark.parametrize("backend", MACHINES)
@drawn
@given(call=spoiled(whole_calls()))
def test_whole_sequences(backend: str, call: dict[str, Any]) -> None:
    if call.get("training") is True:
        call["dropout"] = 0.0  # two calls draw unlike masks
    check(lambda: rnn(call, backend), lambda: rnn(call, "reference"))


@st.composite
def single_steps(draw: Any) -> dict[str, Any]:
    recurrence = KINDS[draw(st.sampled_from(sorted(KINDS)))]
    states = (torch.ones(B, H),) * len(recurrence.states)
    return {"x": torch.ones(B, I), "hx": states, "weights": weights(recurrence), "recurrence": recurrence, "bias": True}


@pytest.mark.parametrize("backend", MACHINES)
@drawn
@given(call=spoiled(single_steps()))
def test_single_steps(backend: str, call: dict[str, Any]) -> None:
    def run(backend: str) -> Any:
        return functional.cell(
            *(call[n] for n in ("x", "hx", "weights", "recurrence")), bias=call["bias"], backend=backend
        )

    check(lambda: run(backend), lambda: run("reference"))


MODULES = {name: getattr(gpu_rnn, name)(I, H) for name in ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")}


@st.composite
def module_calls(draw: Any) -> dict[str, Any]:
    name = draw(st.sampled_from(sorted(MODULES)))
    module, state = MODULES[name], torch.ones(1, B, H)
    if name.endswith("Cell"):
        return {"input": torch.ones(B, I), "hx": (state[0], state[0]) if "LSTM" in name else state[0], "module": module}
    hx = (state, state) if "LSTM" in name else state
    pad = torch.ones(T, B, dtype=torch.bool)
    call = {
        "mask": pad,
        "lengths": torch.tensor([4, 0, 2]),
        "resets": ~pad,
        "reset_state": hx,
        "return_all_states": True,
    }
    for each in draw(st.sets(st.sampled_from(["mask", "lengths", "return_all_states"]))):
        del call[each]
    return call | {"input": torch.ones(T, B, I), "hx": hx, "module": module}


@pytest.mark.parametrize("backend", MACHINES)
@drawn
@given(data=st.data())
def test_modules(backend: str, data: st.DataObject) -> None:
    call = data.draw(module_calls())
    module = call.pop("module")
    call = data.draw(spoiled(st.just(call)))

    def run(backend: str) -> Any:
        module.backend = backend
        with torch.no_grad():
            return module(**call)

    check(lambda: run(backend), lambda: run("reference"))


def operation(call: dict[str, Any], backend: str) -> list[Tensor]:
    options = call["options"].replace("BACKEND", backend)
    with torch.no_grad():
        found = torch.ops.gpu_rnn.rnn(*(call.get(name) for name in ROW), call["text"], options)
    return found[: 1 + len(call["states"])]  # what is saved beyond a row's length is each loop's own


WORDS = ["", "auto", "BACKEND 2 save y", "BACKEND 0101 drop y", "program 1 x", "BACKEND 0 drop all"]


@st.composite
def operations(draw: Any) -> dict[str, Any]:
    """torch's dispatcher has words of its own for what is no tensor: here all are."""
    call = CALLS[draw(st.sampled_from(sorted(set(CALLS) - {"full", "stacked"})))]()
    call["options"] = call["options"].replace("auto", "BACKEND").replace("reference", "BACKEND")
    for name in draw(st.lists(st.sampled_from([*ROW, "options", "text"]), min_size=1, max_size=2, unique=True)):
        value = call.get(name)
        if isinstance(value, list):
            call[name] = draw(st.lists(st.one_of(tensors(), *(st.just(part) for part in value)), max_size=3))
        elif isinstance(value, str):
            call[name] = draw(st.sampled_from([*WORDS, value, value + " "]))
        else:
            optional = [st.none()] if name not in ("x", "w_ih", "w_hh") else []
            near = (
                [st.just(other) for other in (value[None], value[:1], value.double(), value * 400_000)]
                if value is not None
                else []
            )
            call[name] = draw(st.one_of(*near, *optional, tensors()))
    return call


@pytest.mark.parametrize("backend", MACHINES)
@drawn
@given(call=operations())
def test_registered_operations(backend: str, call: dict[str, Any]) -> None:
    check(lambda: operation(call, backend), lambda: operation(call, "reference"))


@pytest.mark.slow
@pytest.mark.parametrize("interpreting", ["0", "1"])
def test_no_call_ends_the_process(interpreting: str, tmp_path: Path) -> None:
    """Thousands of others at each run; pytest says how one repeats."""
    here = Path(__file__)
    command = [
        sys.executable,
        "-X",
        "faulthandler",
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-k",
        "not ends",
    ]
    env = os.environ | {"TRITON_INTERPRET": interpreting, "MALFORMED_EXAMPLES": "1000"}
    done = subprocess.run(
        [*command, str(here)], capture_output=True, text=True, check=False, env=env, cwd=here.parent.parent
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
