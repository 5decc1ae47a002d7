# SPDX-License-Identifier: Apache-2.0
"""What the package takes of torch that torch does not promise: one table, and each name is in the installed torch.

Whoever tries a new torch runs this file first. A name that is not in the table is a decision: say why no public one
will do.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.paths import ROOT

PACKAGE = ROOT / "gpu_rnn"

RUNS = "whether a transform of torch.func, forward AD or a mode that records runs in this thread"
QUIET = "a trace that takes no part in what runs around it, and changes nothing of the process"
CALLS = "the functions behind torch.nn's layers and cells, without their modules"
ONNX_GRAPHS = "nodes that hold a graph, as torch's own Scan and If; what torch promises takes none"

# Of each name what for; where it is used, a search says.
PRIVATE: dict[str, str] = {
    "torch._C._is_any_autocast_enabled": "one question for all devices, asked at each call",
    "torch.nn.Module._replicate_for_data_parallel": "RNNBase's own looks for a list of flat weights",
    "torch._C.DispatchKey.Python": "whether a tensor is a subclass with a __torch_dispatch__",
    "torch._C._dispatch_keys": "likewise",
    "torch._subclasses.FakeTensor": "whether a tensor has no numbers",
    "torch._C._TorchDispatchModeKey": RUNS,
    "torch._C._get_dispatch_mode": RUNS,
    "torch._C._get_tracing_state": RUNS,
    "torch._C._len_torch_dispatch_stack": RUNS,
    "torch._ops._len_torch_dispatch_stack_pre_dispatch": RUNS,
    "torch._C._functorch.TransformType": RUNS,
    "torch._C._functorch.get_interpreter_stack": RUNS,
    "torch._C._functorch.is_functorch_wrapped_tensor": "whether a transform that has ended still wraps a tensor",
    "torch._C._functorch.unwrap_if_dead": "the tensor below a transform that has ended, as Function.apply takes it",
    "torch._C._are_functorch_transforms_active": RUNS,
    "torch.autograd.forward_ad._current_level": RUNS,
    "torch._C._dynamo.eval_frame.get_eval_frame_callback": "whether Dynamo will look into the frames of a call",
    "torch.compiler._is_exporting_flag": RUNS,
    "torch.autograd._profiler_enabled": "whether a profiler wants to be told of passes by name",
    "torch._C._functorch.is_legacy_batchedtensor": "whether gradients are batched, as is_grads_batched makes them",
    "torch._is_zerotensor": "whether a tensor is of zeros that lie nowhere, as a gradient may be",
    "torch._C._autograd._get_current_graph_task_keep_graph": "whether backward was called with retain_graph",
    "torch._VF": CALLS,
    "torch._cudnn_rnn": "cuDNN with its buffer of weights, which torch.nn's layers alone keep",
    "torch._cudnn_rnn_flatten_weight": "that buffer",
    "torch._foreach_copy_": "all weights into it with few launches",
    "torch._C._cuda_hasPrimaryContext": "whether a device is in use, without using it; only in builds with CUDA",
    "torch._C._get_fp32_precision_getter": "fp32 precision of one operation, which torch.backends has not for all",
    "torch._C._set_fp32_precision_setter": "likewise",
    "torch.utils._python_dispatch._disable_current_modes": "weights that are laid out once, seen by no mode",
    "torch._C._set_tracing_state": QUIET,
    "torch._C._len_torch_function_stack": QUIET,
    "torch._functorch.pyfunctorch.temporarily_clear_interpreter_stack": QUIET,
    "torch.overrides._pop_mode": QUIET,
    "torch.overrides._push_mode": QUIET,
    "torch.utils._python_dispatch.TorchDispatchMode": "what a step does, operation by operation",
    "torch.utils._python_dispatch._pop_mode": QUIET,
    "torch.utils._python_dispatch._push_mode": QUIET,
    "torch.onnx._internal.exporter._core": ONNX_GRAPHS,
    "torch.onnx._internal.exporter._torchlib._torchlib_registry.onnx_impl": "so that an export needs no table of ours",
    "torch.onnx._internal.exporter._torchlib.ops.hop.call_op": ONNX_GRAPHS,
    "torch._C._SetExcludeDispatchKeyGuard": "autograd below an operation of ours, whose derivative is an eager call's",
    "torch._C._dispatch_tls_is_dispatch_key_excluded": "whether it is turned off there",
    "torch._C.DispatchKey.AutogradFunctionality": "what it is turned off by",
    "torch._C.DispatchKey.ADInplaceOrView": "likewise",
    "torch._decomp.core_aten_decompositions": "torch's own formulas of its activations",
}
NEEDS_CUDA = "torch._C._cuda_hasPrimaryContext"


def is_private(name: str) -> bool:
    return name.startswith("torch.") and any(part[0] == "_" and part[:2] != "__" for part in name.split("."))


def imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Of each import the name that the file gives it, and its full one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.asname or alias.name.split(".")[0], alias.name if alias.asname else alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)


def dotted(node: ast.AST) -> str:
    """``a.b.c`` of the expression that says it, else nothing."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}" if dotted(node.value) else ""
    return node.id if isinstance(node, ast.Name) else ""


def names(path: Path) -> set[str]:
    """The private names of torch in a file."""
    tree = ast.parse(path.read_text())
    known = dict(imported(tree))
    used = {dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    full = {".".join([known.get(root, root), *rest]) for root, *rest in (name.split(".") for name in used)}
    return {name for name in full | set(known.values()) if is_private(name)}


def uses() -> dict[str, set[str]]:
    """Of each private name the files that have it."""
    files: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for name in names(path):
            files.setdefault(name, set()).add(str(path.relative_to(PACKAGE)))
    return files


def is_within(name: str, other: str) -> bool:
    return f"{name}.".startswith(f"{other}.")


def test_the_table_has_every_private_name() -> None:
    """A listed name stands for what is looked up in it, and for the modules on the way to it."""
    missing = {
        f"{name} in {', '.join(sorted(files))}"
        for name, files in uses().items()
        if not any(is_within(name, listed) or is_within(listed, name) for listed in PRIVATE)
    }
    assert not missing


def test_the_table_has_no_other() -> None:
    used = uses()
    assert not {listed for listed in PRIVATE if not any(is_within(name, listed) for name in used)}


@pytest.mark.parametrize("name", sorted(PRIVATE))
def test_this_torch_has(name: str) -> None:
    if name == NEEDS_CUDA and not torch.backends.cuda.is_built():
        pytest.skip(f"{name} is in builds of torch with CUDA, and this one is without")
    if name.startswith("torch.onnx"):
        pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install '.[onnx]'")
    parts = name.split(".")
    value: object = torch
    for count, part in enumerate(parts[1:], 2):
        if not hasattr(value, part):
            importlib.import_module(".".join(parts[:count]))
        value = getattr(value, part)
