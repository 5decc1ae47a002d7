# SPDX-License-Identifier: Apache-2.0
"""Whoever records torch's operations gets the registered ones, or words that say what to use: never other numbers."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functionalize, grad, hessian, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import gpu_rnn

# What torch itself does at the first use of forward mode; torch.jit is old, and says so in some versions.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

T, B, I, H = 5, 3, 4, 6  # noqa: E741
FORWARD, BACKWARD = torch.ops.gpu_rnn.rnn.default, torch.ops.gpu_rnn.rnn_backward.default


class Net(nn.Module):
    """A layer or a cell as a model has it: a tensor in, a tensor out, with what steers its steps made of the input."""

    def __init__(self, layer: nn.Module, *controls: str) -> None:
        super().__init__()
        self.layer, self.controls = layer, controls

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, nn.RNNCell | nn.GRUCell | nn.LSTMCell | gpu_rnn.layers.cell.CellBase):
            found = self.layer(x[0])
            return found[0] if isinstance(found, tuple) else found
        every = {
            "mask": lambda: x[..., 0] > -0.5,
            "lengths": lambda: 1 + (x[0, :, 0] > 0).long(),
            "resets": lambda: x[..., 1] > 0.5,
            "return_all_states": lambda: True,
        }
        y, *states = self.layer(x, **{name: every[name]() for name in self.controls})
        return y * 2 + sum(state.mean() for state in tree_leaves(states))


LAYERS: dict[str, Callable[[], Net]] = {
    "lstm": lambda: Net(gpu_rnn.LSTM(I, H)),
    "stack": lambda: Net(gpu_rnn.GRU(I, H, 2, bidirectional=True)),
    "reset before": lambda: Net(gpu_rnn.GRU(I, H, reset_after=False), "lengths"),
    "peephole": lambda: Net(gpu_rnn.LSTM(I, H, 2, peephole=True), "mask"),
    "norm": lambda: Net(gpu_rnn.LSTM(I, H, layer_norm=True), "resets"),
    "softsign": lambda: Net(
        gpu_rnn.RNN(I, H, activation="softsign", bidirectional=True), "mask", "resets", "return_all_states"
    ),
    "step": lambda: Net(gpu_rnn.LSTM(I, H, backend="step"), "return_all_states"),
    "reference": lambda: Net(gpu_rnn.GRU(I, H, backend="reference")),
    "cell": lambda: Net(gpu_rnn.GRUCell(I, H, reset_after=False)),
    "lstm cell": lambda: Net(gpu_rnn.LSTMCell(I, H)),
}
SOME = ("lstm", "peephole", "softsign", "step")
every_layer = pytest.mark.parametrize("name", LAYERS)
some_layers = pytest.mark.parametrize("name", SOME)
every_mode = pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])


def make(name: str) -> Net:
    torch.manual_seed(0)
    return LAYERS[name]()


def draw(seed: int, steps: int = T, batch: int = B) -> Tensor:
    return torch.randn(steps, batch, I, generator=torch.Generator().manual_seed(seed))


def loss_of(net: Net) -> Callable[[Tensor], Tensor]:
    return lambda x: net(x).sin().sum()


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def recorded(function: Callable[[Tensor], Any], mode: str, **options: Any) -> torch.fx.GraphModule:
    return make_fx(function, tracing_mode=mode, _allow_non_fake_inputs=True, **options)(draw(1))


def operations(graph: torch.fx.GraphModule) -> set[Any]:
    return {node.target for node in graph.graph.nodes}


@every_mode
@every_layer
@pytest.mark.parametrize("kept", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_make_fx(kept: bool, name: str, mode: str) -> None:
    """A graph of an example is right for other values, and one of symbols for other sizes."""
    net = make(name)
    with torch.set_grad_enabled(kept):
        graph = recorded(net, mode)
    assert FORWARD in operations(graph) or (name == "reference" and mode == "real")  # which is torch's operations alone
    torch.empty(200_000).fill_(7.0)  # what nobody wrote is this, then
    close(graph(draw(2)), net(draw(2)))
    if mode == "symbolic":
        steps, batch = (1, 7) if "cell" in name else (9, 2)
        close(graph(draw(3, steps, batch)), net(draw(3, steps, batch)))


@every_mode
@some_layers
@pytest.mark.parametrize("kept", [pytest.param(True, marks=pytest.mark.slow), False])
def test_make_fx_before_autograd(kept: bool, name: str, mode: str) -> None:
    net = make(name)
    with torch.set_grad_enabled(kept):
        graph = recorded(net, mode, pre_dispatch=True)
    close(graph(draw(2)), net(draw(2)))
    x, other = (draw(4).requires_grad_() for _ in range(2))
    close(torch.autograd.grad(graph(x).sin().sum(), x), torch.autograd.grad(loss_of(net)(other), other))


@every_mode
@some_layers
def test_gradients_in_a_graph(name: str, mode: str) -> None:
    net = make(name)
    weights = list(net.parameters())

    def by_autograd(x: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss_of(net)(x), weights)

    for function in (grad(loss_of(net)), by_autograd):
        graph = recorded(function, mode)
        assert {FORWARD, BACKWARD} <= operations(graph)
        close(graph(draw(2)), function(draw(2)))
        if mode == "symbolic":
            close(graph(draw(3, 9, 2)), function(draw(3, 9, 2)))


NESTED: dict[str, Callable[[Net], Callable[[Tensor], Any]]] = {
    "vmap": lambda net: lambda x: vmap(net)(torch.stack([x, x.cos()])),
    "jvp": lambda net: lambda x: jvp(net, (x,), (x.cos(),))[1],
    "vmap of grad": lambda net: lambda x: vmap(grad(loss_of(net)))(torch.stack([x, x.cos()])),
    "jacrev": lambda net: lambda x: jacrev(lambda x: net(x)[0, 0, :2])(x),
    "grad of grad": lambda net: lambda x: grad(lambda x: grad(loss_of(net))(x).square().sum())(x),
    "hessian": lambda net: lambda x: hessian(lambda first: loss_of(net)(torch.cat([first, x[1:]])))(x[:1]),
}


@pytest.mark.parametrize("mode", ["real", "fake"])
@pytest.mark.parametrize("way", [pytest.param(way, marks=() if "vmap" in way else pytest.mark.slow) for way in NESTED])
@pytest.mark.parametrize("name", ["lstm", pytest.param("peephole", marks=pytest.mark.slow), "step"])
def test_transforms_in_a_graph(name: str, way: str, mode: str) -> None:
    function = NESTED[way](make(name))
    close(recorded(function, mode)(draw(2)), function(draw(2)))


@pytest.mark.parametrize("name", [*SOME, "reference"])
def test_functionalize(name: str) -> None:
    """Alone, inside and outside of other transforms."""
    net, x, v = make(name), draw(1), draw(2)
    loss, along = loss_of(net), (lambda f: jvp(f, (x,), (v,))[1])
    close(functionalize(net)(x), net(x))
    weights = list(net.parameters())
    close(torch.autograd.grad(functionalize(loss)(x), weights), torch.autograd.grad(loss(x), weights))
    close(functionalize(grad(loss))(x), grad(loss)(x))
    close(grad(functionalize(loss))(x), grad(loss)(x))
    both = torch.stack([x, v])
    close(vmap(functionalize(net))(both), vmap(net)(both))
    close(functionalize(vmap(net))(both), vmap(net)(both))
    close(along(functionalize(net)), along(net))
    graph = recorded(functionalize(net), "symbolic")
    assert FORWARD in operations(graph)
    close(graph(draw(3, 9, 2)), net(draw(3, 9, 2)))


@pytest.mark.parametrize("training", [True, False])
@every_layer
def test_fake_tensors(name: str, training: bool) -> None:
    """As estimators of memory use them: sizes and dtypes of outputs and gradients, and nothing of it is kept."""
    real, x = make(name).train(training), draw(1)
    expected = real(x)
    with FakeTensorMode():
        net, fake = LAYERS[name]().train(training), torch.randn(x.shape, requires_grad=True)
        found = net(fake)
        found.sum().backward()
    assert isinstance(found, FakeTensor) and (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert fake.grad is not None and fake.grad.shape == x.shape
    assert all(p.grad is not None and p.grad.shape == p.shape for p in net.parameters())
    if not net.controls:  # which torch cannot make outside of the mode
        net.zero_grad()
        net(fake).sum().backward()
        assert all(isinstance(p.grad, FakeTensor) for p in net.parameters())
    close(real(x), expected)


@pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="this torch is built without CUDA, and indexes no such tensor"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_layer
def test_fake_tensors_of_a_gpu_that_is_not_here(name: str, dtype: torch.dtype) -> None:
    with FakeTensorMode():
        net = LAYERS[name]().requires_grad_(False)
        for module in net.modules():  # Module.to would ask the driver
            for own, p in list(module.named_parameters(recurse=False)):
                module._parameters[own] = nn.Parameter(
                    torch.empty(p.shape, device="cuda", dtype=dtype), requires_grad=False
                )
        found = net(torch.empty(T, B, I, device="cuda", dtype=dtype))
    assert (found.device.type, found.dtype, found.shape[0]) == ("cuda", dtype, B if "cell" in name else T)


def test_fake_tensors_with_noise() -> None:
    with FakeTensorMode():
        net = gpu_rnn.LSTM(I, H, 2, dropout=0.1, recurrent_dropout=0.2, zoneout=0.1, weight_drop=0.3)
        y, _ = net(torch.randn(T, B, I))
        y.sum().backward()
    assert isinstance(y, FakeTensor) and y.shape == (T, B, H)


def test_a_backend_that_no_registered_operation_has() -> None:
    net = gpu_rnn.GRU(I, H, backend="aten")
    close(recorded(lambda x: net(x)[0], "fake")(draw(2)), net(draw(2))[0])  # ATen's operations are recorded themselves
    with pytest.raises(ValueError, match="backend='aten' cannot run this call"):
        functionalize(net)(draw(1))
    with pytest.raises(ValueError, match="backend='aten' cannot run this call where it is recorded"):
        recorded(grad(lambda x: net(x)[0].sum()), "fake")


@pytest.mark.parametrize("kept", [True, False])
@every_layer
def test_jit_trace(name: str, kept: bool) -> None:
    """Passes torch's own check, and is right for other values, sizes and after a file; standard layers without this
    package."""
    net = make(name).eval()
    with warnings.catch_warnings(), torch.set_grad_enabled(kept):
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # of sizes that are compared, as with torch.nn's
        traced = torch.jit.trace(net, (draw(1),))
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert ("gpu_rnn::rnn" in kinds) == (name not in ("lstm", "stack", "lstm cell"))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    steps, batch = (1, 7) if "cell" in name else (9, 2)
    for program in (traced, torch.jit.load(file)):
        close(program(draw(2)), net(draw(2)))
        close(program(draw(3, steps, batch)), net(draw(3, steps, batch)))
    x, other = (draw(4).requires_grad_() for _ in range(2))
    wanted = [x, *traced.parameters()], [other, *net.parameters()]
    close(torch.autograd.grad(traced(x).sin().sum(), wanted[0]), torch.autograd.grad(loss_of(net)(other), wanted[1]))


QUIET = """
import torch, gpu_rnn
x, lengths = torch.randn(5, 2, 3), torch.tensor([5, 2])
layer = gpu_rnn.LSTM(3, 4).requires_grad_(False)
torch.jit.trace(layer, (x, (torch.zeros(1, 2, 4),) * 2))
torch.jit.trace(gpu_rnn.GRUCell(3, 4), (x[0],))
torch.jit.trace(lambda x, lengths: layer(x, lengths=lengths)[0], (x, lengths))
"""


def test_jit_trace_says_as_little_of_sizes_as_of_torch_nn() -> None:
    done = subprocess.run([sys.executable, "-c", QUIET], capture_output=True, text=True, timeout=120, check=True)
    assert "TracerWarning" not in done.stderr


def test_a_cell_that_is_first_met_while_a_model_is_traced() -> None:
    def step(x: Any, r: Any, s: Any) -> Tensor:
        return torch.tanh(x.a + r.a) * 0.7 + 0.3 * s.h

    net = Net(gpu_rnn.Recurrent(gpu_rnn.Recurrence(step, gates=("a",), states=("h",)), I, H))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(net, (draw(1),))
    close(traced(draw(2)), net(draw(2)))


def test_the_old_onnx_exporter() -> None:
    """Standard layers become ONNX's; all else is refused, as the file would lack what the exporter did not see."""
    for name in ("peephole", "norm", "step", "cell"):
        with warnings.catch_warnings(), pytest.raises(RuntimeError, match=r"torch.export.export"):
            warnings.simplefilter("ignore")
            torch.onnx.export(make(name).eval(), (draw(1),), io.BytesIO(), dynamo=False)
    for model in (make("lstm"), gpu_rnn.LSTM(I, H, dtype=draw(1).dtype)):  # in a model, and by itself
        file = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(model.eval(), (draw(1),), file, dynamo=False)
        assert b"LSTM" in file.getvalue()


@pytest.mark.parametrize("name", ["peephole", "step"])
def test_no_forward_mode_of_what_was_recorded(name: str) -> None:
    """A custom operation's tangent would be 0 without a word."""
    net, x = make(name), draw(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(net, (x,))
    for program in (recorded(net, "real"), traced, torch.export.export(net, (x,)).module()):
        with pytest.raises(RuntimeError, match="has no forward-mode derivative: take it of the layer itself"):
            jvp(program, (x,), (draw(2),))
        close(program(x), net(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = gpu_rnn.LSTM(I, H, 2, bidirectional=True, layer_norm=True)
        self.others = nn.ModuleList([gpu_rnn.GRU(2 * H, H, reset_after=False)])
        self.last = gpu_rnn.GRUCell(H, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y, (_, c) = self.first(x, mask=mask)
        z, _, every = self.others[0](y.relu(), return_all_states=True)
        return self.last(z[-1], z[-1][:, :3]) + every.sum() + c.mean()


def test_symbolic_trace() -> None:
    """Layers and cells are calls of a module, as torch.nn's are."""
    torch.manual_seed(0)
    model, mask = Model(), draw(2)[..., 0] > -0.5
    graph = torch.fx.symbolic_trace(model)
    called = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert called == ["first", "others.0", "last"]
    close(graph(draw(1), mask), model(draw(1), mask))
    alone = gpu_rnn.GRU(I, H)
    close(torch.fx.symbolic_trace(nn.Sequential(alone))(draw(1)), alone(draw(1)))


@pytest.mark.parametrize("module", [gpu_rnn.LSTM(I, H), gpu_rnn.GRUCell(I, H)])
def test_symbolic_trace_of_nothing_else(module: nn.Module) -> None:
    with pytest.raises(TypeError, match=r"trace torch.nn.Sequential\(layer\)"):
        torch.fx.symbolic_trace(module)


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
    net, x = make(name), draw(1).requires_grad_()
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
