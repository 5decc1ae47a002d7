# SPDX-License-Identifier: Apache-2.0
"""Autocast: everything is cast once, before dispatch, so that dtypes and values are those of a call cast by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import gpu_rnn
from gpu_rnn import cells, functional, memo
from gpu_rnn.backends import aten
from gpu_rnn.dispatch import choice
from tests.support import layers as support

STEPS, BATCH, INPUT, HIDDEN = 6, 3, 5, 4
HALVES = [torch.bfloat16, torch.float16]
CALLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "stack": ({"num_layers": 2, "bidirectional": True, "batch_first": True}, {}),
    "lengths": ({}, {"lengths": torch.tensor([6, 2, 4])}),
    "mask": ({}, {"mask": torch.ones(STEPS, BATCH, dtype=torch.bool)}),
    "all states": ({}, {"return_all_states": True}),
    "activation": ({"activation": "softsign"}, {}),
    "step": ({"backend": "step"}, {}),
    "reference": ({"backend": "reference"}, {}),
}


def layer(name: str, **options: Any) -> nn.Module:
    if name == "RNN" and "activation" in options:
        options["activation"] = "elu"
    torch.manual_seed(0)
    found: nn.Module = getattr(gpu_rnn, name)(INPUT, HIDDEN, **options)
    return found


def inputs(options: dict[str, Any]) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(*((BATCH, STEPS) if options.get("batch_first") else (STEPS, BATCH)), INPUT)


def same(actual: Any, expected: Any) -> None:
    """Bitwise."""
    for one, other in zip(support.leaves(actual), support.leaves(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_a_layer_gives_what_a_cast_layer_gives(name: str, call: str, dtype: torch.dtype) -> None:
    """Whatever an option, a control or a backend sends it to; gradients come back in the weights' own dtype."""
    options, given = CALLS[call]
    mine, cast, x = layer(name, **options), layer(name, **options).to(dtype), inputs(options).requires_grad_()
    with torch.autocast("cpu", dtype):
        found = mine(x, **given)
    expected = cast(x.to(dtype), **given)
    assert {out.dtype for out in support.leaves(found)} == {dtype}
    same(found, expected)
    (d_x, *d_weights) = torch.autograd.grad(found[0].float().sin().sum(), [x, *mine.parameters()])
    (e_x, *e_weights) = torch.autograd.grad(expected[0].float().sin().sum(), [x, *cast.parameters()])
    assert d_x.dtype == torch.float32 and all(d.dtype == torch.float32 for d in d_weights)
    same([d_x, *d_weights], [e_x, *[e.float() for e in e_weights]])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("options", [{}, {"activation": "softsign"}], ids=["standard", "activation"])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_a_cell_gives_what_a_cast_cell_gives(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    mine, cast, x = (
        layer(f"{name}Cell", **options),
        layer(f"{name}Cell", **options).to(dtype),
        torch.randn(BATCH, INPUT),
    )
    hx: Any = torch.randn(BATCH, HIDDEN)
    hx = (hx, hx) if name == "LSTM" else hx
    for states in (None, hx):
        with torch.autocast("cpu", dtype):
            found = mine(x, states)
        given = None if states is None else tuple(s.to(dtype) for s in states) if name == "LSTM" else states.to(dtype)
        assert {out.dtype for out in support.leaves(found)} == {dtype}
        same(found, cast(x.to(dtype), given))


def test_a_loop_over_a_cell_casts_its_weights_once() -> None:
    """torch keeps cast weights as long as autocast is on: a loop would hold a copy of them for each step otherwise."""
    cell, kept = layer("LSTMCell"), set()
    x, states = torch.randn(STEPS, BATCH, INPUT), None
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.add((t.shape, t.data_ptr())), t)[1], lambda t: t):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=True):
            for step in x:
                states = cell(step, states)
    assert sum(set(shape) == {4 * HIDDEN, HIDDEN} for shape, _ in kept) == 1


@pytest.mark.parametrize("backend", ["auto", "step", "reference"])
@pytest.mark.parametrize("of_states", [*HALVES, torch.float32], ids=str)
def test_states_and_packed_rows_may_have_another_dtype(backend: str, of_states: torch.dtype) -> None:
    """States come back in autocast's dtype and are handed in again, beside an input in float32, or the other way
    round."""
    mine = layer("LSTM", backend=backend, num_layers=2)
    states = tuple(torch.randn(2, BATCH, HIDDEN).to(of_states) for _ in range(2))
    packed = pack_padded_sequence(inputs({}), torch.tensor([6, 4, 1]))
    with torch.autocast("cpu", torch.bfloat16):
        y, final = mine(packed, states)
        z, again = mine(packed.to(torch.bfloat16), tuple(s.bfloat16() for s in states))
    assert y.data.dtype == torch.bfloat16 and {s.dtype for s in final} == {torch.bfloat16}
    same([y.data, *final], [z.data, *again])


def test_controls_follow() -> None:
    """Reset states of any dtype; masks of dropouts are drawn as without autocast."""
    mine, x = layer("LSTM", recurrent_dropout=0.5, zoneout=0.2), inputs({})
    resets = torch.rand(STEPS, BATCH) < 0.3
    values = tuple(torch.randn(1, BATCH, HIDDEN) for _ in range(2))
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(mine(x, resets=resets, reset_state=tuple(v.to(dtype) for v in values)))
    assert found[0][0].dtype == torch.bfloat16
    same(found[0], found[1])
    with pytest.raises(RuntimeError, match=r"reset_state is torch.bfloat16 and the input torch.float32"):
        mine(x, resets=resets, reset_state=tuple(v.bfloat16() for v in values))


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [(torch.float64, "auto"), (torch.float64, "step"), (torch.float64, "reference"), (torch.complex64, "auto")],
    ids=str,
)
def test_double_and_complex_are_left_alone(dtype: torch.dtype, backend: str) -> None:
    mine, x = layer("GRU", backend=backend, dtype=dtype), inputs({}).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found = mine(x)
    assert found[0].dtype == dtype
    same(found, mine(x))


@pytest.mark.parametrize("backend", ["auto", "step"])
def test_what_autocast_leaves_as_it_is_has_to_fit(backend: str) -> None:
    mine, x = layer("GRU", backend=backend), inputs({})
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(
            RuntimeError, match=r"found input tensor with torch.float64 and parameter tensor with torch.bfloat16"
        ):
            mine(x.double())
        with pytest.raises(
            RuntimeError, match=r"found input tensor with torch.\w+ and hidden tensor with torch.float64"
        ):
            mine(x, torch.zeros(1, BATCH, HIDDEN).double())
        with pytest.raises(
            RuntimeError, match=r"found input tensor with torch.bfloat16 and parameter tensor with torch.float64"
        ):
            layer("GRU", backend=backend, dtype=torch.float64)(x)


def test_autocast_of_another_device_changes_nothing() -> None:
    mine, x = layer("LSTM"), inputs({})
    torch.set_autocast_enabled("cuda", True)
    try:
        same(mine(x), [mine(x)[0], *layer("LSTM")(x)[1]])
        assert mine(x)[0].dtype == torch.float32
    finally:
        torch.set_autocast_enabled("cuda", False)


def test_dispatch_sees_the_cast_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    select = choice.select
    monkeypatch.setattr(choice, "select", lambda p, *rest: (seen.append(p.dtype), select(p, *rest))[1])
    mine, x = layer("LSTM", num_layers=2), inputs({})
    with torch.autocast("cpu", torch.float16):
        mine(x, lengths=torch.tensor([6, 2, 4]))
        weights = [p.detach() for p in layer("LSTM").parameters()]
        y, _ = functional.rnn(x, None, weights, cells.lstm(), backend="step")
        assert gpu_rnn.explain(mine, x).problem.dtype == torch.float16
    assert y.dtype == torch.float16 and set(seen) == {torch.float16}
    assert gpu_rnn.explain(mine, x).problem.dtype == torch.float32


@pytest.mark.interpreter
def test_a_kernel_that_takes_the_cast_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many units do not fit on chip in full float32."""
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")
    x = torch.randn(2, 1, INPUT)
    layers = [gpu_rnn.GRU(INPUT, 96, backend=backend) for backend in ("resident", "reference")]
    layers[1].load_state_dict(layers[0].state_dict())
    with pytest.raises(ValueError, match="takes 64 units at most in full float32"):
        layers[0](x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, expected = (each(x)[0] for each in layers)
    assert found.dtype == torch.bfloat16
    # Of a value below 1, half a unit of bfloat16 and its sums.
    torch.testing.assert_close(found, expected, rtol=0, atol=2**-7)


@pytest.mark.parametrize("call", [{}, {"lengths": torch.tensor([6, 2, 4])}], ids=["aten", "loops"])
def test_autocast_is_off_below(call: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A second cast is one of torch's own rules, which may choose another dtype and flatten weights."""
    on = []

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given: (on.append(torch.is_autocast_enabled("cpu")), function(*given))[1]

    monkeypatch.setitem(aten.FUNCTIONS, "LSTM", watched(aten.FUNCTIONS["LSTM"]))
    monkeypatch.setattr(choice.BACKENDS["step"], "forward", watched(choice.BACKENDS["step"].forward))
    with torch.autocast("cpu", torch.bfloat16):
        layer("LSTM")(inputs({}), **call)
        assert torch.is_autocast_enabled("cpu")
    assert on and not any(on)


def test_a_dtype_without_a_kernel_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN has its 16-bit LSTM on some machines only: "auto" takes another backend, "aten" says why not."""
    run = aten.FUNCTIONS["LSTM"]

    def lacking(x: Tensor, *rest: Any) -> Any:
        if x.dtype == torch.float16:
            raise RuntimeError("could not create a primitive descriptor\nRun workload with ONEDNN_VERBOSE=all")
        return run(x, *rest)

    monkeypatch.setitem(aten.FUNCTIONS, "LSTM", lacking)
    aten._tried.cache_clear(), memo.clear("gpu_rnn.dispatch")
    x, expected = inputs({}), layer("LSTM", backend="step").half()(inputs({}).half())
    with torch.autocast("cpu", torch.float16):
        same(layer("LSTM")(x), expected)
        with pytest.raises(
            ValueError, match=r"no kernel for torch.float16 on this CPU: could not create a primitive descriptor\n"
        ):
            layer("LSTM", backend="aten")(x)
    same(layer("LSTM").half()(x.half()), expected)
    assert layer("LSTM")(x)[0].dtype == torch.float32
    aten._tried.cache_clear(), memo.clear("gpu_rnn.dispatch")


def test_trying_a_dtype_touches_nothing_of_the_callers() -> None:
    """Neither hooks of saved tensors (checkpoints count them) nor random numbers nor a default device."""
    aten._tried.cache_clear()
    met: list[Tensor] = []
    state = torch.get_rng_state()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (met.append(t), t)[1], lambda t: t), torch.device("meta"):
        assert aten.missing("LSTM", torch.bfloat16, True) == ""
    assert not met and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "LSTMCell", "GRUCell"])
def test_compiled(name: str) -> None:
    """The same dtype and, of a layer that is cast by hand, the same values; without autocast as ever. A compiled cell
    is torch's operations where an eager one steps in C: they round otherwise."""
    torch._dynamo.reset()
    mine = layer(name, activation="softsign")
    x = torch.randn(BATCH, INPUT) if "Cell" in name else inputs({})
    compiled = torch.compile(mine, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            same(compiled(x), mine(x))
        if "Cell" in name:
            torch.testing.assert_close(compiled(x), mine(x))
        else:
            same(compiled(x), mine(x))


def test_an_input_without_values() -> None:
    """There is no autocast for "meta"."""
    with torch.autocast("cpu", torch.bfloat16):
        assert layer("GRU", activation="softsign").to("meta")(inputs({}).to("meta"))[0].dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("backend", ["auto", "aten", "resident", "step", "reference"])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_on_a_gpu(name: str, backend: str, dtype: torch.dtype) -> None:
    """The dtype that is asked for, and where cuDNN runs torch.nn's own values."""
    mine, theirs, x = layer(name, backend=backend).cuda(), getattr(nn, name)(INPUT, HIDDEN).cuda(), inputs({}).cuda()
    theirs.load_state_dict(mine.state_dict())
    with torch.autocast("cuda", dtype):
        found, expected = mine(x), theirs(x)
    same(found, layer(name, backend=backend).cuda().to(dtype)(x.to(dtype)))
    torch.testing.assert_close(found[0].float(), expected[0].float(), rtol=0, atol=0.02)
    found[0].float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in mine.parameters())
