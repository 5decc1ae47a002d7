# SPDX-License-Identifier: Apache-2.0
"""Normalisations there and back, and what a CPU keeps of it for the backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor

import gpu_rnn
from gpu_rnn.backends import normalisation
from gpu_rnn.backends.native import direct
from gpu_rnn.backends.normalisation import Normalised
from gpu_rnn.backends.step.product import OneMask
from gpu_rnn.call import passes
from tests.support import loops as support

T, B, I, H = 7, 3, 4, 6  # noqa: E741
CLOSE = {"rtol": 1e-12, "atol": 1e-13}
NORMS = ("layer_norm", "rms_norm")
LAYERS: dict[str, dict[str, Any]] = {
    "LSTM": {},
    "LSTM bidirectional": {"bidirectional": True},
    "LSTM projected": {"proj_size": 3},
    "GRU": {},
    "GRU two stages": {"reset_after": False, "bidirectional": True},
}


def layer(name: str, norm: str = "layer_norm", **options: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    kind = getattr(gpu_rnn, name.split()[0])
    return kind(I, H, **{norm: True}, dtype=torch.float64, **LAYERS[name], **options)


def keep_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """On either way to a loop."""
    for way in (passes, direct):
        monkeypatch.setattr(way, "room_for", lambda x, gates: None)


def gradients(module: torch.nn.Module, x: Tensor, **controls: Any) -> list[Tensor]:
    y, *_ = module(x, **controls)
    return list(torch.autograd.grad((y * y).sum(), [x, *module.parameters()]))


@pytest.mark.parametrize("given", [False, True], ids=["fresh", "out"])
@pytest.mark.parametrize("of_products", [False, True], ids=["any", "of products"])
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_there_and_back(rms: bool, of_products: bool, given: bool) -> None:
    weights, x = support.draw(2, H, I, seed=1), support.draw(5, I, seed=2)
    normaliser = normalisation.Normaliser.of(rms)
    normalise = normaliser.normalise
    if of_products:
        weights, normalise = normaliser.of_products(weights)
    products = torch.einsum("ghi,bi->bgh", weights, x).requires_grad_()
    expected = (F.rms_norm if rms else F.layer_norm)(products, (H,), eps=normalisation.EPSILON)
    torch.testing.assert_close(normalisation.normalised(products, rms), expected, **CLOSE)
    out = Normalised(torch.empty_like(products), products.new_empty(5, 2, 1)) if given else None
    found = normalise(products.detach(), out)
    assert out is None or all(a is b or a.data_ptr() == b.data_ptr() for a, b in zip(out, found, strict=True))
    torch.testing.assert_close(found.values, expected.detach(), **CLOSE)
    d = support.draw(5, 2, H, seed=3)
    wanted = torch.autograd.grad(expected, products, d)[0]
    torch.testing.assert_close(normaliser.back(found.rstd)(d, found), wanted, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_of_sixteen_bits_are_taken_in_float32(dtype: torch.dtype) -> None:
    """In float16 the squares of these are infinite. The rest is one rounding."""
    values = (300 * support.draw(5, 64, seed=1)).to(dtype)
    expected = F.rms_norm(values.double(), (64,), eps=normalisation.EPSILON)
    for found in (normalisation.RMS.normalise(values).values, normalisation.normalised(values, rms=True)):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize(
    "controls", [{}, {"lengths": torch.tensor([7, 2, 5])}, {"mask": True}], ids=["plain", "lengths", "mask"]
)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", LAYERS)
def test_kept_products_give_the_gradients_of_those_taken_once_more(
    name: str, norm: str, controls: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x = layer(name, norm), support.draw(T, B, I, seed=1).requires_grad_()
    if "mask" in controls:
        controls = {"mask": support.draw(T, B, seed=2) > 0}
    taken = []
    over_time = OneMask.over_time

    def counted(self: OneMask, entering: Tensor) -> Tensor:
        taken.append(len(entering))
        return over_time(self, entering)

    monkeypatch.setattr(OneMask, "over_time", counted)
    kept = gradients(module, x, **controls)
    assert not taken
    keep_nothing(monkeypatch)
    again = gradients(module, x, **controls)
    assert taken
    for found, wanted in zip(kept, again, strict=True):
        torch.testing.assert_close(found, wanted, **CLOSE)


@pytest.mark.parametrize("over_weights", [False, True], ids=["batch", "members"])
def test_kept_products_under_vmap(over_weights: bool) -> None:
    module, xs = layer("LSTM bidirectional"), support.draw(2, T, B, I, seed=1)
    weights = {name: torch.stack([value.detach(), 1.5 * value.detach()]) for name, value in module.named_parameters()}
    if not over_weights:
        weights = {name: value[0] for name, value in weights.items()}

    def loss(own: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, own, (x,))[0].square().sum()

    of = torch.func.grad(loss, (0, 1))
    d_weights, d_x = torch.func.vmap(of, (0 if over_weights else None, 0))(weights, xs)
    for member in range(2):
        own = {name: value[member] if over_weights else value for name, value in weights.items()}
        wanted, wanted_x = of(own, xs[member])
        torch.testing.assert_close(d_x[member], wanted_x, **CLOSE)
        for name, value in wanted.items():
            torch.testing.assert_close(d_weights[name][member], value, **CLOSE)


@pytest.mark.parametrize("norm", NORMS)
def test_second_derivative_through_kept_products(norm: str) -> None:
    module, x = layer("GRU two stages", norm), support.draw(3, 2, I, seed=1).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: module(x)[0], (x,))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", LAYERS)
def test_checkpoints(name: str, compiled: bool) -> None:
    """What is saved is unpacked once in a backward pass: a checkpoint refuses to do so again."""
    module, x = layer(name), support.draw(T, B, I, seed=1).requires_grad_()
    wanted = torch.autograd.grad(module(x)[0].square().sum(), x)[0]
    torch._dynamo.reset()
    call = torch.compile(module, backend="eager") if compiled else module
    y = torch.utils.checkpoint.checkpoint(lambda x: call(x)[0], x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], wanted, **CLOSE)


def saved(module: torch.nn.Module, x: Tensor) -> int:
    """Numbers that a call keeps for its backward pass."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    return sum(kept.values())


def test_what_is_kept_is_the_products_and_their_deviations() -> None:
    """Nothing in 16 bits, where the backward pass takes the products in float32, and nothing without gradients."""
    module, x = layer("LSTM"), support.draw(T, B, I, seed=1)
    products = 2 * T * B * 4 * H
    whole = saved(module, x)
    with pytest.MonkeyPatch.context() as patch:
        keep_nothing(patch)
        assert whole - saved(module, x) == products + products // H
    assert saved(module.bfloat16(), x.bfloat16()) == whole - products - products // H
    with torch.no_grad():
        assert saved(module, x.bfloat16()) == 0
