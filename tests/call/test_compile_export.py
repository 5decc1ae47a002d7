# SPDX-License-Identifier: Apache-2.0
"""The ops under torch.library.opcheck; layers under torch.compile and torch.export, with sizes that change."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import gpu_rnn
from gpu_rnn import cells
from gpu_rnn.backends.tensors import Call, Result
from gpu_rnn.call import passes
from gpu_rnn.recurrence import Recurrence
from tests.support import loops as support
from tests.support import native
from tests.support.paths import ROOT

STEPS, BATCH = torch.export.Dim("steps"), torch.export.Dim("batch")
OLD = torch.__version__ < (2, 12)
SIZES = ((4, 3), (7, 2), (5, 6))

CASES: list[tuple[str, dict[str, Any]]] = [
    ("lstm", {"proj": 3}),
    ("gru", {"reverse": "01", "lengths": (5, 0, 3)}),
    ("gru_reset_before", {"reverse": "1"}),
    ("peephole_lstm", {"bias": False}),
    ("slstm", {"lengths": (2, 5, 5)}),
    ("minimal", {}),
]


def op_arguments(name: str, options: dict[str, Any], backend: str, save: bool) -> tuple[Any, ...]:
    recurrence = support.RECURRENCES[name]
    return arguments_of(recurrence, support.make(recurrence, **options), backend, save)


def arguments_of(recurrence: Recurrence, inputs: support.Inputs, backend: str, save: bool) -> tuple[Any, ...]:
    x, weights, controls, states, resets = inputs.layer
    return x, *weights, *controls, states, resets, recurrence.text(), inputs.options(backend, save).encode()


@pytest.mark.parametrize("backend", ["step", native.SLOW_BACKEND, "reference"])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_opcheck_forward(name: str, options: dict[str, Any], backend: str) -> None:
    torch.library.opcheck(torch.ops.gpu_rnn.rnn.default, op_arguments(name, options, backend, save=True))


@pytest.mark.parametrize("backend", ["step", native.BACKEND, "reference"])
def test_opcheck_inference(backend: str) -> None:
    for name in ("lstm", "gru"):
        arguments = op_arguments(name, {"reverse": "01"}, backend, save=False)
        torch.library.opcheck(torch.ops.gpu_rnn.rnn.default, arguments)


@pytest.mark.parametrize(
    ("name", "options"),
    [pytest.param(*case, marks=pytest.mark.slow if number > 1 else ()) for number, case in enumerate(CASES)],
)
@pytest.mark.parametrize("backend", ["step", native.SLOW_BACKEND])
def test_opcheck_backward(name: str, options: dict[str, Any], backend: str) -> None:
    """Of the loops: the reference's backward is torch.func.vjp, whose tensors opcheck's modes do not understand."""
    arguments = op_arguments(name, options, backend, save=True)
    count = len(support.RECURRENCES[name].states)
    with torch.no_grad():
        y, *rest = torch.ops.gpu_rnn.rnn(*arguments)
    d_y, *d_final = (torch.randn_like(out).requires_grad_() for out in (y, *rest[:count]))
    given = ([d_y, *d_final], [y, *rest[count:]], *arguments)
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if not OLD:  # AOTDispatcher of torch 2.11 cannot trace torch.func.vjp, of which the second derivative is made
        tests.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.gpu_rnn.rnn_backward.default, given, test_utils=tests)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["step", native.BACKEND, "reference"])
def test_opcheck_in_lower_precision(backend: str, dtype: torch.dtype) -> None:
    recurrence = support.RECURRENCES["lstm"]
    arguments = arguments_of(recurrence, support.make(recurrence).to(dtype), backend, save=True)
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]  # values: test_reference.py
    torch.library.opcheck(torch.ops.gpu_rnn.rnn.default, arguments, test_utils=tests)


LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "slstm": ("slstm", {"num_layers": 2}),
    "minimal": ("minimal", {"bidirectional": True, "batch_first": True}),
    "gru_reset_before": ("gru_reset_before", {"bias": False}),
    "coupled_lstm": ("coupled_lstm", {"num_layers": 2, "bidirectional": True}),
}


def build(kind: str, backend: str = "auto") -> gpu_rnn.Recurrent:
    torch._dynamo.reset()
    name, options = LAYERS[kind]
    return support.layer(support.RECURRENCES[name], backend, **options)


def tensors(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else [leaf for part in output for leaf in tensors(part)]


def values_and_gradients(call: Any, layer: torch.nn.Module, x: Tensor) -> list[Tensor]:
    outputs = tensors(call(x))
    total = sum((out * support.draw(*out.shape, seed=5 + k)).sum() for k, out in enumerate(outputs))
    return [*outputs, *torch.autograd.grad(total, [x, *layer.parameters()])]


@pytest.mark.parametrize("backend", ["auto", "step", native.SLOW_BACKEND, "reference"])
@pytest.mark.parametrize("kind", LAYERS)
def test_compiled_values_and_gradients(kind: str, backend: str) -> None:
    layer = build(kind, backend)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for sizes in SIZES:
        x = support.draw(*sizes, 2, seed=1).requires_grad_()
        expected = values_and_gradients(layer, layer, x)
        torch.testing.assert_close(values_and_gradients(compiled, layer, x), expected, rtol=1e-9, atol=1e-10)


def test_compiled_inference_saves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, seen, run = build("gru_reset_before", "step"), [], passes.forward_on

    def spied(name: str, call: Call, x: torch.Tensor, save: bool, *rest: bool) -> Result:
        seen.append(save)
        return run(name, call, x, save, *rest)

    monkeypatch.setattr(passes, "forward_on", spied)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = support.draw(4, 3, 2, seed=1)
    with torch.no_grad():
        compiled(x)
    compiled(x)
    assert seen == [False, True]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_exported_with_any_number_of_steps_and_samples(kind: str, strict: bool) -> None:
    layer = build(kind).eval()
    axes = {0: BATCH, 1: STEPS} if layer.batch_first else {0: STEPS, 1: BATCH}
    program = torch.export.export(layer, (support.draw(4, 3, 2, seed=1),), dynamic_shapes=(axes,), strict=strict)
    assert "gpu_rnn.rnn" in program.graph_module.code
    assert layer.recurrence.text() in [arg for node in program.graph.nodes for arg in node.args]
    for sizes in SIZES:
        x = support.draw(*sizes, 2, seed=2)
        expected = tensors(layer(x))
        torch.testing.assert_close(tensors(program.module()(x)), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_program_has_gradients(strict: bool) -> None:
    layer = build("coupled_lstm")
    x = support.draw(4, 3, 2, seed=1).requires_grad_()
    module = torch.export.export(layer, (x,), strict=strict).module()
    expected = values_and_gradients(layer, layer, x)
    torch.testing.assert_close(values_and_gradients(module, module, x), expected, rtol=1e-9, atol=1e-10)


SCRIPT = """
import sys
import torch
import gpu_rnn  # the ops; nothing of the user's
assert not any("minimal_gated_unit" in name for name in sys.modules)
program, calls = torch.export.load(sys.argv[1]), torch.load(sys.argv[2])
for x, outputs in calls:
    torch.testing.assert_close(program.module()(x), outputs, rtol=0, atol=0)
print("same", len(calls))
"""


@pytest.mark.parametrize("strict", [False, True])
def test_a_file_needs_nothing_of_the_users_code(tmp_path: Path, strict: bool) -> None:
    """The cell is a closure in a file that the process that loads the program never sees."""
    source = tmp_path / "minimal_gated_unit.py"
    source.write_text((ROOT / "examples" / "minimal_gated_unit.py").read_text())
    spec = importlib.util.spec_from_file_location("minimal_gated_unit", source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    layer = support.layer(module.minimal_gated_unit(2.0), num_layers=2, bidirectional=True).eval()
    given = (support.draw(4, 3, 2, seed=1),)
    program = torch.export.export(layer, given, dynamic_shapes=({0: STEPS, 1: BATCH},), strict=strict)
    torch.export.save(program, tmp_path / "program.pt2")
    inputs = [support.draw(*sizes, 2, seed=2) for sizes in SIZES]
    torch.save([(x, tuple(out.detach() for out in layer(x))) for x in inputs], tmp_path / "calls.pt")
    source.unlink()
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "program.pt2"), str(tmp_path / "calls.pt")]
    step = os.environ | {"GPU_RNN_BACKEND": "step"}  # as here: bits are compared
    done = subprocess.run(command, cwd=tmp_path, env=step, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == f"same {len(SIZES)}", done.stderr


class All(torch.nn.Module):
    """A layer with every option of its call."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, resets: Tensor, values: Any) -> Any:
        return self.layer(x, resets=resets, reset_state=values, return_all_states=True)


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize(
    "layer",
    [
        gpu_rnn.GRU(2, 3),
        gpu_rnn.RNN(2, 3, 2, bidirectional=True),
        gpu_rnn.LSTM(2, 3, 2),
        gpu_rnn.GRU(2, 3, bidirectional=True),
    ],
    ids=["gru", "rnn of four", "lstm of two", "gru of two"],
)
def test_a_file_of_a_call_with_all_states_and_resets(layer: Any, each: bool, tmp_path: Path) -> None:
    """With a single state there are no others to return; there may be as many steps as layers and directions."""
    rows, model = layer.num_layers * (1 + layer.bidirectional), All(layer)

    def arguments(steps: int) -> tuple[Any, ...]:
        values = [torch.randn(*[steps] * each, rows, 3, 3) for _ in layer.recurrence.states]
        return torch.randn(steps, 3, 2), torch.rand(steps, 3) > 0.5, values[0] if len(values) == 1 else tuple(values)

    steps = torch.export.Dim("steps", min=2)
    of_values = {0: steps} if each else None
    dims = {0: steps}, {0: steps}, of_values if len(layer.recurrence.states) == 1 else (of_values,) * 2
    torch.export.save(torch.export.export(model, arguments(5), dynamic_shapes=dims), tmp_path / "all.pt2")
    loaded = torch.export.load(tmp_path / "all.pt2").module()
    for count in (2, 4, 9):
        given = arguments(count)
        torch.testing.assert_close(loaded(*given), model(*given))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, where a graph breaks
def test_compiled_packed_sequence() -> None:
    layer = support.layer(support.RECURRENCES["minimal"], "step")
    compiled = torch.compile(layer, backend="aot_eager")
    packed = pack_padded_sequence(support.draw(5, 3, 2, seed=1), [5, 3, 1])
    torch.testing.assert_close(tensors(compiled(packed)[0].data), tensors(layer(packed)[0].data))


@pytest.mark.parametrize(
    "make", [gpu_rnn.LSTM, gpu_rnn.GRU, gpu_rnn.RNN, gpu_rnn.LSTMCell, gpu_rnn.GRUCell, gpu_rnn.RNNCell]
)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is:DeprecationWarning")
def test_script_names_export(make: type[torch.nn.Module]) -> None:
    with pytest.raises(RuntimeError, match=rf"gpu_rnn.{make.__name__}: .*torch.export.export"):
        torch.jit.script(make(2, 3))
    with pytest.raises(RuntimeError, match=r"torch\.export\.export"):
        torch.jit.script(torch.nn.Sequential(gpu_rnn.Recurrent(cells.slstm(), 2, 3)))


def test_two_compiled_layers_keep_their_own_cells() -> None:
    """Dynamo inlines forward() and may take one layer's graph for another's: the cells must tell them apart."""
    torch._dynamo.reset()
    layers = [gpu_rnn.GRU(4, 4, activation=name) for name in ("softsign", "relu")]
    compiled = [torch.compile(layer, fullgraph=True, backend="aot_eager") for layer in layers]
    x = torch.randn(5, 2, 4)
    for own, fast in zip(layers, compiled, strict=True):
        torch.testing.assert_close(fast(x)[0], own(x)[0])


@pytest.mark.filterwarnings("ignore")  # Dynamo's, on its way out of the graph
def test_a_compiled_jvp_is_not_zero() -> None:
    """A custom op's would be; the layer leaves the graph for it."""
    torch._dynamo.reset()
    layer = gpu_rnn.GRU(4, 4, activation="softsign")
    x, along = torch.randn(3, 2, 4), torch.randn(3, 2, 4)

    def push(x: Tensor, along: Tensor) -> Tensor:
        return torch.func.jvp(lambda x: layer(x)[0], (x,), (along,))[1]

    expected = push(x, along)
    assert expected.abs().max() > 0
    torch.testing.assert_close(torch.compile(push, backend="aot_eager")(x, along), expected)
