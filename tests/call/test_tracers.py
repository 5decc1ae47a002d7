# SPDX-License-Identifier: Apache-2.0
"""torch.jit.trace, the old ONNX exporter and symbolic_trace: the registered operations, or words that help."""

from __future__ import annotations

import io
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gpu_rnn
from tests.support.recorded import (
    H,
    I,
    Net,
    close,
    draw,
    every_layer,
    loss_of,
    make,
)
from tests.support.waiting import PATIENCE

# What torch itself does at the first use of forward mode; torch.jit is old, and says so in some versions.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


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
    done = subprocess.run([sys.executable, "-c", QUIET], capture_output=True, text=True, timeout=PATIENCE, check=True)
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
        with warnings.catch_warnings(), pytest.raises(RuntimeError, match=r"import gpu_rnn.onnx and use"):
            warnings.simplefilter("ignore")
            torch.onnx.export(make(name).eval(), (draw(1),), io.BytesIO(), dynamo=False)
    for model in (make("lstm"), gpu_rnn.LSTM(I, H, dtype=draw(1).dtype)):  # in a model, and by itself
        file = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(model.eval(), (draw(1),), file, dynamo=False)
        assert b"LSTM" in file.getvalue()


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
