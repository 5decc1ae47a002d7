# SPDX-License-Identifier: Apache-2.0
"""Packages of AOTInductor run with other numbers of steps and samples, in a process that imports gpu_rnn alone."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gpu_rnn
from gpu_rnn import cells

pytestmark = pytest.mark.filterwarnings(  # Inductor's own
    "ignore:.torch.jit.script:DeprecationWarning", "ignore:.isinstance.treespec, LeafSpec:FutureWarning"
)

STEPS, BATCH = torch.export.Dim("steps"), torch.export.Dim("batch")
SCRIPT = """
import sys, torch, gpu_rnn
run, calls = torch._inductor.aoti_load_package(sys.argv[1]), torch.load(sys.argv[2])
for x, outputs in calls:
    torch.testing.assert_close(list(run(x)), outputs, rtol=1e-5, atol=1e-5)
print("same", len(calls))
"""


class Model(nn.Module):
    def __init__(self, layer: nn.Module, call: Callable[[Tensor], dict[str, Any]]) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y, *states = self.layer(x, **self.call(x))
        return (y * 2, *torch.utils._pytree.tree_leaves(states))


def values(x: Tensor) -> tuple[Tensor, Tensor]:
    ones = x.new_ones(1, x.shape[1], 5)
    return ones, ones * 2


MODELS: dict[str, Callable[[], Model]] = {
    "lengths": lambda: Model(gpu_rnn.LSTM(3, 5, bidirectional=True), lambda x: {"lengths": (x[..., 0] > -1).sum(0)}),
    "resets to values": lambda: Model(
        gpu_rnn.LSTM(3, 5), lambda x: {"resets": x[..., 0] > 0, "reset_state": values(x), "return_all_states": True}
    ),
    "a stack of slstm": lambda: Model(gpu_rnn.Recurrent(cells.slstm(), 3, 5, 2), lambda x: {}),
    "options": lambda: Model(gpu_rnn.GRU(3, 5, layer_norm=True, zoneout=0.1), lambda x: {"mask": x[..., 0] > -1}),
}


@pytest.mark.slow  # the page docs/deploy.md runs one of a model with lengths
@pytest.mark.parametrize("name", MODELS)
def test_a_package_runs_elsewhere(name: str, tmp_path: Path) -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("no C++ compiler is installed, which AOTInductor needs on a CPU")
    model = MODELS[name]().eval()
    program = torch.export.export(model, (torch.randn(6, 4, 3),), dynamic_shapes=({0: STEPS, 1: BATCH},))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    inputs = [torch.randn(*sizes, 3) for sizes in ((9, 2), (2, 5))]
    torch.save([(x, [out.detach() for out in model(x)]) for x in inputs], tmp_path / "calls.pt")
    command = [sys.executable, "-c", SCRIPT, package, str(tmp_path / "calls.pt")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "same 2", done.stderr
