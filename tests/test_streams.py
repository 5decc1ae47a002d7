# SPDX-License-Identifier: Apache-2.0
"""Many sequences through one layer, each at its own pace: the same outputs as of each by itself."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gpu_rnn
from gpu_rnn import streams as streams_module

I, H = 3, 5  # noqa: E741
EXACT = {"rtol": 1e-12, "atol": 1e-12}  # of float64: the rounding of another batch size


def slow_cell(x: Any, r: Any, s: Any) -> tuple[Any, Any]:
    h = torch.tanh(x.h + r.h)
    return h, torch.maximum(s.m, h)


LAYERS: dict[str, Callable[..., Any]] = {
    "LSTM": lambda **more: gpu_rnn.LSTM(I, H, **more),
    "GRU stack": lambda **more: gpu_rnn.GRU(I, H, 2, **more),
    "RNN batch_first": lambda **more: gpu_rnn.RNN(I, H, batch_first=True, **more),
    "projected": lambda **more: gpu_rnn.LSTM(I, H, 2, proj_size=2, **more),
    "options": lambda **more: gpu_rnn.LSTM(
        I, H, recurrent_activation="hard_sigmoid", zoneout=0.1, layer_norm=True, peephole=True, **more
    ),
    "own cell": lambda **more: gpu_rnn.Recurrent(
        gpu_rnn.Recurrence(slow_cell, gates=("h",), states={"h": 0.0, "m": -1.0}), I, H, **more
    ),
}


def make(kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    return LAYERS[kind](dtype=torch.float64, **more).eval()


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def whole(layer: Any, samples: list[Tensor]) -> Tensor:
    return layer(torch.stack(samples))[0]


@pytest.mark.parametrize("kind", LAYERS)
def test_streams_that_come_and_go_are_whole_sequences(kind: str) -> None:
    layer, dice = make(kind), random.Random(0)
    streams = gpu_rnn.Streams(layer, capacity=2)
    given: dict[int, list[Tensor]] = {}
    got: dict[int, list[Tensor]] = {}

    def compare(name: int) -> None:
        if given[name]:
            torch.testing.assert_close(torch.stack(got[name]), whole(layer, given[name]), **EXACT)

    for tick in range(60):
        if dice.random() < 0.3:
            streams.join(tick)
            given[tick], got[tick] = [], []
        for name in list(streams):
            event = dice.random()
            if event < 0.1:
                compare(name)
            if event < 0.05:
                streams.leave(name)
            elif event < 0.1:
                streams.reset(name)
                given[name], got[name] = [], []
        samples = {name: draw(I) for name in streams if dice.random() < 0.7}
        for name, y in streams.step(samples).items():
            given[name].append(samples[name])
            got[name].append(y)
    assert streams.capacity >= len(streams) > 2
    for name in streams:
        compare(name)


def test_a_step_is_exactly_the_layers_own() -> None:
    """On the same batch: what Streams add is where the states lie."""
    layer = gpu_rnn.LSTM(I, H, 2).eval()
    streams, states, names = gpu_rnn.Streams(layer), None, list("abc")
    streams.join(*names)
    for _ in range(5):
        x = torch.randn(3, I)
        with torch.no_grad():
            y, states = layer(x[None], states)
        torch.testing.assert_close(streams.step_batch(names, x), y[0], rtol=0, atol=0)
    torch.testing.assert_close(streams.states("b"), tuple(state[:, 1] for state in states), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["LSTM", "RNN batch_first", "own cell"])
@pytest.mark.parametrize("last", [False, True], ids=["every step", "the last"])
def test_chunks_of_several_lengths(kind: str, last: bool) -> None:
    layer = make(kind, return_sequences=not last)
    streams = gpu_rnn.Streams(layer)
    streams.join("a", "b", "c")
    chunks = [{"a": draw(4, I), "b": draw(2, I)}, {"c": draw(3, I), "a": draw(3, I)}, {"b": draw(5, I)}]
    outputs = [streams.step(chunk) for chunk in chunks]
    for name in "abc":
        mine = [chunk[name] for chunk in chunks if name in chunk]
        got = [output[name] for output in outputs if name in output]
        expected = layer(torch.cat(mine))[0]
        torch.testing.assert_close(got[-1] if last else torch.cat(got), expected, **EXACT)


@pytest.mark.parametrize("last", (False, True))
def test_chunks_of_no_steps(last: bool) -> None:
    streams = gpu_rnn.Streams(make("LSTM", return_sequences=not last))
    streams.join("a", "b")
    streams.step({"a": draw(I), "b": draw(I)})
    before = streams.states("a")
    none = torch.zeros((H,) if last else (0, H), dtype=torch.float64)
    for samples in ({"a": draw(0, I)}, {"a": draw(0, I), "b": draw(0, I)}, {"b": draw(2, I), "a": draw(0, I)}):
        torch.testing.assert_close(streams.step(samples)["a"], none)
    torch.testing.assert_close(streams.states("a"), before, rtol=0, atol=0)


@pytest.mark.parametrize("graphs", (False, True))
def test_streams_made_under_inference_mode_go_on_outside(graphs: bool, request: pytest.FixtureRequest) -> None:
    if graphs:
        request.getfixturevalue("repeated")
    layer, x = make("LSTM"), draw(6, I)
    with torch.inference_mode():
        streams = gpu_rnn.Streams(layer, capacity=1)
        streams.join("a")
        outputs = [streams.step({"a": x[0]})["a"]]
    outputs.append(streams.step({"a": x[1]})["a"])
    with torch.inference_mode():
        streams.join("b", "c")  # more than there was room for
        streams.step({"c": x[0]})
    outputs += [streams.step({"b": sample, "a": sample})["a"] for sample in x[2:]]
    assert not any(output.requires_grad for output in outputs)
    torch.testing.assert_close(torch.stack(outputs), layer(x)[0], **EXACT)


def test_any_streams_step_under_autocast() -> None:
    layer, x = gpu_rnn.GRU(I, H).eval(), torch.randn(4, I)
    streams = gpu_rnn.Streams(layer)
    streams.join("a", "b", "c")
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [streams.step({"c": sample})["c"] for sample in x]
        expected = layer(x)[0]
    torch.testing.assert_close(torch.stack(outputs), expected, rtol=2e-2, atol=2e-2)


def test_states_of_another_dtype_are_converted() -> None:
    streams = gpu_rnn.Streams(gpu_rnn.GRU(I, H).eval())
    streams.join("a", "b")
    value = draw(1, H)
    streams.join("c", states=value)
    torch.testing.assert_close(streams.states("c"), value.float(), rtol=0, atol=0)


def test_a_layer_of_another_dtype_asks_for_other_streams() -> None:
    layer = gpu_rnn.GRU(3, 4).eval()
    streams = gpu_rnn.Streams(layer)
    streams.join("ann")
    layer.double()
    for dtype in (torch.float32, torch.float64):
        with pytest.raises(RuntimeError, match="weights are float64 on cpu now, and the states of its streams float32"):
            streams.step({"ann": torch.ones(3, dtype=dtype)})
    others = gpu_rnn.Streams(layer)
    others.join("ann", states=streams.states("ann"))
    assert others.step({"ann": torch.ones(3, dtype=torch.float64)})["ann"].dtype == torch.float64


def test_states_move_from_streams_to_streams() -> None:
    layer, x = make("LSTM"), draw(6, I)
    first, second = gpu_rnn.Streams(layer), gpu_rnn.Streams(layer)
    first.join("x", "y")
    head = first.step({"x": x[:3]})["x"]
    second.join("other")
    second.join("x", states=first.states("x"))
    torch.testing.assert_close(torch.cat([head, second.step({"x": x[3:]})["x"]]), layer(x)[0], **EXACT)


def test_weights_that_change_count_and_no_gradients_are_kept() -> None:
    layer = make("GRU stack")
    streams = gpu_rnn.Streams(layer)
    streams.join("a")
    x = draw(I)
    assert not streams.step({"a": x})["a"].requires_grad
    with torch.no_grad():
        layer.weight_ih_l0.mul_(2)
    streams.reset("a")
    torch.testing.assert_close(streams.step({"a": x})["a"], layer(x[None])[0][0].detach(), **EXACT)


def test_what_is_shown() -> None:
    streams = gpu_rnn.Streams(gpu_rnn.GRU(I, H).eval(), capacity=4)
    streams.join("a", 7)
    assert repr(streams) == "Streams(GRU(3, 5), 2 of 4)" and "a" in streams and "b" not in streams
    assert list(streams) == ["a", 7] and len(streams) == 2 and streams.step({}) == {}


MISTAKES: dict[str, tuple[Callable[[gpu_rnn.Streams], Any], type[Exception], str]] = {
    "twice": (lambda s: s.join("a"), ValueError, "a stream joins once"),
    "two of a name": (lambda s: s.join("n", "n"), ValueError, r"of its own: \['n'\], of \('n', 'n'\)"),
    "nobody steps": (lambda s: s.step({"z": torch.zeros(I)}), ValueError, "there is no stream 'z': it joins first"),
    "nobody leaves": (lambda s: s.leave("a", "z"), ValueError, "there is no stream 'z'"),
    "leaves twice": (lambda s: s.leave("a", "a"), ValueError, "name each stream once"),
    "nobody is reset": (lambda s: s.reset("z"), ValueError, "there is no stream 'z'"),
    "a step twice": (lambda s: s.step_batch(["a", "a"], torch.zeros(2, I)), ValueError, "name each stream once"),
    "kinds": (lambda s: s.step({"a": torch.zeros(I), "b": torch.zeros(2, I)}), ValueError, "of 'b' is"),
    "no tensor": (lambda s: s.step({"b": torch.zeros(I), "a": [0.0] * I}), TypeError, "that of 'a' is of type list"),
    "a tensor alone": (lambda s: s.step(torch.zeros(I)), TypeError, "samples are a dict .* got Tensor"),
    "one name": (lambda s: s.step_batch("a", torch.zeros(1, I)), TypeError, "a list of names, got 'a'"),
    "a list of numbers": (lambda s: s.step_batch(["a"], [0.0] * I), TypeError, "and a tensor, got list"),
    "rows": (lambda s: s.step_batch(["a"], torch.zeros(2, I)), ValueError, r"x should be \(1, input_size\)"),
    "features": (
        lambda s: s.step({"a": torch.zeros(I), "b": torch.zeros(I + 1)}),
        RuntimeError,
        r"a step of a sample has 3 features: that of 'a' is \(3,\), that of 'b' is \(4,\)",
    ),
    "dtype": (lambda s: s.step({"a": torch.zeros(I).double()}), ValueError, "dtype"),
    "states": (lambda s: s.join("n", states=torch.zeros(1, H)), TypeError, "states should be a tuple of 2 Tensors"),
    "sizes": (lambda s: s.join("n", states=(torch.zeros(1, H),) * 2), RuntimeError, r"states should be \(2, 5\)"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_and_moves_nothing(name: str) -> None:
    streams = gpu_rnn.Streams(gpu_rnn.LSTM(I, H, 2).eval())
    streams.join("a", "b")
    streams.step({"a": torch.ones(I), "b": torch.ones(I)})
    before = streams.states("a")
    run, error, words = MISTAKES[name]
    with pytest.raises(error, match=words):
        run(streams)
    torch.testing.assert_close(streams.states("a"), before, rtol=0, atol=0)
    assert list(streams) == ["a", "b"]


def test_layers_that_cannot_stream_are_refused() -> None:
    for layer, error, words in (
        (gpu_rnn.LSTM(I, H, bidirectional=True), ValueError, "one direction"),
        (nn.LSTM(I, H), TypeError, "not LSTM: gpu_rnn.convert"),
        (gpu_rnn.LSTMCell(I, H), TypeError, "such as gpu_rnn.LSTM, not LSTMCell$"),
    ):
        with pytest.raises(error, match=words):
            gpu_rnn.Streams(layer)
    with pytest.raises(ValueError, match="capacity should be positive, got 0"):
        gpu_rnn.Streams(gpu_rnn.LSTM(I, H), 0)
    with pytest.raises(TypeError, match="capacity should be an integer"):
        gpu_rnn.Streams(gpu_rnn.LSTM(I, H), 1.5)  # type: ignore[arg-type]
    streams = gpu_rnn.Streams(gpu_rnn.LSTM(I, H))
    streams.join("a")
    with pytest.raises(ValueError, match=r"call layer.eval\(\)"):
        streams.step({"a": torch.zeros(I)})


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """As on a GPU, but that a graph is repeated by calling; how often each was, in the order of their making."""
    counts: list[int] = []

    def capture(run: Callable[[], object]) -> Callable[[], None]:
        run()  # a graph that is captured computes nothing; what is written here is nobody's
        counts.append(0)
        number = len(counts) - 1

        def replay() -> None:
            counts[number] += 1
            run()

        return replay

    monkeypatch.setattr(streams_module, "_on_gpu", lambda x: True)
    monkeypatch.setattr(streams_module, "_capture", capture)
    yield counts


def test_graphs_of_powers_of_two_take_any_number_of_streams(repeated: list[int]) -> None:
    layer = make("GRU stack")
    streams, given, got = gpu_rnn.Streams(layer, capacity=5), {}, {}
    streams.join(*range(5))
    for count in (5, 1, 2, 4, 3, 5, 1):
        chosen = random.Random(count).sample(range(5), count)
        samples = {name: draw(I) for name in chosen}
        for name, y in streams.step(samples).items():
            given.setdefault(name, []).append(samples[name])
            got.setdefault(name, []).append(y)
    assert repeated == [2, 2, 1, 2]  # of 5, 1, 2 and 4 streams
    for name in given:
        torch.testing.assert_close(torch.stack(got[name]), whole(layer, given[name]), **EXACT)


def test_a_graph_goes_with_the_memory_that_it_was_made_for(repeated: list[int]) -> None:
    layer = make("LSTM")
    streams = gpu_rnn.Streams(layer, capacity=1)
    streams.join("a")
    x = draw(4, I)
    outputs = [streams.step({"a": x[0]})["a"]]
    streams.join("b")  # other states
    outputs += [streams.step({"a": x[1]})["a"], streams.step({"a": x[2]})["a"]]
    layer.weight_ih_l0 = nn.Parameter(layer.weight_ih_l0.detach().clone())  # the same values elsewhere
    outputs.append(streams.step({"a": x[3]})["a"])
    assert repeated == [1, 2, 1]
    torch.testing.assert_close(torch.stack(outputs), layer(x)[0], **EXACT)
    streams.step({"a": draw(2, I)})  # chunks are called
    with pytest.raises(ValueError, match="dtype"):
        streams.step({"a": torch.zeros(I)})
    assert repeated == [1, 2, 1]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", LAYERS)
def test_graphs_on_a_gpu(kind: str) -> None:
    layer = make(kind).to("cuda", torch.float32)
    streams, calls = gpu_rnn.Streams(layer, capacity=2), gpu_rnn.Streams(layer, capacity=2, graphs=False)
    for each in (streams, calls):
        each.join(*range(5))
    for count in (5, 1, 2, 4, 3, 5, 1):
        samples = {name: torch.randn(I, device="cuda") for name in range(count)}
        torch.testing.assert_close(streams.step(samples), calls.step(samples), rtol=1e-4, atol=1e-5)
