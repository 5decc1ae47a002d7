# SPDX-License-Identifier: Apache-2.0
"""The folder in which compiled kernels and tuned choices stay from process to process.

What lies there decides what runs, so it is read only where nobody else could have written it, and only whole.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gpu_rnn import environment
from gpu_rnn.memo import memoize

PATIENCE = 2.0  # seconds for a lock; reading a file of choices and writing it takes milliseconds
PART = "gpu_rnn_part_"  # what a file is called while it is written
ABANDONED = 60.0  # seconds after which one that is not finished never will be
TEMPORARY = "gpu_rnn_temporary_"  # a folder for one process
FORGOTTEN = 30 * 86400.0  # seconds after which that process has ended
_READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # a pipe is not waited for

log = logging.getLogger("gpu_rnn")


class Untrusted(OSError):
    """A file or folder that somebody else may have written to; the message says who, and what to do."""


def wanted() -> Path:
    """GPU_RNN_CACHE, else the user's cache folder, whether it is there or not."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = Path(environment.cache_folder() or f"{home}/gpu_rnn")
    try:
        return path.expanduser().absolute()
    except (
        RuntimeError,
        FileNotFoundError,
    ):  # as in containers: a user without a home; a working directory that is gone
        return _temporary()


def places() -> tuple[Path, ...]:
    """The folders that hold anything this process may find: `wanted` and, once it was needed, the temporary one."""
    each = {wanted(), *([_temporary()] if _temporary.cache_info().currsize else [])}
    return tuple(place for place in each if not distrust(place))


def outlives_the_process(path: Path) -> bool:
    """Whether a file that `write` wrote is there for others; the temporary folder goes when this process ends."""
    return not (_temporary.cache_info().currsize and path.parent == _temporary())


@memoize(None)
def folder() -> Path:
    """`wanted`, made; where nothing can be written, or others could write too, a temporary one."""
    path = wanted()
    with suppress(OSError):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    reason = distrust(path)
    if reason:
        log.warning("nothing in the cache is used, and nothing is kept: %s", reason)
    if reason or not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        return _temporary()
    for part in _left(path, f"{PART}*", ABANDONED):
        part.unlink(missing_ok=True)
    return path


def distrust(path: Path) -> str:
    """Why what lies in a folder is not read; empty where it may be, or where there is none."""
    try:
        _check(path, path.stat())
    except Untrusted as error:
        return str(error)
    except OSError:
        return ""
    return ""


def _check(path: Path, status: os.stat_result) -> None:
    """Raises `Untrusted` where others than this user, or root, could have put something there."""
    if not hasattr(os, "geteuid"):  # Windows: the user's own folders are nobody else's
        return
    if status.st_uid not in (os.geteuid(), 0):
        raise Untrusted(
            f"{path} belongs to another user (number {status.st_uid}): set GPU_RNN_CACHE to a folder of your own"
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Untrusted(
            f"{path} can be written by other users: chmod go-w it, or set GPU_RNN_CACHE to a folder of your own"
        )


def _left(place: Path, pattern: str, seconds: float) -> Iterator[Path]:
    """What this user's processes began that long ago, and were killed before they could remove it."""
    return (path for path in place.glob(pattern) if _ours_and_older(path, seconds))


def _ours_and_older(path: Path, seconds: float) -> bool:
    try:
        status = path.lstat()
    except OSError:
        return False
    ours = not hasattr(os, "geteuid") or status.st_uid == os.geteuid()
    return ours and time.time() - status.st_mtime > seconds


@memoize(None, stays="what this process wrote lies there")
def _temporary() -> Path:
    place = Path(tempfile.gettempdir())
    for left in _left(place, f"{TEMPORARY}*", FORGOTTEN):
        shutil.rmtree(left, ignore_errors=True)
    made = tempfile.mkdtemp(prefix=TEMPORARY, dir=place)  # for this user only
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)


@contextmanager
def alone(name: str) -> Iterator[None]:
    """One process at a time for a name; one that is killed holds nobody up. Who waited `PATIENCE`, or is on a disk
    without locks, goes on without one."""
    import filelock  # here: with asyncio it takes longer than the rest of this module

    lock = filelock.FileLock(folder() / f"{name}.lock")
    with suppress(OSError, NotImplementedError):  # a timeout is an OSError
        lock.acquire(timeout=PATIENCE, poll_interval=0.01)
    try:
        yield
    finally:
        lock.release()


def read(path: Path) -> bytes:
    """A file's content; links are followed, and where they lead is checked as the file itself is.

    Raises:
        Untrusted: somebody else may have written it, or it is no file.
        OSError: it is not there, or cannot be read.
    """
    _check(path.parent, path.parent.stat())
    with os.fdopen(os.open(path, _READ), "rb") as file:
        status = os.fstat(file.fileno())
        _check(path, status)
        if not stat.S_ISREG(status.st_mode):
            raise Untrusted(f"{path} is no file: remove it")
        return file.read()


def write(name: str, content: bytes) -> Path:
    """Written whole or not at all, whoever else writes it; a full disk sends it to the temporary folder.

    Raises:
        OSError: no folder takes it.
    """
    for choose in (folder, _temporary):
        try:
            return _written(choose(), name, content)
        except OSError as error:
            failure = error
    raise failure


def _written(place: Path, name: str, content: bytes) -> Path:
    handle, part = tempfile.mkstemp(prefix=PART, dir=place)  # readable by its owner only
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(handle)  # else a power cut after the renaming leaves an empty file of that name
        return Path(part).replace(place / name)
    finally:
        _remove(Path(part))


def keep(key: str, suffix: str, content: bytes) -> Path:
    """As `write`, for `kept` to find: the file's name says what its content's hash is.

    Raises:
        OSError: no folder takes it.
    """
    return write(f"{key}-{_digest(content)}{suffix}", content)


def kept(key: str, suffix: str) -> bytes | None:
    """What `keep` kept; None where nothing is, or what is there is not what was kept, and is removed."""
    return next((content for _, content in _each_kept(key, suffix)), None)


def kept_files(key: str, suffix: str) -> Iterator[Path]:
    """The files that `keep` wrote, for who must have a path."""
    return (path for path, _ in _each_kept(key, suffix))


def _each_kept(key: str, suffix: str) -> Iterator[tuple[Path, bytes]]:
    for path in [path for place in {folder(), *places()} for path in place.glob(f"{key}-*{suffix}")]:
        content = _content(path)
        if content is not None and path.name == f"{key}-{_digest(content)}{suffix}":
            yield path, content
        elif content is not None:
            _remove(path)


def _content(path: Path) -> bytes | None:
    """None of a file that cannot be read, or is not to be."""
    try:
        return read(path)
    except Untrusted as error:
        log.warning("a file in the cache is not used: %s", error)
    except OSError:
        pass
    return None


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
