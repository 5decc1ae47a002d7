# SPDX-License-Identifier: Apache-2.0
"""Derivatives of every order, forward, backward, mapped and nested, of every recurrence on every loop a CPU runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import gpu_rnn
from gpu_rnn.backends import linear
from gpu_rnn.backends.tensors import Weights
from tests.support import layers, native
from tests.support import loops as support

SIZES = {"T": 3, "B": 2, "I": 2, "H": 2}
CLOSE = {"rtol": 1e-8, "atol": 1e-9}

# What torch itself does at the first use of forward mode.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is:DeprecationWarning")

every_loop = pytest.mark.parametrize("backend", ["reference", "step", native.SLOW_BACKEND])
every_recurrence = pytest.mark.parametrize("name", support.RECURRENCES)


def pure(name: str, inputs: support.Inputs, backend: str) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """The layer as a function of all that has a gradient, and a point to evaluate it at."""
    recurrence, present = support.RECURRENCES[name], [w is not None for w in inputs.weights]

    def function(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        own = iter(rest)
        weights = Weights(*(next(own) if there else None for there in present))
        given = inputs._replace(x=x, weights=weights, states=list(own))
        return tuple(support.run(recurrence, given, backend))

    return function, list(inputs.named().values())


@every_loop
@every_recurrence
def test_first_and_second_order(name: str, backend: str) -> None:
    function, point = pure(name, support.make(support.RECURRENCES[name], **SIZES), backend)
    assert torch.autograd.gradcheck(function, point)
    assert torch.autograd.gradgradcheck(function, point, fast_mode=True)


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("gru", {"reverse": "01", "lengths": (3, 0)}),
    ("gru_reset_before", {"reverse": "01", "lengths": (1, 3)}),
    ("lstm", {"proj": 1, "reverse": "01", "lengths": (3, 2)}),
    ("peephole_lstm", {"bias": False, "reverse": "1"}),
]


@every_loop
@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_both_orders_with_options(name: str, options: dict[str, Any], backend: str) -> None:
    function, point = pure(name, support.make(support.RECURRENCES[name], **SIZES, **options), backend)
    assert torch.autograd.gradcheck(function, point)
    assert torch.autograd.gradgradcheck(function, point, fast_mode=True)


def directions(point: list[Tensor]) -> list[Tensor]:
    return [support.draw(*p.shape, seed=60 + k) for k, p in enumerate(point)]


def finite_differences(function: Callable[..., tuple[Tensor, ...]], point: list[Tensor]) -> list[Tensor]:
    """The derivative along `directions`, by central differences."""
    step = 1e-5
    with torch.no_grad():
        ahead = function(*(p + step * v for p, v in zip(point, directions(point), strict=True)))
        behind = function(*(p - step * v for p, v in zip(point, directions(point), strict=True)))
    return [(a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True)]


@every_loop
@every_recurrence
def test_jvp_is_finite_differences(name: str, backend: str) -> None:
    """A custom op under jvp would give zeros without a word."""
    function, point = pure(name, support.make(support.RECURRENCES[name], **SIZES, reverse="01"), backend)
    point = [p.detach() for p in point]
    _, tangents = jvp(function, tuple(point), tuple(directions(point)))
    for tangent, truth in zip(tangents, finite_differences(function, point), strict=True):
        torch.testing.assert_close(tangent, truth, rtol=1e-6, atol=1e-7)
        assert tangent.ne(0).all() and truth.abs().max() > 1e-3


@every_loop
@every_recurrence
def test_dual_numbers(name: str, backend: str) -> None:
    function, point = pure(name, support.make(support.RECURRENCES[name], **SIZES), backend)
    with fwad.dual_level():
        duals = [fwad.make_dual(p.detach(), v) for p, v in zip(point, directions(point), strict=True)]
        found = [fwad.unpack_dual(out) for out in function(*duals)]
    for (primal, tangent), value, truth in zip(
        found, function(*point), finite_differences(function, point), strict=True
    ):
        torch.testing.assert_close(primal, value.detach(), **CLOSE)
        torch.testing.assert_close(tangent, truth, rtol=1e-6, atol=1e-7)


LAYERS: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {}),
    ("LSTM", {"proj_size": 2}),
    ("GRU", {"num_layers": 2, "bidirectional": True}),
    ("GRU", {"reset_after": False, "heads": 2, "layer_norm": True}),
]


@every_loop
@pytest.mark.parametrize(
    ("kind", "options"), LAYERS, ids=lambda part: part if isinstance(part, str) else "-".join(part)
)
def test_a_tangent_of_the_gradient_that_comes_in(kind: str, options: dict[str, Any], backend: str) -> None:
    """The gradients are linear in it."""
    layer = getattr(gpu_rnn, kind)(3, 4, dtype=torch.float64, backend=backend, **options)
    x = support.draw(5, 2, 3, seed=1).requires_grad_()
    y, final = layer(x)
    outputs = [y, *layers.leaves(final)]
    wanted, incoming = [x, *layer.parameters()], directions(outputs)
    along = [support.draw(*out.shape, seed=90 + k) for k, out in enumerate(outputs)]
    expected = [torch.autograd.grad(outputs, wanted, d, retain_graph=True) for d in (incoming, along)]
    with fwad.dual_level():
        duals = [fwad.make_dual(*pair) for pair in zip(incoming, along, strict=True)]
        found = [fwad.unpack_dual(d) for d in torch.autograd.grad(outputs, wanted, duals)]
    torch.testing.assert_close([[d.primal for d in found], [d.tangent for d in found]], [*map(list, expected)], **CLOSE)


@every_loop
@every_recurrence
def test_jvp_of_only_the_input(name: str, backend: str) -> None:
    function, point = pure(name, support.make(support.RECURRENCES[name], **SIZES), backend)
    x, *rest = (p.detach() for p in point)
    v = directions([x])[0]
    _, tangents = jvp(lambda x: function(x, *rest), (x,), (v,))
    _, expected = jvp(lambda *p: function(*p), (x, *rest), (v, *(torch.zeros_like(p) for p in rest)))
    torch.testing.assert_close(tangents, expected, **CLOSE)
    assert all(tangent.ne(0).any() for tangent in tangents)


# g is func.grad, j is func.jvp, the outermost first.
WAYS = ("g", "j", "gg", "gj", "jg", "jj", "ggg", "gjg", "jgj", "jjg", "gjj", "jjj")


def along_one(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda t: jvp(function, (t,), (torch.ones_like(t),))[1]


@every_recurrence
def test_third_order_and_nested_transforms(name: str) -> None:
    """Along a line: three backward passes, every mixture of transforms, and the reference in plain autograd."""
    results = []
    for backend in ("reference", "step"):
        function, point = pure(name, support.make(support.RECURRENCES[name], **SIZES), backend)
        point = [p.detach() for p in point]
        along = directions(point)

        def line(t: Tensor, function: Any = function, point: Any = point, along: Any = along) -> Tensor:
            outputs = function(*(p + t * v for p, v in zip(point, along, strict=True)))
            return sum((out.sin() * 0.1).sum() for out in outputs)

        zero = torch.zeros((), dtype=torch.float64)
        t = zero.clone().requires_grad_()
        first = torch.autograd.grad(line(t), t, create_graph=True)[0]
        second = torch.autograd.grad(first, t, create_graph=True)[0]
        results.append(torch.stack([first, second, torch.autograd.grad(second, t)[0]]).detach())
        for way in WAYS:
            nested = line
            for letter in reversed(way):
                nested = grad(nested) if letter == "g" else along_one(nested)
            expected = results[-1][len(way) - 1]
            torch.testing.assert_close(nested(zero), expected, rtol=1e-6, atol=1e-8, msg=f"{backend}, {way}")
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-8)
    assert results[0].abs().min() > 1e-8


LAYERS: dict[str, Callable[[str], gpu_rnn.Recurrent]] = {
    "gru": lambda backend: gpu_rnn.GRU(2, 3, dtype=torch.float64, backend=backend),
    "lstm": lambda backend: gpu_rnn.LSTM(2, 3, 2, bidirectional=True, dtype=torch.float64, backend=backend),
    "projected": lambda backend: gpu_rnn.LSTM(2, 3, proj_size=2, dtype=torch.float64, backend=backend),
    "minimal": lambda backend: gpu_rnn.Recurrent(
        support.minimal_gated_unit(), 2, 3, batch_first=True, bias=False, dtype=torch.float64, backend=backend
    ),
    "reset before": lambda backend: gpu_rnn.GRU(2, 3, reset_after=False, dtype=torch.float64, backend=backend),
}
every_layer = pytest.mark.parametrize("kind", LAYERS)
every_way = pytest.mark.parametrize("backend", ["auto", "reference", "step", native.SLOW_BACKEND])


def prepare(kind: str, backend: str) -> tuple[gpu_rnn.Recurrent, dict[str, Tensor], Tensor, Callable[..., Tensor]]:
    """A layer, its parameters, an input, and a scalar loss of both."""
    torch.manual_seed(0)
    layer = LAYERS[kind](backend)
    x = support.draw(4, 3, 2, seed=70)

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        y, state = functional_call(layer, params, (x,))
        finals = state if isinstance(state, tuple) else (state,)
        return (y.sin() * y).sum() + sum((final**2).sum() for final in finals)

    return layer, {name: p.detach() for name, p in layer.named_parameters()}, x, loss


def plain_gradients(loss: Callable[..., Tensor], params: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """By autograd, on leaves: what every transform is compared with."""
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()} | {"x": x.clone().requires_grad_()}
    value = loss({name: leaves[name] for name in params}, leaves["x"])
    return dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))


@every_way
@every_layer
def test_func_grad_and_jacobians(kind: str, backend: str) -> None:
    layer, params, x, loss = prepare(kind, backend)
    expected = plain_gradients(loss, params, x)
    d_params, d_x = grad(loss, argnums=(0, 1))(params, x)
    torch.testing.assert_close(d_params | {"x": d_x}, expected, **CLOSE)

    def output(x: Tensor) -> Tensor:
        return functional_call(layer, params, (x,))[0]

    by_rows, by_columns = jacrev(output)(x), jacfwd(output)(x)
    torch.testing.assert_close(by_rows, by_columns, **CLOSE)
    _, pull = vjp(output, x)
    d_y = support.draw(*output(x).shape, seed=71)
    torch.testing.assert_close(pull(d_y)[0], torch.tensordot(d_y, by_rows, d_y.dim()), **CLOSE)


@every_way
@pytest.mark.parametrize("kind", ["gru", "projected", "minimal"])
def test_hessian(kind: str, backend: str) -> None:
    _, params, x, loss = prepare(kind, backend)
    x = x[:2, :2]
    leaf = x.clone().requires_grad_()
    first = torch.autograd.grad(loss(params, leaf), leaf, create_graph=True)[0]
    rows = [torch.autograd.grad(entry, leaf, retain_graph=True)[0] for entry in first.flatten()]
    found = hessian(loss, argnums=1)(params, x)
    torch.testing.assert_close(found, torch.stack(rows).view(found.shape), **CLOSE)
    assert found.abs().max() > 1e-3


@every_way
@every_layer
def test_vmap_over_inputs_and_over_weights(kind: str, backend: str) -> None:
    layer, params, _, _ = prepare(kind, backend)
    xs = support.draw(5, 4, 3, 2, seed=72)

    def call(params: dict[str, Tensor], x: Tensor) -> Any:
        return functional_call(layer, params, (x,))

    expected = [call(params, x) for x in xs]
    torch.testing.assert_close(support.unmapped(vmap(call, (None, 0))(params, xs), 5), expected, **CLOSE)
    moved = vmap(call, (None, 2))(params, xs.movedim(0, 2))
    torch.testing.assert_close(support.unmapped(moved, 5), expected, **CLOSE)
    ensemble, _ = stack_module_state([LAYERS[kind](backend) for _ in range(5)])
    ensemble = {name: p.detach() for name, p in ensemble.items()}
    members = [{name: p[k] for name, p in ensemble.items()} for k in range(5)]
    for x_dim, inputs in ((0, list(xs)), (None, [xs[0]] * 5)):
        mapped = vmap(call, (0, x_dim))(ensemble, xs if x_dim == 0 else xs[0])
        expected = [call(member, x) for member, x in zip(members, inputs, strict=True)]
        torch.testing.assert_close(support.unmapped(mapped, 5), expected, **CLOSE)


@every_way
@every_layer
def test_gradients_per_sample_and_per_member(kind: str, backend: str) -> None:
    _, params, _, loss = prepare(kind, backend)
    xs = support.draw(5, 4, 3, 2, seed=73)
    found = vmap(grad(loss), (None, 0))(params, xs)
    expected = [plain_gradients(loss, params, x) for x in xs]
    for name in params:
        torch.testing.assert_close(found[name], torch.stack([e[name] for e in expected]), **CLOSE)
    ensemble, _ = stack_module_state([LAYERS[kind](backend) for _ in range(3)])
    ensemble = {name: p.detach() for name, p in ensemble.items()}
    found = vmap(grad(loss), (0, None))(ensemble, xs[0])
    for k in range(3):
        expected_k = plain_gradients(loss, {name: p[k] for name, p in ensemble.items()}, xs[0])
        torch.testing.assert_close({n: found[n][k] for n in params}, {n: expected_k[n] for n in params}, **CLOSE)


@every_way
@every_layer
def test_backward_in_eval_mode_and_twice(kind: str, backend: str) -> None:
    """retain_graph gives the same gradients again, and nothing that was saved has been written to."""
    layer, _, x, _ = prepare(kind, backend)
    layer.eval()
    x.requires_grad_()
    y, _ = layer(x)
    watched = [x, y, *layer.parameters()]
    before = [(t._version, t.detach().clone()) for t in watched]
    wanted = [x, *layer.parameters()]
    d = support.draw(*y.shape, seed=74)
    first = torch.autograd.grad(y, wanted, d, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(y, wanted, d)
    torch.testing.assert_close(second, tuple(kept), rtol=0, atol=0)
    torch.testing.assert_close(first, tuple(kept), rtol=0, atol=0)
    assert all(g.abs().sum() > 0 for g in kept)
    for tensor, (version, value) in zip(watched, before, strict=True):
        assert tensor._version == version
        torch.testing.assert_close(tensor.detach(), value, rtol=0, atol=0)


@every_loop
def test_a_weight_changed_before_backward_is_noticed(backend: str) -> None:
    layer, _, x, _ = prepare("reset before", backend)
    y, _ = layer(x)
    with torch.no_grad():
        layer.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@every_loop
@every_recurrence
def test_only_what_wants_a_gradient_gets_one(name: str, backend: str) -> None:
    recurrence = support.RECURRENCES[name]
    expected = support.values_and_gradients(recurrence, support.make(recurrence), backend)
    for wanted in support.make(recurrence).named():
        inputs = support.make(recurrence)
        for other, tensor in inputs.named().items():
            tensor.requires_grad_(other == wanted)
        outputs = support.run(recurrence, inputs, backend)
        total = sum((out * support.draw(*out.shape, seed=90 + k)).sum() for k, out in enumerate(outputs))
        total.backward()
        grads = {other: tensor.grad for other, tensor in inputs.named().items()}
        torch.testing.assert_close(grads.pop(wanted), expected[f"d {wanted}"], **CLOSE)
        assert all(g is None for g in grads.values())


@pytest.mark.parametrize("backend", ["step", "reference"])
@pytest.mark.parametrize("twice", [False, True])
def test_an_input_that_wants_no_gradient_costs_no_product(
    twice: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first layer of a model: a third of the products over all steps. Those of the weights are the same bits."""
    wanted: list[bool] = []
    project = linear._projection
    monkeypatch.setattr(linear, "_projection", lambda *given: wanted.append(given[-1]) or project(*given))
    layer, x = gpu_rnn.GRU(2, 3, reset_after=False, backend=backend), torch.randn(4, 2, 2)
    weights = list(layer.parameters())

    def gradients(x: Tensor) -> list[Tensor]:
        grads = torch.autograd.grad(layer(x)[0].square().sum(), weights, create_graph=twice)
        return list(torch.autograd.grad([g.square().sum() for g in grads], weights)) if twice else list(grads)

    without, with_it = gradients(x), gradients(x.clone().requires_grad_())
    assert all(map(torch.equal, without, with_it))
    passes = len(wanted) // 2
    assert wanted == [False] * passes + [True] * passes and bool(passes) == (backend == "step")
