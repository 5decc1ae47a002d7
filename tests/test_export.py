# SPDX-License-Identifier: Apache-2.0
"""Exported programs whose layers are torch's own operations: equal to the layers, and run where this package is not."""

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
from torch.utils import cpp_extension
from torch.utils._pytree import tree_leaves

import gpu_rnn
from gpu_rnn import cells, export

pytestmark = pytest.mark.filterwarnings(  # torch's own
    "ignore:.isinstance.treespec, LeafSpec:FutureWarning", "ignore:.torch.jit.script:DeprecationWarning"
)

I, H = 3, 6  # noqa: E741
Call = Callable[[Tensor], dict[str, Any]]


class Model(nn.Module):
    """A layer, and what steers its steps, made of the input."""

    def __init__(self, layer: nn.Module, call: Call | None = None) -> None:
        super().__init__()
        self.layer, self.call = layer.eval(), call

    def forward(self, x: Tensor) -> list[Tensor]:
        return tree_leaves(self.layer(x, **(self.call(x) if self.call else {})))


def lengths(x: Tensor) -> dict[str, Any]:
    return {"lengths": (x[..., 0] > -0.5).sum(0)}


def mask(x: Tensor) -> dict[str, Any]:
    return {"mask": x[..., 0] > -0.5}


def resets(x: Tensor) -> dict[str, Any]:
    ones = x.new_ones(1, x.shape[1], H)
    return {"resets": x[..., 0] > 0, "reset_state": (ones, ones * 2), "return_all_states": True}


MODELS: dict[str, Callable[[], Model]] = {
    "two layers and directions": lambda: Model(gpu_rnn.LSTM(I, H, 2, bidirectional=True)),
    "aten": lambda: Model(gpu_rnn.GRU(I, H, 2, backend="aten")),
    "lengths": lambda: Model(gpu_rnn.LSTM(I, H, bidirectional=True), lengths),
    "resets": lambda: Model(gpu_rnn.LSTM(I, H), resets),
    "mask": lambda: Model(gpu_rnn.GRU(I, H, layer_norm=True, zoneout=0.1), mask),
    "projected": lambda: Model(gpu_rnn.LSTM(I, H, proj_size=2, rms_norm=True)),
    "heads": lambda: Model(gpu_rnn.RNN(I, H, heads=2, activation="softsign")),
    **{name: lambda cell=cell: Model(gpu_rnn.Recurrent(cell(), I, H)) for name, cell in cells.CELLS.items()},
}
QUICK = ("aten", "mask")


def decomposed(model: Model, loop: str = "unrolled") -> torch.export.ExportedProgram:
    """Of any batch, and with a scan of any number of steps."""
    sizes = {1: torch.export.Dim("batch")} | ({0: torch.export.Dim("steps")} if loop == "scan" else {})
    program = torch.export.export(model, (torch.randn(5, 4, I),), dynamic_shapes=(sizes,))
    return program.run_decompositions(export.decompositions(loop))


@pytest.mark.parametrize("loop", ["unrolled", "scan"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in MODELS]
)
def test_torchs_operations_alone(name: str, loop: str) -> None:
    model = MODELS[name]()
    program = decomposed(model, loop)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("gpu_rnn" in target for target in targets)
    for steps, batch in ((5, 4), (5, 7), *([(2, 3), (11, 5)] if loop == "scan" else [])):
        x = torch.randn(steps, batch, I)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-6, atol=1e-6)


def test_unrolled_the_number_of_steps_is_said_to_be_fixed() -> None:
    x, sizes = torch.randn(5, 4, I), {0: torch.export.Dim("steps"), 1: torch.export.Dim("batch")}
    program = torch.export.export(MODELS["aten"](), (x,), dynamic_shapes=(sizes,))
    with pytest.warns(UserWarning, match="takes the 5 steps that it was exported with and no others"):
        program.run_decompositions(export.decompositions())


SCRIPT = """
import sys
sys.modules["gpu_rnn"] = None  # as where it is not installed
import torch
program, (x, outputs) = torch.export.load(sys.argv[1]), torch.load(sys.argv[2])
torch.testing.assert_close(program.module()(x), outputs, rtol=1e-6, atol=1e-6)
print("same")
"""


@pytest.mark.slow
def test_a_file_runs_without_this_package(tmp_path: Path) -> None:
    model = MODELS["mask"]()
    torch.export.save(decomposed(model), tmp_path / "model.pt2")
    x = torch.randn(5, 2, I)
    torch.save((x, [out.detach() for out in model(x)]), tmp_path / "call.pt")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "model.pt2"), str(tmp_path / "call.pt")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "same", done.stderr


PACKAGED = """
import sys
sys.modules["gpu_rnn"] = None  # as where it is not installed
import torch
run, calls = torch._inductor.aoti_load_package(sys.argv[1]), torch.load(sys.argv[2])
for x, outputs in calls:
    torch.testing.assert_close(run(x), outputs, rtol=1e-5, atol=1e-5)
print("same")
"""


@pytest.mark.slow
def test_a_package_of_any_number_of_steps_runs_without_this_package(tmp_path: Path) -> None:
    """For one size of the batch; of any Inductor fails, as it does at a mask."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed, which AOTInductor needs")
    model = MODELS["lengths"]()
    program = torch.export.export(model, (torch.randn(5, 4, I),), dynamic_shapes=({0: torch.export.Dim("steps")},))
    package = torch._inductor.aoti_compile_and_package(
        program.run_decompositions(export.decompositions("scan")), package_path=str(tmp_path / "model.pt2")
    )
    inputs = [torch.randn(steps, 4, I) for steps in (5, 20)]
    torch.save([(x, [out.detach() for out in model(x)]) for x in inputs], tmp_path / "calls.pt")
    command = [sys.executable, "-c", PACKAGED, package, str(tmp_path / "calls.pt")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "same", done.stderr


def test_another_loop_is_refused() -> None:
    with pytest.raises(ValueError, match=r"loop is 'unrolled' or 'scan'.* got: 'while'"):
        export.decompositions("while")


SOURCE = """
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>
#include <cstdio>

int main(int, char** arguments) {
  torch::NoGradGuard no_grad;
  torch::inductor::AOTIModelPackageLoader run(arguments[1]);
  auto y = run.run({torch::linspace(-1, 1, 5 * 2 * 3).view({5, 2, 3})})[0].contiguous();
  for (int i = 0; i < y.numel(); ++i) std::printf("%.9g ", y.data_ptr<float>()[i]);
}
"""


@pytest.mark.slow
def test_a_package_runs_in_cpp_and_without_this_package(tmp_path: Path) -> None:
    """One that AOTInductor makes of torch's operations alone."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed, which AOTInductor and the program in C++ need")
    model, x = MODELS["mask"](), torch.linspace(-1, 1, 5 * 2 * I).view(5, 2, I)
    package = torch._inductor.aoti_compile_and_package(decomposed(model), package_path=str(tmp_path / "model.pt2"))
    (tmp_path / "main.cpp").write_text(SOURCE)
    libraries = str(Path(torch.__file__).parent / "lib")
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    linked = [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(["g++", "-std=c++20", "main.cpp", "-o", "main", *includes, *linked], cwd=tmp_path, check=True)
    done = subprocess.run([tmp_path / "main", package], capture_output=True, text=True, check=True)
    y = torch.tensor([float(word) for word in done.stdout.split()]).view(5, 2, H)
    torch.testing.assert_close(y, model(x)[0].detach(), rtol=1e-5, atol=1e-5)
