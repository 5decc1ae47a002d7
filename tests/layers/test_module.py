# SPDX-License-Identifier: Apache-2.0
"""Layers and cells as citizens of torch: copies, files, parametrizations, hooks, functional_call, dtypes, devices."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import gpu_rnn
from tests.support import layers as support

BACKENDS = ("auto", "reference")
ALL = [*support.LAYERS, *support.CELLS]


def build(name: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return getattr(gpu_rnn, name)(3, 5, **options)


def arguments(name: str, x: torch.Tensor) -> tuple:
    """A call's arguments: a cell starts from states other than 0, so that its recurrent weights count."""
    h = x.new_full((*x.shape[:-1], 5), 0.5)
    return {"RNNCell": (x, h), "GRUCell": (x, h), "LSTMCell": (x, (h, h))}.get(name, (x,))


def run(module: nn.Module, x: torch.Tensor | None = None) -> torch.Tensor:
    """The h of one small call."""
    x = support.draw(4, 3, dtype=torch.float32) if x is None else x
    name = type(module).__name__.removeprefix("Parametrized")
    return support.leaves(module(*arguments(name, x)))[0]


def first(name: str) -> str:
    """The suffix of a module's first weights."""
    return "" if name.endswith("Cell") else "_l0"


@pytest.mark.parametrize("name", ALL)
def test_deepcopy_is_equal_and_independent(name: str) -> None:
    layer = build(name, activation="softsign")
    before = run(layer)
    clone = copy.deepcopy(layer)
    assert torch.equal(run(clone), before)
    with torch.no_grad():
        for weight in clone.parameters():
            weight.add_(1)
    assert torch.equal(run(layer), before)
    assert not torch.equal(run(clone), before)


@pytest.mark.parametrize("name", ALL)
def test_pickle_and_torch_save(name: str) -> None:
    layer = build(name).double()
    x = support.draw(4, 3)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for clone in (pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)):
        assert repr(clone) == repr(layer)
        assert torch.equal(run(clone, x), run(layer, x))


def test_a_file_needs_nothing_of_the_users_code(tmp_path: Path) -> None:
    scale = 0.7

    def minimal(x, r, s):
        f = torch.sigmoid(scale * (x.f + r.f))
        return (1 - f) * s.h + f * torch.tanh(x.n + f * r.n)

    own = gpu_rnn.Recurrent(gpu_rnn.Recurrence(minimal, gates=("f", "n"), states=("h",)), 3, 5)
    model = nn.ModuleList([own, gpu_rnn.LSTM(3, 5, activation=lambda x: x / (1 + scale * x.abs()))])
    x = torch.randn(4, 2, 3)
    torch.save({"model": model, "x": x, "y": [layer(x)[0] for layer in model]}, tmp_path / "model.pt")
    script = """
import sys, torch
saved = torch.load(sys.argv[1], weights_only=False)
for layer, y in zip(saved["model"], saved["y"], strict=True):
    torch.testing.assert_close(layer(saved["x"])[0], y)
print(saved["model"][1])
"""
    command = [sys.executable, "-c", script, str(tmp_path / "model.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "LSTM(3, 5, activation=<lambda>)"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ALL)
def test_parametrized_recurrent_weight(name: str, backend: str) -> None:
    layer = build(name, backend=backend)
    weight = f"weight_hh{first(name)}"
    parametrizations.weight_norm(layer, weight)
    scale = layer.parametrizations[weight].original0
    before = run(layer)
    torch.testing.assert_close(before, run(build(name)))
    before.sum().backward()
    assert scale.grad is not None
    assert scale.grad.abs().sum() > 0
    with torch.no_grad():
        scale.mul_(3)
    assert not torch.allclose(run(layer), before), "the weights of an earlier call were used"
    assert torch.equal(run(copy.deepcopy(layer)), run(layer))
    parametrize.remove_parametrizations(layer, weight)
    assert not torch.allclose(run(layer), before)


def test_orthogonal_recurrent_weight_stays_orthogonal_in_training() -> None:
    layer = parametrizations.orthogonal(build("RNN"), "weight_hh_l0")
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    start = layer.weight_hh_l0.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        run(layer).square().mean().backward()
        optimizer.step()
    assert not torch.allclose(layer.weight_hh_l0, start)
    torch.testing.assert_close(layer.weight_hh_l0 @ layer.weight_hh_l0.T, torch.eye(5))


def test_weight_norm_by_hooks() -> None:
    layer = build("LSTM")
    expected = run(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated by torch, still in use
        nn.utils.weight_norm(layer, "weight_hh_l0")
    torch.testing.assert_close(run(layer), expected)
    with torch.no_grad():
        layer.weight_hh_l0_g.mul_(2)
    assert not torch.allclose(run(layer), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", support.LAYERS)
def test_tied_weights(name: str, backend: str) -> None:
    one, other = build(name, backend=backend), build(name, backend=backend)
    with torch.no_grad():
        other.weight_hh_l0.mul_(2)
    other.weight_hh_l0 = one.weight_hh_l0
    assert torch.equal(run(one), run(other))
    (run(one) + run(other)).sum().backward()
    alone = build(name)
    run(alone).sum().backward()
    torch.testing.assert_close(one.weight_hh_l0.grad, 2 * alone.weight_hh_l0.grad)


def test_replaced_parameter_is_used() -> None:
    layer = build("GRU")
    before = run(layer)
    layer.weight_hh_l0 = nn.Parameter(layer.weight_hh_l0.detach() * 2)
    after = run(layer)
    assert not torch.allclose(after, before)
    layer.weight_hh_l0.data = layer.weight_hh_l0.data / 2
    torch.testing.assert_close(run(layer), before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", ["weight_ih", "weight_hh", "bias_ih", "bias_hh"])
@pytest.mark.parametrize("name", ALL)
def test_frozen_weights(name: str, frozen: str, backend: str) -> None:
    layer, free = build(name, backend=backend), build(name)
    getattr(layer, frozen + first(name)).requires_grad_(False)
    run(layer).sum().backward()
    run(free).sum().backward()
    for parameter, weight in layer.named_parameters():
        if parameter.startswith(frozen):
            assert weight.grad is None
        else:
            torch.testing.assert_close(weight.grad, free.get_parameter(parameter).grad)


@pytest.mark.parametrize("name", support.LAYERS)
def test_hooks(name: str) -> None:
    layer, seen = build(name), []
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    layer.register_forward_hook(lambda module, args, output: seen.append("forward"))
    layer.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append("backward"))
    layer.weight_hh_l0.register_hook(lambda grad: seen.append("weight"))
    x = support.draw(4, 3, dtype=torch.float32)
    output = run(layer, x)
    torch.testing.assert_close(output, run(build(name), x * 2))
    output.sum().backward()
    assert sorted(seen) == ["backward", "forward", "weight"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ALL)
def test_inference_mode(name: str, backend: str) -> None:
    layer = build(name, backend=backend)
    with torch.inference_mode():
        output = run(layer)
    assert output.is_inference()
    torch.testing.assert_close(output, run(layer).detach())


@pytest.mark.parametrize("name", ALL)
def test_default_dtype(name: str) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        layer = build(name)
        assert {p.dtype for p in layer.parameters()} == {torch.float64}
        assert run(layer, torch.randn(4, 3)).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ALL)
def test_conversions(name: str, backend: str) -> None:
    layer = build(name, backend=backend)
    expected = run(layer)
    assert layer.double() is layer
    torch.testing.assert_close(run(layer, support.draw(4, 3, dtype=torch.float32).double()).float(), expected)
    layer.to(torch.bfloat16)
    bfloat = run(layer, support.draw(4, 3, dtype=torch.float32).bfloat16())
    assert bfloat.dtype == torch.bfloat16
    torch.testing.assert_close(bfloat.float(), expected, rtol=0.05, atol=0.05)
    layer.to("meta")
    assert run(layer, torch.zeros(4, 3, dtype=torch.bfloat16, device="meta")).is_meta


@pytest.mark.parametrize("name", ALL)
def test_meta_layer_is_filled_in(name: str) -> None:
    layer = getattr(gpu_rnn, name)(3, 5, device="meta").to_empty(device="cpu")
    torch.manual_seed(0)
    layer.reset_parameters()
    assert torch.equal(run(layer), run(build(name)))
    assigned = getattr(gpu_rnn, name)(3, 5, device="meta")
    assigned.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(run(assigned), run(layer))


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
@pytest.mark.parametrize("name", ALL)
def test_complex_on_the_reference(name: str) -> None:
    theirs, mine = support.pair(name, 3, 5, dtype=torch.complex128, ours={"backend": "reference"})
    x = support.draw(4, 3, dtype=torch.complex128)
    torch.testing.assert_close(run(mine, x), run(theirs, x), **support.TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ALL)
def test_functional_call_uses_the_weights_given(name: str, backend: str) -> None:
    layer = build(name, backend=backend)
    x = support.draw(4, 3, dtype=torch.float32)
    weights = {key: (value.detach() * 1.5).requires_grad_() for key, value in layer.named_parameters()}
    output = support.leaves(torch.func.functional_call(layer, weights, arguments(name, x)))[0]
    output.sum().backward()
    assert all(weight.grad is not None for weight in weights.values())
    assert all(weight.grad is None for weight in layer.parameters())
    with torch.no_grad():
        for weight in layer.parameters():
            weight.mul_(1.5)
    torch.testing.assert_close(output, run(layer, x))


@pytest.mark.parametrize("name", support.LAYERS)
def test_parameters_never_share_memory(name: str) -> None:
    layer = getattr(gpu_rnn, name)(3, 5, 2, bidirectional=True)
    for stage in (layer, layer.double(), copy.deepcopy(layer)):
        stage.flatten_parameters()
        storages = {p.untyped_storage().data_ptr() for p in stage.parameters()}
        assert len(storages) == len(list(stage.parameters()))
        assert all(p.untyped_storage().nbytes() == p.nbytes for p in stage.parameters())


def test_replica_of_data_parallel() -> None:
    layer = build("GRU")
    replica = layer._replicate_for_data_parallel()
    for name, weight in layer.named_parameters():
        setattr(replica, name, weight * 1)  # as torch.nn.parallel.replicate hands out copies
    run(replica).sum().backward()
    assert torch.equal(run(replica), run(layer))
    assert all(weight.grad is not None for weight in layer.parameters())


def test_subclass_with_its_own_forward() -> None:
    class Residual(gpu_rnn.GRU):
        def forward(self, input, hx=None):
            output, h = super().forward(input, hx)
            return output + input, h

    torch.manual_seed(0)
    residual = Residual(5, 5)
    torch.manual_seed(0)
    plain = gpu_rnn.GRU(5, 5)
    x = torch.randn(4, 2, 5)
    torch.testing.assert_close(residual(x)[0], plain(x)[0] + x)
    assert repr(residual) == "Residual(5, 5)"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("training", False),
        ("dropout", 0.2),
        ("zoneout", 0.2),
        ("backend", "step"),
        ("batch_first", True),
        ("bidirectional", True),
        ("num_layers", 3),
        ("bias", False),
        ("proj_size", 2),
    ],
)
def test_a_call_goes_by_what_is_set_now(name: str, value: object) -> None:
    """What calls have in common is kept from one to the next, until an attribute is set."""
    layer = gpu_rnn.LSTM(3, 4, num_layers=2, dropout=0.1, zoneout=0.1)
    for each in (layer, copy.deepcopy(layer), layer._replicate_for_data_parallel()):
        before = each._stack()
        assert each._stack() is before
        setattr(each, name, value)
        after = each._stack()
        if name != "zoneout":  # a matter of evaluation, and of what is drawn
            assert after != before
        assert after == each._new_stack(False, False)
    assert layer.eval()._stack() == layer._new_stack(False, False)


def test_a_call_of_another_thread_while_an_attribute_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """What that call keeps was made before the attribute was there, and goes when it is."""
    layer, of_torch = gpu_rnn.LSTM(3, 4), nn.Module.__setattr__

    def late(self: nn.Module, name: str, value: object) -> None:
        layer(torch.randn(2, 1, 3))
        of_torch(self, name, value)

    monkeypatch.setattr(nn.Module, "__setattr__", late)
    layer.backend = "step"
    assert layer._stack().backend == "step"


@pytest.mark.parametrize("name", ALL)
def test_a_state_that_is_set_is_the_one_a_call_goes_by(name: str) -> None:
    layer = build(name)
    run(layer)
    layer.__setstate__(build(name, backend="step").__getstate__())
    assert layer._stack().backend == "step"


def test_a_subclass_may_compute_what_a_call_goes_by() -> None:
    class Scheduled(gpu_rnn.LSTM):
        now = 0.0
        dropout = property(lambda self: self.now, lambda self, value: None)

    class Named(Scheduled):
        pass

    layer = Named(3, 4, num_layers=2)
    assert layer._stack().dropout == 0
    Scheduled.now = 0.5
    assert layer._stack().dropout == 0.5


def test_what_calls_have_in_common_is_not_pickled() -> None:
    layer = gpu_rnn.GRU(3, 4)
    before = pickle.dumps(layer)
    layer(torch.randn(2, 1, 3))
    assert pickle.dumps(layer) == before
