# SPDX-License-Identifier: Apache-2.0
"""What every test shares: which process a test belongs to, and the reasons for which one is skipped."""

import fcntl
import functools
import importlib.util
import inspect
import os
import secrets
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_rnn import cache, dispatch, tuning
from gpu_rnn.launch import group, nvrtc

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it at import: one kind a process

WANTED = os.environ.get("GPU_RNN_TESTS")  # "alone" or "others" of what measures time; all where tests are not run by __main__.py

BUILD = Path(__file__).resolve().parent.parent / "build"


def marked(item: pytest.Item, *names: str) -> bool:
    return any(item.get_closest_marker(name) for name in names)


def pytest_configure() -> None:
    """What a developer tuned decides no test, and tests, which tune and forget, change nothing of the developer's."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")  # of those that run side by side
    os.environ["GPU_RNN_CACHE"] = str(BUILD / f"cache{worker}")
    BUILD.mkdir(exist_ok=True)
    os.environ.setdefault("GPU_RNN_FUZZ_SEED", str(secrets.randbelow(2**31)))  # one for all workers, which inherit it
    tuning.forget()
    if INTERPRETING and importlib.util.find_spec("triton"):
        remember_builtins()


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
    return f"{kind}\nrandom calls (tests/test_fuzz.py): GPU_RNN_FUZZ_SEED={os.environ['GPU_RNN_FUZZ_SEED']}"


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """A file without the interpreter's tests, or without such as measure time, is not worth importing there."""
    wanted = "mark.interpreter" if INTERPRETING else "mark.alone" if WANTED == "alone" else ""
    without = wanted and collection_path.suffix == ".py" and wanted not in collection_path.read_text()
    return bool(without) or None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests that can run in this kind of process."""

    def belongs(item: pytest.Item) -> bool:
        when = WANTED in (None, "alone" if marked(item, "alone") else "others")
        return when and marked(item, "interpreter") == INTERPRETING

    config.hook.pytest_deselected(items=[item for item in items if not belongs(item)])
    items[:] = [item for item in items if belongs(item)]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """One test at a time on a GPU: the workers' kernels would take turns, and a group's blocks wait for each other."""
    if not (marked(item, "gpu") and torch.cuda.is_available()):
        return (yield)
    with (BUILD / "gpu.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        return (yield)


def pytest_runtest_setup(item: pytest.Item) -> None:
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
    dispatch._forget_answers()
