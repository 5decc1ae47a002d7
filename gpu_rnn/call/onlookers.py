# SPDX-License-Identifier: Apache-2.0
"""Who looks on while a layer runs: what records or replaces torch's operations gets the registered ones of
`gpu_rnn.call.custom_ops`.

A loop writes where no recorder looks: a kernel's launch, NumPy's functions.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import get_interpreter_stack
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch._subclasses import FakeTensor
from torch.fx import Proxy

from gpu_rnn.call import transforms

PLAIN_TYPES = frozenset((Tensor, nn.Parameter, type(None)))
# Of torch's own dispatch modes those that work with sizes alone, or record: FakeTensorMode, make_fx, AOTAutograd.
_Key = torch._C._TorchDispatchModeKey
_RECORDERS = (_Key.FAKE, _Key.PROXY, _Key.FUNCTIONAL)

# torch.jit.trace warns of every size that a check compares. torch says nothing of those in its own modules; nor do we.
warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module=r"gpu_rnn(\.|$)")


def recorded(x: Any = None) -> bool:
    """Whether a call is recorded, to run later with other values, or has no values at all: no question may be asked of
    them, and sizes may be symbols. torch.compile and torch.export, make_fx, functionalize, torch.jit.trace,
    FakeTensorMode.
    """
    if torch.compiler.is_compiling():  # the first question, and Dynamo reads no further
        return True
    if torch._C._len_torch_dispatch_stack() and _any_mode(_RECORDERS):
        return True
    if torch._C._get_tracing_state() is not None or isinstance(x, FakeTensor):
        return True
    return get_interpreter_stack() is not None and transforms.functionalizes()


def without_values(x: Any) -> bool:
    """Whether there are sizes alone, which may be symbols: FakeTensorMode, or a tensor that one made."""
    return isinstance(x, FakeTensor) or _any_mode(_RECORDERS[:1])


def _any_mode(keys: Iterable[_Key]) -> bool:
    if not torch._C._len_torch_dispatch_stack():
        return False
    return any(torch._C._get_dispatch_mode(key) is not None for key in keys)


def watched(tensors: Sequence[Tensor | None]) -> bool:
    """Whether operations on these tensors, which are below all of torch.func's transforms, are seen by somebody: a
    dispatch mode of any kind, such as one that counts or keeps, or a tensor that is a class of its own."""
    if torch._C._len_torch_dispatch_stack() or _len_torch_dispatch_stack_pre_dispatch():
        return True
    if PLAIN_TYPES.issuperset(map(type, tensors)):  # asked some times in a call, and no frame for each tensor
        return False
    return any(type(t) not in PLAIN_TYPES and _dispatches(t) for t in tensors)


def _dispatches(tensor: Any) -> bool:
    return bool(torch._C._dispatch_keys(tensor).has(torch._C.DispatchKey.Python))


def traced() -> bool:
    """Whether torch.jit.trace or the ONNX exporter that builds on it records."""
    return torch._C._get_tracing_state() is not None


def writes_onnx() -> bool:
    """Whether torch.onnx.export(dynamo=True) records. (Dynamo, which it asks where all else failed, takes the answer to
    be no.)"""
    return torch.onnx.is_in_onnx_export() and not traced()


def check_draws(layer: str) -> None:
    """Warns where torch.onnx.export records a layer that draws at random: it keeps what is drawn as constants, and
    leaves out torch's dropout."""
    if torch.onnx.is_in_onnx_export():
        warnings.warn(
            f"{layer} is in training mode: an ONNX file would hold what it draws at random now, for ever. "
            "Call model.eval() before torch.onnx.export",
            stacklevel=2,
        )


def check_translated() -> None:
    """Raises RuntimeError where torch.onnx.export records, and nobody has taught it the layers."""
    if torch.onnx.is_in_onnx_export() and "gpu_rnn.onnx" not in sys.modules:
        raise RuntimeError(
            "torch.onnx.export knows the layers after `import gpu_rnn.onnx`: import it first, and export again"
        )


def refuse_tangents() -> None:
    """Raises RuntimeError where forward-mode derivatives are taken: a custom op's tangent would be 0 without a word."""
    if torch.autograd.forward_ad._current_level >= 0:
        raise RuntimeError(
            "torch.export and torch.jit.trace take no forward-mode derivative of a layer: take it of the layer itself"
        )


def leaf(module: nn.Module, input: Proxy, *args: Any, **kwargs: Any) -> Proxy:
    """A call of a module as one operation: torch.fx.symbolic_trace takes torch.nn's own modules alone for that.

    Raises:
        TypeError: the module is all that is traced, so that no name leads to it.
    """
    path = input.tracer.path_of_module(module)  # type: ignore[attr-defined]
    if not path:
        raise TypeError(
            f"torch.fx.symbolic_trace keeps a {type(module).__name__} as one operation of the model around it: trace "
            "torch.nn.Sequential(layer), or use torch.export.export"
        )
    given = {name: value for name, value in kwargs.items() if value is not None and value is not False}
    return input.tracer.create_proxy("call_module", path, (input, *args), given)
