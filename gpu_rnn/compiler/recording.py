# SPDX-License-Identifier: Apache-2.0
"""What a step does with scalars, operation by operation, as torch's dispatcher meets it in the thread that calls the
step.

torch's own tracer, make_fx, patches the process while it runs: compiled models of other threads fail meanwhile. The
modes here stand on stacks that each thread has for itself, and nothing else changes.
"""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.overrides import TorchFunctionMode
from torch.overrides import _pop_mode as _pop_function_mode
from torch.overrides import _push_mode as _push_function_mode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _pop_mode, _push_mode

from gpu_rnn.compiler.lowering import KEPT
from gpu_rnn.memo import memoize

LIBRARY = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
LONGEST_LINE = 100  # characters of a line that an error shows
MOST_NODES = 10_000  # a loop in a step ends here; a program may have far fewer operations

BRANCHES = (
    "branches on a value or takes a number out of a tensor, as NumPy and math do; "
    "use torch.where, so that every unit takes its own branch, and torch's functions"
)

# What would take numbers out of a step's values past the dispatcher.
_NUMBERS: set[Any] = {Tensor.numpy, Tensor.__array__, Tensor.tolist}
_SHOWN: set[Any] = {Tensor.__repr__, Tensor.__format__}
_OF_SHAPE = ("size", "stride", "storage_offset", "device")
_DATA: Any = Tensor.data.__get__  # type: ignore[attr-defined]


class Refused(ValueError):
    """What a step may not do, in words that stand after the line that does it."""


@dataclass(eq=False)
class Node:
    """A value: an argument of the step by its name, the result of an operation, or a tensor that comes from
    elsewhere."""

    operation: Any  # torch's overload; "input", "constant"
    args: Sequence[Any] = ()
    kwargs: dict[str, Any] | None = None
    frame: tuple[str, int] | None = None

    @property
    def line(self) -> str:
        """Where it came from in the user's code, with that line."""
        return show(*self.frame) if self.frame else ""


def show(filename: str, number: int | None) -> str:
    """A place in the source as errors name it."""
    text = linecache.getline(filename, number or 0).strip()
    text = text if len(text) <= LONGEST_LINE else text[: LONGEST_LINE - 1] + "…"
    return f"{Path(filename).name}:{number}" + (f" `{text}`" if text else "")


def record(function: Callable[..., Any], names: Sequence[str]) -> tuple[list[Node], tuple[Any, ...]]:
    """Calls a function of scalars, one for each name.

    Returns:
        The nodes in their order, the named ones first, and the function's results: nodes, or whatever it returned else.
    """
    from torch.func import functionalize

    with _undisturbed():
        recorder = _Hidden() if "torch._dynamo" in sys.modules else _Recorder()
        inputs = [torch.tensor(0.25 + 0.01 * n, dtype=torch.float64, device="cpu") for n in range(len(names))]
        for tensor, name in zip(inputs, names, strict=True):
            recorder.note(Node("input", (name,)), tensor)

        def watched(*scalars: Tensor) -> tuple[Any, ...]:
            with _Watch(recorder):
                result = function(*(scalar.clone() for scalar in scalars))  # a step may work on its arguments in place
            return tuple(result) if isinstance(result, (tuple, list)) else (result,)

        with recorder:
            results = functionalize(watched)(*inputs)
        return recorder.nodes, tuple(recorder.known(result) for result in results)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """A cell may meet its first call inside a torch.func transform, a tracer, fake tensors or inference_mode: its own
    trace takes no part in them. (A thread of its own would do the same, but a second one crashes fake tensors in CUDA
    builds of torch 2.11 on a machine without a GPU.)"""
    traced = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    # torch.export's mode writes down each change of grad mode and of autocast, those below too.
    modes = [_pop_function_mode() for _ in range(torch._C._len_torch_function_stack())]
    try:
        with (
            temporarily_clear_interpreter_stack(),
            _disable_current_modes(),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
        ):
            yield
    finally:
        for mode in reversed(modes):
            _push_function_mode(mode)
        torch._C._set_tracing_state(traced)  # type: ignore[attr-defined]


@memoize(None)
def _decompositions() -> dict[Any, Callable[..., Any]]:
    """torch's rules, which take as long to gather as the rest of a trace."""
    from torch._decomp import core_aten_decompositions

    return {op: rule for op, rule in core_aten_decompositions().items() if op._opname not in KEPT}


class _Recorder(TorchDispatchMode):
    """Notes each operation that torch's decompositions leave. All floating values are float64, so that torch's default
    dtype, which is one for all threads, plays no part."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self.frame: tuple[str, int] | None = None
        self._of: dict[int, tuple[Tensor, Node]] = {}  # by identity, with the tensor, so that no other takes its place

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise the first operation imports Dynamo

    def __enter__(self) -> _Recorder:
        _push_mode(self)  # the base class also sets flags of the whole process
        return self

    def __exit__(self, *error: Any) -> None:
        _pop_mode()

    def note(self, node: Node, *tensors: Tensor) -> None:
        """A node of one result, or of several."""
        self.nodes.append(node)
        if len(self.nodes) > MOST_NODES:
            raise Refused(f"does more than {MOST_NODES} operations; a step is a formula of a few hundred at most")
        self._of.update({id(tensor): (tensor, node) for tensor in tensors})

    def known(self, value: Any) -> Any:
        """The node of a tensor; what is no tensor as it is."""
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._of:
            self.note(Node("constant", frame=self.frame), value)
        return self._of[id(value)][1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for rule in (_decompositions().get(func), func.decompose):
            if rule is None or func._opname in _OF_SHAPE:
                continue
            with self:
                result = rule(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return self._run(func, args, kwargs)

    def _run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if torch.Tag.data_dependent_output in func.tags:
            raise Refused(BRANCHES)
        inputs = [self.known(arg) for arg in args], {name: self.known(value) for name, value in kwargs.items()}
        if not any(isinstance(arg, Tensor) for arg in args):  # a new tensor
            kwargs = kwargs | {"device": "cpu"} if "device" in kwargs else kwargs
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.is_floating_point():
            result = result.double()
        results = result if isinstance(result, (tuple, list)) else (result,)
        self.note(Node(func, *inputs, self.frame), *(each for each in results if isinstance(each, Tensor)))
        return result


class _Hidden(_Recorder):
    """The same where Dynamo is loaded, which looks into what runs within a compiled function that a step calls."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_dispatch__(func, types, args, kwargs)


class _Watch(TorchFunctionMode):
    """Tells the recorder the innermost line outside torch that calls for an operation; refuses what it would not
    see."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        frame = sys._getframe(1)
        while frame.f_back is not None and (
            frame.f_code.co_filename.startswith((LIBRARY[0], __file__)) or frame.f_code.co_name == "__torch_function__"
        ):  # a mode inside this one calls for what somebody else called it for
            frame = frame.f_back
        self.recorder.frame = frame.f_code.co_filename, frame.f_lineno
        if not torch.is_grad_enabled() or func == _DATA:
            raise Refused("no_grad and .data stop gradients, and those flow through every value of a recurrence")
        if func in _NUMBERS:
            raise Refused(BRANCHES)
        if func in _SHOWN:
            return "<a value of a step, which is recorded once, without numbers>"
        return func(*args, **(kwargs or {}))
