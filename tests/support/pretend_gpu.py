# SPDX-License-Identifier: Apache-2.0
"""Tensors that say they are on a GPU, compute on the CPU, and write down whatever would make the host wait for a GPU.

To PyTorch's C++ they are on the CPU, so that autograd asks for no streams. No kernel of ours runs: tests replace
launches.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")
# Their results' sizes or values are read by the host.
ASKING = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
)


class OnGPU(torch.Tensor):
    held: torch.Tensor
    device, is_cuda, is_cpu = GPU, True, False  # type: ignore[assignment]  # what Python code sees

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Any:
        sizes = held.shape, held.stride(), held.storage_offset()
        return torch.Tensor._make_wrapper_subclass(cls, *sizes, dtype=held.dtype)  # type: ignore[attr-defined]

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnGPU({tuple(self.shape)}, {self.dtype})"

    def cpu(self, *args: Any) -> Any:  # to C++ there is nothing to do
        raise AssertionError("waits for the device")

    tolist = numpy = cpu  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError("outside of pretend_gpu.pretend")


class Pretend(TorchDispatchMode):
    """Runs everything on the CPU; `waits` is what would have waited."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, OnGPU)]
        name, target = function.overloadpacket.__name__, kwargs.get("device")
        if given and name.startswith("new_"):  # autograd asks for those on what C++ takes for the device
            target = GPU
        if self._waits(name, given, args, kwargs):
            self.waits.append(str(function))
        if kwargs.get("device") is not None:
            kwargs["device"] = CPU
        args, kwargs = tree_map(lambda value: value.held if isinstance(value, OnGPU) else value, (args, kwargs))
        found = function(*args, **kwargs)
        if not (given if target is None else torch.device(target).type == "cuda"):
            return found
        same = {id(value.held): value for value in given}

        def on_gpu(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            return same[id(value)] if id(value) in same else OnGPU(value)

        return tree_map(on_gpu, found)

    @staticmethod
    def _waits(name: str, given: list[OnGPU], args: Any, kwargs: dict[str, Any]) -> bool:
        if name in ASKING or (name == "repeat_interleave" and len(args) == 1):
            return bool(given)
        if name in ("index", "index_put", "index_put_"):
            return any(isinstance(value, OnGPU) and value.dtype in (torch.bool, torch.uint8) for value in args[1])
        if name == "copy_":
            target, source, *_ = args
            crosses = isinstance(target, OnGPU) != isinstance(source, OnGPU)
        elif name == "_to_copy":
            (source,), target = args, kwargs.get("device")
            crosses = target is not None and isinstance(source, OnGPU) != (torch.device(target).type == "cuda")
        else:
            return False
        locked = getattr(source, "locked", False) and kwargs.get("non_blocking", False)
        return crosses and source.dim() > 0 and not locked


def lock(tensor: torch.Tensor) -> torch.Tensor:
    """In the place of Tensor.pin_memory."""
    tensor = tensor.clone()
    tensor.locked = True  # type: ignore[attr-defined]
    return tensor


def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of torch.cuda that the package uses asks for a device; then tensors compute within `Pretend()`."""
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lock)


def move(layer: torch.nn.Module) -> torch.nn.Module:
    """The layer with its weights on the GPU."""
    for module in layer.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = OnGPU(parameter.detach()).requires_grad_()  # type: ignore[assignment]
    return layer
