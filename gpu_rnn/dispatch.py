# SPDX-License-Identifier: Apache-2.0
"""The ordered table of backends, and the choice among them.

A backend is a module of `gpu_rnn.launch` that answers ``unsupported(problem) -> list[str]`` (empty: it can run) and
``cost(problem) -> seconds`` (a prediction until a results file is named beside its constants). One that compiles has
``prepare(problem)`` too: it is asked before it is taken, and what fails there is a reason of `unsupported` from then on.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from functools import lru_cache
from types import ModuleType

from gpu_rnn import devices
from gpu_rnn.launch import aten, group, plain, resident, step
from gpu_rnn.problem import Problem, rnn_precision

BACKENDS: dict[str, ModuleType] = {
    "resident": resident,
    "group": group,
    "aten": aten,
    "step": step,
    "reference": plain,
}
LOOPS = ("resident", "group", "step", "reference")
"""The backends that run one layer's time loop; the ATen row takes whole stacks."""

log = logging.getLogger("gpu_rnn")
device_of = devices.of


@dataclass(frozen=True)
class Row:
    """A backend's verdict on a problem."""

    backend: str
    runs: bool
    chosen: bool
    reasons: tuple[str, ...]
    predicted_us: float | None
    """Predicted microseconds per time step."""


def check_name(backend: str) -> None:
    """Raises ValueError for a backend that does not exist."""
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(BACKENDS)}, got {backend!r}")


def select(problem: Problem, backend: str = "auto", among: tuple[str, ...] = tuple(BACKENDS)) -> str:
    """The name of the cheapest backend that can run a problem, or of the one asked for.

    With "auto", the environment's GPU_RNN_BACKEND names a preference.

    Raises:
        ValueError: the backend asked for does not exist, or cannot run the problem; every reason is given.
    """
    return _select(problem, backend, among, os.environ.get("GPU_RNN_BACKEND", ""))


@lru_cache(maxsize=4096)
def _select(problem: Problem, backend: str, among: tuple[str, ...], preferred: str) -> str:
    check_name(backend)
    if backend != "auto":
        reasons = _prepared(problem, backend)
        if backend not in among:
            reasons = [f"this call runs one of {', '.join(among)}"]
        if reasons:
            listed = "\n".join(f"  - {reason}" for reason in reasons)
            raise ValueError(f"backend={backend!r} cannot run this call:\n{listed}\nUse backend='auto', or remove the cause.")
        return backend
    able = [name for name in among if not BACKENDS[name].unsupported(problem)]
    if preferred:
        if preferred not in BACKENDS:
            raise ValueError(f"GPU_RNN_BACKEND is {preferred!r} in the environment, not one of {', '.join(BACKENDS)}")
        if preferred in able and not _prepared(problem, preferred):
            return preferred
    able.sort(key=lambda name: _total_cost(problem, name))
    chosen = next(name for name in able if not _prepared(problem, name))
    if chosen == "reference":
        for name in among:
            for reason in BACKENDS[name].unsupported(problem):
                _say_once(problem.direction, problem.recurrence.name, name, reason)
    return chosen


def _prepared(problem: Problem, name: str) -> list[str]:
    """Why a backend that is about to be taken cannot run a problem after all."""
    module = BACKENDS[name]
    reasons = module.unsupported(problem)
    if not reasons and hasattr(module, "prepare"):
        module.prepare(problem)
        reasons = module.unsupported(problem)
    return list(reasons)


def _total_cost(problem: Problem, name: str) -> float:
    """Seconds for a call and, in training, for its backward pass, which may run on another loop than the forward."""
    cost = float(BACKENDS[name].cost(problem))
    if problem.direction != "training":
        return cost
    after = replace(problem, direction="backward")
    if name not in LOOPS:
        return cost + float(BACKENDS[name].cost(after))
    return cost + min(float(BACKENDS[n].cost(after)) for n in LOOPS if not BACKENDS[n].unsupported(after))


@lru_cache(maxsize=1024)
def _say_once(direction: str, cell: str, backend: str, reason: str) -> None:
    """Why a cell falls back to the time loop in PyTorch, once, whatever the number of steps or samples."""
    log.info("%s of %s: %s not used: %s", direction, cell, backend, reason)


def explain(problem: Problem, backend: str = "auto") -> list[Row]:
    """Every backend's verdict on a problem, in the order of the table; of training calls, both passes' time."""
    chosen = select(problem, backend) if backend == "auto" or not _prepared(problem, backend) else None
    verdicts = {name: tuple(module.unsupported(problem)) for name, module in BACKENDS.items()}
    rows = []
    for name, reasons in verdicts.items():
        runs = not reasons
        predicted = _total_cost(problem, name) * 1e6 / max(problem.T, 1) if runs else None
        if runs and problem.direction == "training" and name in LOOPS:
            against = BACKENDS[name].unsupported(replace(problem, direction="backward"))
            reasons = tuple(f"backward on another loop: {reason}" for reason in against)
        rows.append(Row(name, runs, name == chosen, reasons, predicted))
    return rows


def described(problem: Problem, name: str) -> Problem:
    """The same problem on a device described by name, such as "H100"."""
    device = devices.describe(name)
    if not device.is_gpu:
        return replace(problem, device=device, device_type="cpu", precision="ieee")
    return replace(problem, device=device, device_type="cuda", precision=rnn_precision())
