# SPDX-License-Identifier: Apache-2.0
"""Modes and tensors that look on while a layer runs see each pass as one operation, and change no number."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import gpu_rnn
from tests.support.recorded import (
    BACKWARD,
    FORWARD,
    B,
    H,
    I,
    Net,
    T,
    close,
    draw,
    every_layer,
    loss_of,
    make,
)

# What torch itself does at the first use of forward mode; torch.jit is old, and says so in some versions.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


class Looking(TorchDispatchMode):
    """Sees every operation and changes nothing, as a profiler or a counter does."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def derivatives(net: Net, forward: Any, backward: Any) -> list[Tensor]:
    """A value, its gradients, and gradients of those, with something on in each pass."""
    x = draw(1).double().requires_grad_()
    wanted = [x, *net.parameters()]
    with forward:
        y = net(x)
    with backward:
        first = torch.autograd.grad(y.sin().sum(), wanted, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), wanted)
    return [y, *first, *second]


@every_layer
@pytest.mark.parametrize("when", ["forward", "backward", "both"])
def test_a_mode_that_only_looks_on(when: str, name: str) -> None:
    net, mode, nothing = make(name).double(), Looking(), contextlib.nullcontext()
    forward, backward = mode if when != "backward" else nothing, mode if when != "forward" else nothing
    close(derivatives(net, forward, backward), derivatives(net, nothing, nothing))
    x, v = draw(1).double(), draw(2).double()
    with mode:
        tangent = jvp(net, (x,), (v,))[1]
        per_sample = vmap(grad(loss_of(net)))(torch.stack([x, v]))
    close(tangent, jvp(net, (x,), (v,))[1])
    close(per_sample, torch.stack([grad(loss_of(net))(x), grad(loss_of(net))(v)]))
    assert tangent.abs().max() > 1e-3


def test_a_mode_sees_each_pass_as_one_operation() -> None:
    net, mode = make("peephole"), Looking()
    with mode:
        net(draw(1)).sum().backward()
    assert [mode.seen.count(op) for op in (FORWARD, BACKWARD)] == [2, 2]


@pytest.mark.filterwarnings("ignore:.*unwrapping:UserWarning")
@every_layer
def test_selective_checkpoints(name: str) -> None:
    """What is recomputed, and what is kept because a policy says so."""
    net, x = make(name).double(), draw(1).double().requires_grad_()
    expected = torch.autograd.grad(loss_of(net)(x), [x, *net.parameters()])

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op is FORWARD else CheckpointPolicy.PREFER_RECOMPUTE

    for contexts in (None, lambda: create_selective_checkpoint_contexts(policy)):
        options = {} if contexts is None else {"context_fn": contexts}
        found = checkpoint(loss_of(net), x, use_reentrant=False, **options)
        close(torch.autograd.grad(found, [x, *net.parameters()]), expected)


class Wrapped(Tensor):
    """A class of its own that unwraps, computes and wraps, without a mode."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        # type: ignore[attr-defined]
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, strides=inner.stride())

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(lambda t: t.inner if isinstance(t, Wrapped) else t, (args, kwargs or {}))
        return tree_map(lambda t: Wrapped(t) if isinstance(t, Tensor) else t, func(*args, **kwargs))


@pytest.mark.parametrize("name", ["peephole", "step", "softsign"])
def test_a_tensor_that_is_a_class_of_its_own(name: str) -> None:
    """NumPy, and a kernel's launch, would find no memory behind it."""
    net, x = make(name), draw(1).requires_grad_()
    net.controls = tuple(set(net.controls) - {"mask", "resets"})
    expected = torch.autograd.grad(loss_of(net)(x), x)
    wrapped = Wrapped(draw(1)).requires_grad_()
    found = net(wrapped)
    assert isinstance(found, Wrapped)
    close(found.inner, net(x))
    (d,) = torch.autograd.grad(found.sin().sum(), wrapped)
    close(d.inner, expected[0])


@pytest.fixture
def a_trace() -> Iterator[None]:
    with FakeTensorMode():
        yield


def test_tune_measures_nothing_that_is_recorded(a_trace: None) -> None:
    with pytest.raises(RuntimeError, match="tune measures calls"):
        gpu_rnn.tune(gpu_rnn.GRU(I, H), torch.randn(T, B, I))


def test_a_short_call_asks_once_whether_it_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, recorded = [], gpu_rnn.call.onlookers.recorded
    monkeypatch.setattr(gpu_rnn.call.onlookers, "recorded", lambda *args: asked.append(args) or recorded(*args))
    gpu_rnn.LSTM(I, H)(draw(1))
    assert len(asked) == 1
