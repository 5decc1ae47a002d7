# SPDX-License-Identifier: Apache-2.0
"""Whether Triton can build a backend's kernels on the devices at hand, found out before the backend is taken.

Triton compiles when a kernel is launched first, and then needs a C compiler, a folder to write to, and a ptxas that
knows the device. Here the launcher's own launches are compiled and loaded with tensors that have no memory; the call
that follows finds what it needs.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpu_rnn import devices, memo
from gpu_rnn.backends import triton_interpreter
from gpu_rnn.backends.problem import Problem
from gpu_rnn.backends.tensors import CONTROL_AXES, Call, LayerControls, Result, Weights
from gpu_rnn.memo import memoize

EMPTY = ".version 8.0\n.target sm_80\n.address_size 64\n"  # a text in PTX, of which ptxas makes code for any device
PTXAS_SECONDS = 120.0  # to say whether it makes code of that: a fraction of one, but for a machine that is busy


class TritonLaunch(NamedTuple):
    """A Triton kernel with all its arguments: what is built beforehand is exactly what runs."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    def __call__(self, like: Tensor) -> None:
        """Runs it on the current stream of the device of `like`."""
        if 0 in self.grid:
            return
        with torch.cuda.device_of(like), triton_interpreter.arithmetic():
            self.kernel[self.grid](**self.arguments)


class Relaunch:
    """A launch that is made again and again with other tensors, each as large and as well aligned: what the kernel was
    compiled for is looked up at the first."""

    def __init__(self, launch: TritonLaunch) -> None:
        """`launch` has all arguments but those."""
        self.launch, self.nothing = launch, 0 in launch.grid
        self.ready: tuple[Any, Any, list[Any], dict[str, int]] | None = None  # in one, as other threads may be here

    def __call__(self, like: Tensor, tensors: dict[str, Any]) -> None:
        """Runs it on the current stream of the device of `like`; each call gives tensors to the same arguments."""
        if self.nothing:
            return None
        if like.is_cuda and torch.cuda.current_device() != like.device.index:
            with torch.cuda.device_of(like):
                return self(like, tensors)
        if self.ready is None:
            return self._first(tensors)
        run, stream, others, places = self.ready
        values = others.copy()
        for name, value in tensors.items():
            values[places[name]] = value
        run(*values, stream=stream(like.device.index))
        return None

    def _first(self, tensors: dict[str, Any]) -> None:
        kernel, grid, arguments = self.launch
        with triton_interpreter.arithmetic():
            compiled = kernel[grid](**arguments | tensors)
        if compiled is not None:  # by the interpreter it is
            from triton.runtime.driver import driver

            names = [name for name in kernel.arg_names if name in arguments or name in tensors]
            places = {name: place for place, name in enumerate(names)}
            others = [arguments.get(name) for name in names]
            self.ready = compiled[(*grid, 1)], driver.active.get_current_stream, others, places


class Example(NamedTuple):
    """A problem's tensors, all without memory: what it is called with, its pre-activations, what its forward pass
    gives."""

    call: Call
    gates: Tensor
    saved: Result


def example(problem: Problem) -> Example:
    """Every option of a problem; reset values are given for each step with recurrent dropout, else once."""

    def empty(*shape: int, dtype: torch.dtype = problem.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    program, steps, batch, n, hidden = problem.program, problem.T, problem.B, problem.N, problem.H
    gates, width = len(program.gates), problem.proj_size or hidden
    weights = Weights(
        empty(n, gates, hidden, problem.I),
        empty(n, gates, hidden, width),
        empty(n, gates, hidden) if problem.bias else None,
        empty(n, gates, hidden) if problem.bias else None,
        empty(n, len(program.params), hidden) if program.params else None,
        empty(n, width, hidden) if problem.proj_size else None,
        empty(n, gates, hidden) if problem.norm else None,
    )
    states = [empty(batch, n, hidden if k else width) for k, _ in enumerate(program.states)]
    sizes = {"T": steps, "B": batch, "N": n, "M": n, "H": hidden, "P": width, "S": len(states), "1|G": problem.drop}
    controls = {}
    for name, axes in CONTROL_AXES.items():
        if problem.controls.get(name):
            dtype = axes.dtype if isinstance(axes.dtype, torch.dtype) else problem.dtype
            controls[name] = empty(*(sizes[axis] for axis in axes.axes.split()), dtype=dtype)
    values = [empty(steps if problem.drop else 1, *state.shape) for state in states if problem.reset_values]
    inner = empty(len(states) - 1, steps, batch, n, hidden, dtype=torch.float32)
    recurrent = empty(steps, batch, n, len(program.split), hidden)
    projected = empty(steps, batch, n, gates, hidden)
    saved = Result(empty(steps, *states[0].shape), states, projected, recurrent, inner)
    call = Call(program, weights, states, LayerControls(**controls), values, problem.reverse, problem, rms=problem.rms)
    return Example(call, projected, saved)


class Builds:
    """What became of a backend's kernels, by problem."""

    def __init__(self, launches: Callable[[Problem], Iterable[TritonLaunch]]) -> None:
        self._launches = launches
        name, stays = f"{launches.__module__}: failures", "`reasons` is asked after `prepare`, in whatever thread"
        self._failures: dict[Problem, str] = memo.hold(name, {}, None, stays=stays)
        self._failure = memoize(1024, stays=stays, name=f"{launches.__module__}: builds")(self._built)

    def prepare(self, problem: Problem) -> None:
        """Builds the kernels of a problem that is supported so far; where that fails, `reasons` has one from then
        on."""
        if triton_interpreter.INTERPRETING or find_spec("triton") is None:
            return
        alike = _alike(problem)
        failures = [self._failure(alike, device) for device in devices.at_hand(problem.device)]
        if any(failures):
            self._failures[alike] = next(filter(None, failures))

    def reasons(self, problem: Problem) -> list[str]:
        """Why the kernels of a problem cannot run, as far as `prepare` was asked for them."""
        if not self._failures:
            return []
        failure = self._failures.get(_alike(problem))
        return [] if failure is None else [failure]

    def _built(self, problem: Problem, device: torch.device) -> str:
        """Why the kernels cannot be built or loaded on a device; empty where they are."""
        from triton.errors import TritonError

        try:
            with torch.cuda.device(-1 if device.index is None else device.index), torch.inference_mode(False):
                self._build(problem)
        except (TritonError, RuntimeError, OSError, subprocess.SubprocessError, ImportError, AssertionError) as error:
            return _words(error)
        return ""

    def _build(self, problem: Problem) -> None:
        """On the current device."""
        from triton.runtime.driver import driver

        target = driver.active.get_current_target()
        if target.backend == "cuda" and ptxas_refusal(target.arch):
            raise RuntimeError(ptxas_refusal(target.arch))
        for launch in self._launches(problem):
            compiled = launch.kernel.warmup(grid=launch.grid, **launch.arguments)
            compiled.run  # noqa: B018  # builds the launcher and loads the machine code


@memoize(16)
def ptxas_refusal(arch: int) -> str:
    """Why Triton's ptxas builds nothing for an architecture, such as 90; empty where it does.

    It is asked before Triton compiles: LLVM ends the process where it is to build for what it does not know.
    """
    from triton.backends.nvidia import compiler

    command = [
        compiler.get_ptxas(arch).path,
        "--gpu-name",
        compiler.sm_arch_from_capability(arch),
        "-",
        "-o",
        os.devnull,
    ]
    done = subprocess.run(command, input=EMPTY, capture_output=True, text=True, timeout=PTXAS_SECONDS, check=False)
    return done.stderr.strip() if done.returncode else ""


def _words(error: BaseException) -> str:
    said = str(error).strip() or type(error).__name__
    if isinstance(error, OSError):
        said += " (Triton writes to TRITON_CACHE_DIR, else ~/.triton, and runs the compiler that CC names)"
    return f"Triton cannot build its kernel here: {said[:1000]}; `gpu-rnn doctor` shows what Triton needs"


def _alike(problem: Problem) -> Problem:
    """The same for all B and for all T but one step, which Triton builds no kernel of its own for."""
    return problem.but(T=min(problem.T, 2), B=2)
