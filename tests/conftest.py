# SPDX-License-Identifier: Apache-2.0
"""What every test shares: which process a test belongs to, and the reasons for which one is skipped."""

import fcntl
import functools
import importlib.util
import inspect
import json
import math
import os
import re
import secrets
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_rnn import cache, memo
from gpu_rnn.backends import rates
from gpu_rnn.backends.group import clusters, cubin, nvrtc
from gpu_rnn.backends.group import launch as group
from gpu_rnn.backends.native import launch as native
from gpu_rnn.backends.problem import Problem
from gpu_rnn.backends.rates import Rates
from gpu_rnn.diagnostics import tuning
from gpu_rnn.dispatch import choice, lines
from tests.support import native as native_tools

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it at import: one kind a process

WANTED = os.environ.get(
    "GPU_RNN_TESTS"
)  # "alone" or "others" of what measures time; all where tests are not run by __main__.py

BUILD = Path(__file__).resolve().parent.parent / "build"

KINDS = {"interpreter", "gpu", "alone"}  # of tests that runs of their own want, and only the files that name them

EXTRAS = {
    **dict.fromkeys(("expecttest", "hypothesis", "scipy", "onnx", "onnxruntime", "onnxscript"), "test"),
    **dict.fromkeys(("matplotlib", "tqdm"), "demo"),
    "keras": "keras",
    "mkdocs": "docs",
}
"""Packages that tests want besides ours, and how each is asked for."""


def marked(item: pytest.Item, *names: str) -> bool:
    return any(item.get_closest_marker(name) for name in names)


def pytest_configure() -> None:
    """What a developer tuned decides no test, and tests, which tune and forget, change nothing of the developer's."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")  # of those that run side by side
    os.environ["GPU_RNN_CACHE"] = str(BUILD / f"cache{worker}")
    BUILD.mkdir(exist_ok=True)
    os.environ.setdefault("GPU_RNN_FUZZ_SEED", str(secrets.randbelow(2**31)))  # one for all workers, which inherit it
    tuning.forget()
    native.cost = cost_where_wanted  # type: ignore[assignment]
    rates.cpu_model = lambda: "a processor that nobody measured"  # so that tests choose alike on each
    if INTERPRETING and importlib.util.find_spec("triton"):
        remember_builtins()


def pytest_unconfigure() -> None:
    """A run within this process, as tests/project/test_collection.py starts some, leaves the outer one's cost."""
    native.cost = _cost


NATIVE = os.environ.get("GPU_RNN_TEST_NATIVE") == "1"  # every test with what a CPU takes by itself
_native_by_itself, _cost = [NATIVE], native.cost


def cost_where_wanted(problem: Problem, constants: Rates | None = None) -> float:
    """On a CPU "auto" is ATen or the step loop, as it is without a C compiler: else each test would build the C of its
    layers first, which takes seconds. Tests of what is chosen take the fixture `native_by_itself`."""
    return _cost(problem, constants) if _native_by_itself[0] else math.inf


def remember_builtins() -> None:
    """Triton's interpreter looks through all of triton.language for what to replace, at each call within a kernel: a
    quarter of these tests' time. The names are always the same."""
    from triton import language
    from triton.runtime import interpreter

    @functools.cache
    def names(package: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if language.core.is_builtin(member)]

    def patch_builtin(package: Any, builder: Any, scope: Any) -> None:
        for name in names(package):
            if language.core.is_builtin(member := getattr(package, name)):  # and not replaced by a call further out
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin


def pytest_report_header() -> str:
    kind = f"interpreter tests {'only' if INTERPRETING else 'left out'} (TRITON_INTERPRET); make test runs both"
    seed = f"GPU_RNN_FUZZ_SEED={os.environ['GPU_RNN_FUZZ_SEED']}"
    return f"{kind}\nrandom calls (tests/call/test_random_calls.py): {seed}"


@functools.cache
def _text(path: Path) -> str:
    return path.read_text()


def _required(config: pytest.Config) -> set[str]:
    """The markers that every test wanted here has: those of `-m "gpu and not slow"`, but of no "or", and this process's
    kind."""
    expression = config.option.markexpr
    named = set() if re.search(r"\bor\b|[()]", expression) else {*expression.split(" and ")}
    kinds = {"interpreter": INTERPRETING, "alone": WANTED == "alone"}
    return named & KINDS | {name for name, only in kinds.items() if only}


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A file that names none of the markers which every test wanted here has is not worth importing."""
    if collection_path.suffix != ".py":
        return None
    return any(f"mark.{name}" not in _text(collection_path) for name in _required(config)) or None


def pytest_exception_interact(
    node: pytest.Item | pytest.Collector, call: pytest.CallInfo[Any], report: pytest.CollectReport | pytest.TestReport
) -> None:
    """A file that imports an extra which is not here is skipped with that reason, and ends nobody's run."""
    cause = call.excinfo.value.__cause__ if call.excinfo else None
    missing = cause.name if isinstance(cause, ModuleNotFoundError) else ""
    if isinstance(report, pytest.CollectReport) and missing in EXTRAS:
        report.outcome = "skipped"
        report.longrepr = (
            str(node.path),
            1,
            f"Skipped: {missing} is not installed: pip install 'gpu-rnn[{EXTRAS[missing]}]'",
        )


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    """Keep the tests that can run in this kind of process, and write down how many are left to each other kind."""
    _assert_markers_are_named(items)
    yield  # to -m and -k
    runs = [_run_of(item) for item in items]
    others = [item for item, run in zip(items, runs, strict=True) if run]
    if others:
        config.hook.pytest_deselected(items=others)
    # What is alone on a GPU waits for all workers: at the end it keeps nobody from work.
    items[:] = sorted((item for item, run in zip(items, runs, strict=True) if not run), key=_alone_on_a_gpu)
    # To tests/__main__.py; every worker collects the same. Runs that a test starts are not asked.
    if path := os.environ.pop("GPU_RNN_LEFT", None):
        scratch = Path(f"{path}.{os.getpid()}")
        scratch.write_text(json.dumps(Counter(filter(None, runs))))
        scratch.replace(path)


def _assert_markers_are_named(items: list[pytest.Item]) -> None:
    """`pytest_ignore_collect` reads the files: a marker that comes from another file would leave a test out unsaid."""
    for item in items:
        for name in KINDS & {mark.name for mark in item.iter_markers()}:
            if f"mark.{name}" not in _text(item.path):
                raise pytest.UsageError(f"{item.nodeid} has the marker {name} from another file: name it in its own")


def _run_of(item: pytest.Item) -> str:
    """The run of tests/__main__.py that a test belongs to, empty if it is this one."""
    if marked(item, "interpreter") != INTERPRETING:
        return "compiled" if INTERPRETING else "interpreter"
    when = "alone" if marked(item, "alone") else "others"
    return "" if WANTED in (None, when) else when


def _alone_on_a_gpu(item: pytest.Item) -> bool:
    gpu = item.get_closest_marker("gpu")
    return gpu is not None and (marked(item, "alone") or gpu.kwargs.get("alone", False))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """Processes share a GPU, whose driver lets one after another have all of it; what must have it alone locks the
    others out. So each builds its kernels, which takes most of the time, while the others build theirs."""
    if not (marked(item, "gpu") and torch.cuda.is_available()):
        return (yield)
    with (BUILD / "gpu.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX if _alone_on_a_gpu(item) else fcntl.LOCK_SH)
        return (yield)


def pytest_runtest_setup(item: pytest.Item) -> None:
    # Importing torch's own tests, whoever does it and when, forbids the whole process to set torch.backends' flags.
    torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True
    if marked(item, "gpu") and not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU: torch.cuda.is_available() is False")
    compilers = [(mark.args or ("triton",))[0] for mark in item.iter_markers("compile")]
    if (marked(item, "interpreter") or "triton" in compilers) and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed (it exists for Linux only)")
    if "nvrtc" in compilers and nvrtc.unavailable():
        pytest.skip(nvrtc.unavailable())


@pytest.fixture(autouse=True)
def nothing_tuned() -> Iterator[None]:
    """What a test tuned decides no other."""
    yield
    if any(cache.wanted().glob("tuned-*.json")):
        tuning.forget()


@pytest.fixture
def native_by_itself() -> Iterator[None]:
    """What dispatch chooses is chosen: on a CPU often the loop in C."""
    native_tools.any_compiler()
    memo.clear("gpu_rnn.dispatch")
    memo.clear("gpu_rnn.call")
    _native_by_itself[0] = True
    yield
    _native_by_itself[0] = NATIVE
    memo.clear("gpu_rnn.dispatch")
    memo.clear("gpu_rnn.call")


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Iterator[Path]:
    """An empty cache, and none of its choices for the next test."""
    monkeypatch.setenv("GPU_RNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GPU_RNN_BACKEND", raising=False)
    cache.folder.cache_clear()
    tuning.forget()
    yield tmp_path / "cache"
    cache.folder.cache_clear()
    tuning.forget()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """With more, the threads' waiting for each other on a busy machine is what is measured."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def with_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice on a described GPU does not depend on what is installed here."""
    monkeypatch.setattr(nvrtc, "unavailable", lambda: "")
    monkeypatch.setattr(group, "prepare", lambda problem: None)
    memo.clear("gpu_rnn.dispatch")


@pytest.fixture
def fresh_choices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Choices are cached; nothing that a test changes may reach another, nor the environment a test.

    CuPy is there for every test, and the kernels of described devices are not built.
    """
    monkeypatch.delenv("GPU_RNN_BACKEND", raising=False)
    monkeypatch.setattr(nvrtc, "unavailable", lambda: "")
    monkeypatch.setattr(nvrtc, "compile_cubin", lambda source, arch: b"")
    monkeypatch.setattr(cubin, "usage", lambda code: cubin.Usage(255, 0))
    monkeypatch.setattr(group, "_failures", {})
    monkeypatch.setattr(clusters, "_refused", {})
    caches = (choice._select, choice._candidates, choice._say_once, lines.way, group.fit)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.fixture
def uninitialised_memory_is_nan() -> Iterator[None]:
    """An element that nobody writes fails a comparison."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
