# SPDX-License-Identifier: Apache-2.0
"""The short way of plain layers that run as the time loop in C, beside the long one: values, gradients, who goes it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import gpu_rnn
from gpu_rnn.backends.native import direct as native
from gpu_rnn.backends.native import team
from gpu_rnn.call import direct
from tests.support import native as compilers

Layer = Callable[..., Any]


def peephole(size: int, hidden: int, **options: Any) -> gpu_rnn.LSTM:
    return gpu_rnn.LSTM(size, hidden, peephole=True, **options)


LAYERS: dict[str, Layer] = {
    "LSTM": gpu_rnn.LSTM,
    "GRU": gpu_rnn.GRU,
    "RNN": gpu_rnn.RNN,
    "peephole": peephole,
}


@pytest.fixture(autouse=True)
def a_compiler() -> None:
    compilers.any_compiler()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What ran the short way."""
    ran: list[str] = []
    for module, name in ((native, "forward"), (direct.native, "backward")):
        function, word = getattr(module, name), name.removeprefix("_")
        monkeypatch.setattr(module, name, lambda *a, f=function, n=word: (ran.append(n), f(*a))[1])
    return ran


@contextmanager
def the_long_way() -> Iterator[None]:
    run = direct.run
    direct.run = lambda *arguments: None
    try:
        yield
    finally:
        direct.run = run


def made(name: str, **options: Any) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    options = {"backend": "native", "dtype": torch.float64, **options}
    layer = LAYERS[name](3, 20, **options)
    return layer, torch.randn(5, 4, 3, dtype=options["dtype"], requires_grad=True)


def flat(output: Any) -> list[Tensor]:
    y, hx = output
    return [y, *(hx if isinstance(hx, tuple) else (hx,))]


def differentiated(layer: Any, x: Tensor, *hx: Any) -> list[Tensor]:
    outputs = flat(layer(x, *hx))
    wanted = [t for t in (x, *layer.parameters()) if t.requires_grad]
    return [*outputs, *torch.autograd.grad([out.sin().sum() for out in outputs], wanted)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"batch_first": True}, {"num_layers": 3}], ids=lambda o: "-".join(o) or "plain"
)
@pytest.mark.parametrize("name", LAYERS)
def test_both_ways_are_the_same(name: str, options: dict[str, Any], dtype: torch.dtype, calls: list[str]) -> None:
    layer, x = made(name, dtype=dtype, **options)
    short = differentiated(layer, x)
    with torch.no_grad():
        inference = flat(layer(x))
    assert calls == ["forward"] * layer.num_layers + ["backward"] * layer.num_layers + ["forward"] * layer.num_layers
    with the_long_way():
        long = differentiated(layer, x)
    for each, other in zip(short, long, strict=True):
        torch.testing.assert_close(each, other, rtol=20 * torch.finfo(dtype).eps, atol=20 * torch.finfo(dtype).eps)
    for each, other in zip(short, inference, strict=False):
        assert torch.equal(each, other)


def before(size: int, hidden: int, **options: Any) -> gpu_rnn.GRU:
    return gpu_rnn.GRU(size, hidden, reset_after=False, **options)


MASK = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1], [1, 1, 1, 0], [1, 0, 1, 1], [1, 1, 1, 0]], dtype=torch.bool)
RESETS = MASK.roll(1, 1).logical_not()
LENGTHS = [5, 0, 3, 4]
BOTH = {"bidirectional": True}
EVERY = {"return_all_states": True}
# Of a layer its options, and what a call is given.
STEERED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"lengths": LENGTHS}),
    (BOTH, {}),
    (BOTH | {"num_layers": 2, "batch_first": True}, {"lengths": LENGTHS}),
    (BOTH | {"num_layers": 2}, {"mask": MASK, "resets": RESETS} | EVERY),
    (BOTH | {"layer_norm": True}, {"lengths": LENGTHS} | EVERY),
    (BOTH | {"rms_norm": True}, {"mask": MASK}),
    ({"recurrent_dropout": 0.4}, {"mask": MASK, "lengths": LENGTHS}),
    (BOTH | {"recurrent_dropout": 0.4, "recurrent_dropout_per_gate": True}, {"resets": RESETS, "lengths": LENGTHS}),
    ({"layer_norm": True, "zoneout": 0.3, "recurrent_dropout": 0.4, "recurrent_dropout_per_gate": True}, {}),
    (BOTH | {"zoneout": 0.3, "bias": False}, EVERY),
    ({"num_layers": 3, "zoneout": 0.3}, {"mask": MASK}),
]


@pytest.mark.parametrize("options, given", STEERED, ids=lambda each: "-".join(each) or "plain")
@pytest.mark.parametrize("make", [gpu_rnn.LSTM, before], ids=["LSTM", "two products"])
def test_both_ways_are_the_same_with_options(
    make: Layer, options: dict[str, Any], given: dict[str, Any], calls: list[str]
) -> None:
    """What stands in the padding is NaN, and reaches nothing."""
    layer = make(3, 20, backend="native", dtype=torch.float64, **options)
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    counts = given.get("mask", torch.ones(5, 4, dtype=torch.bool)).clone()
    for row, length in enumerate(given.get("lengths", ())):
        counts[length:, row] = False
    x = torch.where(counts.unsqueeze(2), x, torch.nan)
    x = (x.transpose(0, 1) if layer.batch_first else x).requires_grad_()

    def found() -> list[Tensor]:
        torch.manual_seed(1)
        outputs = [t for each in layer(x, **given) for t in ((each,) if isinstance(each, Tensor) else each)]
        grads = torch.autograd.grad([out.sin().sum() for out in outputs], [x, *layer.parameters()])
        torch.manual_seed(1)
        with torch.no_grad():
            inference = layer(x, **given)[0]
        assert torch.equal(inference, outputs[0]) and not any(out.isnan().any() for out in outputs)
        return [*outputs, *grads]

    short = found()
    assert calls == ["forward"] * layer.num_layers + ["backward"] * layer.num_layers + ["forward"] * layer.num_layers
    with the_long_way():
        for each, other in zip(short, found(), strict=True):
            torch.testing.assert_close(each, other, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("per_step", [False, True])
def test_values_to_reset_to(per_step: bool, calls: list[str]) -> None:
    layer, x = made("LSTM", **BOTH, proj_size=7)
    shape = (5, 2, 4) if per_step else (2, 4)
    values = [torch.randn(*shape, size, dtype=torch.float64, requires_grad=True) for size in (7, 20)]

    def found() -> list[Tensor]:
        outputs = flat(layer(x, resets=RESETS, mask=MASK, reset_state=values))
        grads = torch.autograd.grad([out.sin().sum() for out in outputs], [x, *values, *layer.parameters()])
        return [*outputs, *grads]

    short = found()
    assert calls == ["forward", "backward"]
    with the_long_way():
        for each, other in zip(short, found(), strict=True):
            torch.testing.assert_close(each, other, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("grad", [True, False])
def test_rows_packed_of_several_lengths(grad: bool, calls: list[str]) -> None:
    layer, x = made("GRU", **BOTH)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, [3, 5, 1, 4], enforce_sorted=False)
    with torch.set_grad_enabled(grad):
        short = layer(packed)
        assert calls == ["forward"]
        with the_long_way():
            long = layer(packed)
    torch.testing.assert_close(short[0].data, long[0].data, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(short[1], long[1], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_rounded_once(dtype: torch.dtype, calls: list[str]) -> None:
    """What comes in is, and what goes out: in between numbers have 32 bits."""
    layer, x = made("GRU", dtype=dtype, num_layers=2)
    exact = gpu_rnn.GRU(3, 20, 2, dtype=torch.float32, backend="native")
    exact.load_state_dict({name: weight.float() for name, weight in layer.state_dict().items()})
    found, wide = differentiated(layer, x), differentiated(exact, x.detach().float().requires_grad_())
    assert calls == ["forward", "forward", "backward", "backward"] * 2
    assert all(torch.equal(each, other.to(dtype)) for each, other in zip(found[:2], wide, strict=False))
    for each, other in zip(found[2:], wide[2:], strict=True):
        torch.testing.assert_close(each.float(), other, rtol=4 * torch.finfo(dtype).eps, atol=1e-2)


@pytest.mark.parametrize("dtype, short", [(torch.float32, True), (torch.float16, True), (torch.bfloat16, False)])
def test_many_products_in_bfloat16_are_a_librarys(dtype: torch.dtype, short: bool, calls: list[str]) -> None:
    layer, x = gpu_rnn.GRU(64, 64, backend="native", dtype=dtype), torch.randn(100, 16, 64, dtype=dtype)
    with torch.no_grad():
        layer(x)
    assert bool(calls) == short


@pytest.mark.parametrize("make", [gpu_rnn.LSTM, before], ids=["LSTM", "two products"])
def test_second_derivatives_with_options(make: Layer) -> None:
    torch.manual_seed(0)
    layer = make(3, 4, backend="native", dtype=torch.float64, **BOTH)
    x = torch.randn(5, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layer(x, mask=MASK, resets=RESETS, **EVERY)[2][0], [x])
    assert torch.autograd.gradgradcheck(lambda x: layer(x, lengths=LENGTHS)[0], [x])


def test_states_that_are_given_and_what_is_not_wanted(calls: list[str]) -> None:
    layer, x = made("LSTM")
    hx = tuple(torch.randn(1, 4, 20, dtype=torch.float64, requires_grad=True) for _ in range(2))
    layer.weight_hh_l0.requires_grad_(False)
    layer.bias_ih_l0.requires_grad_(False)
    x = x.detach()

    def gradients() -> tuple[Tensor, ...]:
        y, (h, _) = layer(x, hx)
        return torch.autograd.grad(y[-1].sum() + h.sum(), [*hx, layer.weight_ih_l0, layer.bias_hh_l0])

    short = gradients()
    assert calls == ["forward", "backward"]
    with the_long_way():
        for each, other in zip(short, gradients(), strict=True):
            torch.testing.assert_close(each, other, rtol=1e-14, atol=1e-14)


def test_gradients_of_the_final_state_alone() -> None:
    layer, x = made("GRU")
    short = torch.autograd.grad(layer(x)[1].sum(), x)[0]
    with the_long_way():
        torch.testing.assert_close(short, torch.autograd.grad(layer(x)[1].sum(), x)[0], rtol=1e-14, atol=1e-14)


def test_what_is_saved_serves_twice_and_notices_changes() -> None:
    layer, x = made("LSTM")
    y = layer(x)[0].sum()
    first = torch.autograd.grad(y, x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(y, x, retain_graph=True)[0])
    with torch.no_grad():
        layer.weight_hh_l0.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y, x)


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_second_derivatives(name: str) -> None:
    layer, x = made(name)
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[0], [x])


def test_gradients_of_a_batch_of_directions() -> None:
    layer, x = made("GRU")
    y = layer(x)[0]
    directions = torch.randn(3, *y.shape, dtype=torch.float64)
    together = torch.autograd.grad(y, x, directions, is_grads_batched=True, retain_graph=True)[0]
    for direction, gradient in zip(directions, together, strict=True):
        torch.testing.assert_close(gradient, torch.autograd.grad(y, x, direction, retain_graph=True)[0])


@pytest.mark.parametrize("change", ["in place", "data", "swapped"])
def test_changed_weights_are_seen(change: str) -> None:
    layer, x = made("LSTM")
    before = layer(x)[0]
    with torch.no_grad():
        weight = layer.weight_hh_l0
        if change == "in place":
            weight.mul_(2)
        elif change == "data":
            weight.data.mul_(2)
        else:
            weight.data = weight * 2
    after = layer(x)[0]
    with the_long_way():
        assert not torch.allclose(after, before)
        torch.testing.assert_close(after, layer(x)[0], rtol=1e-14, atol=1e-14)


def test_two_threads_at_once_and_another_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = made("LSTM", dtype=torch.float32)
    alone, answers = differentiated(layer, x), []
    several = [threading.Thread(target=lambda: answers.append(differentiated(layer, x))) for _ in range(4)]
    for thread in several:
        thread.start()
    for thread in several:
        thread.join()
    monkeypatch.setattr(native.launch, "OF_A_THREAD", 1.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    answers.append(differentiated(layer, x))
    assert len(answers) == 5
    for answer in answers:
        assert all(torch.equal(*pair) for pair in zip(answer, alone, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_a_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's threads, which the loop has, are the parent's alone."""
    layer, x = made("LSTM", dtype=torch.float32)
    monkeypatch.setattr(native.launch, "OF_A_THREAD", 1.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with torch.no_grad():
        before = layer(x)[0]
        child = os.fork()
        if not child:
            signal.alarm(60)
            os._exit(0 if torch.equal(layer(x)[0], before) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("address", [0, None], ids=["threads of its own", "torch's"])
def test_either_threads_compute_the_same(address: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = made("GRU", dtype=torch.float32)
    alone = differentiated(layer, x)
    monkeypatch.setattr(native.launch, "OF_A_THREAD", 1.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    if address is not None:
        monkeypatch.setattr(team, "address", lambda: address)
    elif not team.address():
        pytest.skip("this build of torch has no libgomp of its own")
    assert all(torch.equal(*pair) for pair in zip(differentiated(layer, x), alone, strict=True))


def test_who_looks_on_or_transforms_goes_the_long_way(calls: list[str]) -> None:
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return function(*args, **(kwargs or {}))

    layer, x = made("LSTM")
    with Mode():
        layer(x)
    torch.func.grad(lambda x: layer(x)[0].sum())(x)
    with torch.profiler.profile(acc_events=True) as profile:  # torch 2.11 warns without
        layer(x)
    assert not calls and "gpu_rnn::native_forward" in {event.key for event in profile.key_averages()}
    layer(x)
    assert calls == ["forward"]


def test_what_does_not_fit_goes_the_long_way(calls: list[str]) -> None:
    layer, x = made("LSTM")
    layer.weight_hh_l0.data = layer.weight_hh_l0.data[:, :10]
    with pytest.raises((RuntimeError, ValueError)):
        layer(x)
    assert not calls
