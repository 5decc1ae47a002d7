# SPDX-License-Identifier: Apache-2.0
"""After a fork: of all threads, a child has only the one that forked, so what another held stays locked for ever."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


def renewed(make: Callable[[], Any]) -> Any:
    """A lock that nobody holds at the start of a forked child (a data loader's worker, multiprocessing on Linux)."""
    lock = make()
    if hasattr(os, "register_at_fork"):  # where there is no fork there is no such function
        os.register_at_fork(after_in_child=lock._at_fork_reinit)  # as the standard library does
    return lock


class _Process:
    is_child = False


def _forked() -> None:
    _Process.is_child = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def is_child() -> bool:
    """Whether this process was forked after it had imported the package: it has none of its parent's threads."""
    return _Process.is_child
