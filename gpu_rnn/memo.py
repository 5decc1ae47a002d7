# SPDX-License-Identifier: Apache-2.0
"""The register of what a process keeps in memory from call to call: answers of functions, CUDA graphs, their buffers.

Files of one process for the next are cache.py's. A test finds everything that is kept and fails on what is not entered
here, so each has a bound, and whoever must forget one answer knows all that follow from it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import _lru_cache_wrapper, lru_cache
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
Container = TypeVar("Container", bound=Any)


class Store(NamedTuple):
    """What is kept in one place."""

    name: str
    holder: Any  # the function with its answers, or the container
    bound: int | None  # entries; None where something else bounds them
    clear: Callable[[], object]
    stays: str  # why `clear_caches` leaves it; empty where it does not


_stores: dict[str, Store] = {}
ABSENT: Any = object()  # what is looked up where there is no answer, and None is one


class Age:
    """How often something was cleared: what an object keeps by itself holds for one age."""

    now = 0


def memoize(
    bound: int | None, *, stays: str = "", name: str = ""
) -> Callable[[Callable[..., T]], _lru_cache_wrapper[T]]:
    """`functools.lru_cache(maxsize=bound)`, registered as a `name`, by default the function's own."""

    def decorated(function: Callable[..., T]) -> _lru_cache_wrapper[T]:
        answers = lru_cache(maxsize=bound)(function)
        entry = name or f"{function.__module__}.{function.__qualname__}"
        _stores[entry] = Store(entry, answers, bound, answers.cache_clear, stays)
        return answers

    return decorated


def hold(
    name: str,
    container: Container,
    bound: int | None,
    *,
    stays: str = "",
    alone: AbstractContextManager[Any] = nullcontext(),  # noqa: B008  # it has no state
) -> Container:
    """The container, registered; it is cleared inside `alone`, a lock of those that use it."""

    def clear() -> None:
        with alone:
            container.clear()

    _stores[name] = Store(name, container, bound, clear, stays)
    return container


def put(container: dict[Any, Any], key: Any, value: T, bound: int) -> T:
    """Enters a value, which it returns; a container that is full forgets all others first. Look up by one
    ``get(key, ABSENT)``: another thread may clear what is kept."""
    if len(container) >= bound:
        container.clear()
    container[key] = value
    return value


def stores() -> list[Store]:
    """All that are registered by the modules imported so far."""
    return list(_stores.values())


def clear(within: str = "gpu_rnn") -> None:
    """Clears what modules keep whose name begins so, but for what stays."""
    Age.now += 1
    for store in stores():
        if not store.stays and store.name.startswith(within):
            store.clear()


def clear_caches() -> None:
    """Frees what this process keeps in memory between calls: CUDA graphs of the step loop and their buffers (up to 1
    GiB and one shape's more), and every remembered answer, such as which backend is chosen and traced programs.

    The next call of a layer computes the same, and takes as long as a first one: graphs are captured again. Memory on
    a GPU goes back to PyTorch's allocator; ``torch.cuda.empty_cache()`` then gives it to other programs. Any thread
    may call this at any time; it waits until another thread's step loop has been launched.

    What stays: files in the cache folder and what `gpu_rnn.tune` measured (`gpu_rnn.tuning.forget` removes that);
    loaded kernels, which a graph of your own may launch, and up to 16 MiB in fp32 that each loop in C, one for a cell
    and direction, leaves for its next call; cuBLAS's workspace for each stream that replayed a graph.

    Example::

        >>> import gpu_rnn
        >>> gpu_rnn.clear_caches()
    """
    clear()
