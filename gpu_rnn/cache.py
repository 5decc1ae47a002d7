# SPDX-License-Identifier: Apache-2.0
"""The folder in which compiled kernels and tuned choices stay from process to process."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

PATIENCE = 2.0  # seconds; reading a file of choices and writing it takes milliseconds


def wanted() -> Path:
    """GPU_RNN_CACHE, else the user's cache folder, whether it is there or not."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    found = Path(os.environ.get("GPU_RNN_CACHE") or f"{home}/gpu_rnn")
    try:
        return found.expanduser()
    except RuntimeError:  # as in containers: a user without a home
        return _temporary()


def places() -> tuple[Path, ...]:
    """The folders that hold anything this process may find: `wanted` and, once it was needed, the temporary one."""
    return tuple({wanted(), *([_temporary()] if _temporary.cache_info().currsize else [])})


def outlives_the_process(path: Path) -> bool:
    """Whether a file that `write` wrote is there for others; the temporary folder goes when this process ends."""
    return not (_temporary.cache_info().currsize and path.parent == _temporary())


@cache
def folder() -> Path:
    """`wanted`, made; where nothing can be written, a temporary one."""
    found = wanted()
    try:
        found.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=found):
            return found
    except OSError:
        return _temporary()


@cache
def _temporary() -> Path:
    found = tempfile.mkdtemp(prefix="gpu_rnn_")
    atexit.register(shutil.rmtree, found, ignore_errors=True)
    return Path(found)


@contextmanager
def alone(name: str) -> Iterator[None]:
    """One process at a time for a name. A file says so, for want of a lock that every system and network disk has; one left
    by a process that was killed holds the others up for `PATIENCE`, once."""
    lock = folder() / f"{name}.lock"
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            lock.touch(exist_ok=False)
            break
        except FileExistsError:
            time.sleep(0.01)
        except OSError:  # no disk to keep anything on
            break
    try:
        yield
    finally:
        with suppress(OSError):
            lock.unlink()


def write(name: str, content: bytes) -> Path:
    """Written whole or not at all, whoever else writes it; a full disk sends it to the temporary folder.

    Raises:
        OSError: no folder takes it.
    """
    for choose in (folder, _temporary):
        place = choose()
        try:
            handle, part = tempfile.mkstemp(dir=place)  # readable by its owner only
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            return Path(part).replace(place / name)
        except OSError as error:
            failure = error
    raise failure
