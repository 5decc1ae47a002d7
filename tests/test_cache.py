# SPDX-License-Identifier: Apache-2.0
"""The cache folder: nothing of others is read, nothing torn is used, nothing unfinished stays."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import gpu_rnn
from gpu_rnn import cache
from gpu_rnn.diagnostics import doctor
from gpu_rnn.dispatch import choice, measured
from tests.support.tuning import decide

pytestmark = pytest.mark.usefixtures("cache_folder")

CONTENT = b"content"
NOBODY = 65534
AS_ROOT = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give a file to another user"
)


@pytest.fixture(autouse=True)
def temporary_folder_of_its_own() -> Iterator[None]:
    cache._temporary.cache_clear()
    yield
    if cache._temporary.cache_info().currsize:
        shutil.rmtree(cache._temporary())
    cache._temporary.cache_clear()


def filled(folder: Path) -> Path:
    """The file that holds `CONTENT`, as a process before this one left it."""
    path = cache.keep("key", ".cubin", CONTENT)
    assert path.parent == folder and cache.kept("key", ".cubin") == CONTENT
    cache.folder.cache_clear()
    return path


def said(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


def test_what_is_kept_is_found(cache_folder: Path) -> None:
    path = filled(cache_folder)
    assert path.read_bytes() == CONTENT and cache.kept("another", ".cubin") is None
    assert list(cache_folder.iterdir()) == [path]


def untrusted(path: Path, how: str) -> None:
    if how == "foreign":
        os.chown(path, NOBODY, -1)
    else:
        path.chmod(int(how, 8))


HOW = [pytest.param("foreign", marks=AS_ROOT), "777", "770"]


@pytest.mark.parametrize("how", HOW)
def test_a_folder_that_others_write_to_is_refused(
    how: str, cache_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    filled(cache_folder)
    untrusted(cache_folder, how)
    with caplog.at_level(logging.WARNING, logger="gpu_rnn"):
        assert cache.kept("key", ".cubin") is None
    who = (
        "belongs to another user (number 65534)" if how == "foreign" else "can be written by other users: chmod go-w it"
    )
    assert f"{cache_folder} {who}" in said(caplog) and "set GPU_RNN_CACHE to a folder of your own" in said(caplog)
    instead = cache.keep("key", ".cubin", CONTENT)
    assert instead.parent != cache_folder and instead.parent.stat().st_mode & 0o777 == 0o700
    assert cache.kept("key", ".cubin") == CONTENT and not cache.outlives_the_process(instead)
    assert str(cache_folder) in doctor.report(torch.device("cpu")) and who in doctor.report(torch.device("cpu"))


@pytest.mark.parametrize("how", HOW)
def test_a_file_that_others_write_to_is_refused(how: str, cache_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = filled(cache_folder)
    untrusted(path, how)
    with caplog.at_level(logging.WARNING, logger="gpu_rnn"):
        assert cache.kept("key", ".cubin") is None
    assert f"a file in the cache is not used: {path}" in said(caplog)
    assert cache.keep("key", ".cubin", CONTENT) == path and cache.kept("key", ".cubin") == CONTENT


@AS_ROOT
def test_a_link_to_a_foreign_file_is_refused(tmp_path: Path, cache_folder: Path) -> None:
    path = filled(cache_folder)
    planted = tmp_path / "planted"
    planted.write_bytes(CONTENT)
    os.chown(planted, NOBODY, -1)
    path.unlink()
    path.symlink_to(planted)
    assert cache.kept("key", ".cubin") is None
    assert cache.keep("key", ".cubin", b"other") != path and planted.read_bytes() == CONTENT


@AS_ROOT
def test_a_link_to_a_foreign_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir(mode=0o700)
    os.chown(foreign, NOBODY, -1)
    link = tmp_path / "link"
    link.symlink_to(foreign)
    monkeypatch.setenv("GPU_RNN_CACHE", str(link))
    cache.folder.cache_clear()
    assert cache.keep("key", ".cubin", CONTENT).parent not in (link, foreign) and not list(foreign.iterdir())


@pytest.mark.parametrize("torn", [b"", CONTENT[:3], bytes(len(CONTENT)), CONTENT + b"\0"])
def test_torn_content_is_removed(torn: bytes, cache_folder: Path) -> None:
    path = filled(cache_folder)
    path.write_bytes(torn)
    assert cache.kept("key", ".cubin") is None and not path.exists()


def test_a_folder_and_a_pipe_in_the_place_of_a_file_are_refused(cache_folder: Path) -> None:
    path = filled(cache_folder)
    path.unlink()
    path.mkdir()
    assert cache.kept("key", ".cubin") is None
    path.rmdir()
    os.mkfifo(path, 0o600)
    assert cache.kept("key", ".cubin") is None  # and does not wait for a writer


@pytest.mark.parametrize("how", HOW)
def test_tuned_choices_of_others_are_refused(
    how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    layer = gpu_rnn.LSTM(4, 4)
    decide(monkeypatch, "step")
    inputs = torch.randn(5, 3, 4)
    path = gpu_rnn.tune(layer, inputs).path
    assert gpu_rnn.explain(layer, inputs).chosen == "step"
    untrusted(path, how)
    for cached in (
        measured._kept,
        measured.any_on_cpu,
        choice._select,
        choice._candidates,
        cache.folder,
    ):  # as in a new process
        cached.cache_clear()
    with caplog.at_level(logging.WARNING, logger="gpu_rnn"):
        assert gpu_rnn.explain(layer, inputs).chosen == "aten"
    assert f"tuned choices in {path} are not used" in said(caplog)


def test_a_read_only_folder_is_read_and_another_written(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(cache_folder)
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)  # root may write everywhere
    assert cache.kept("key", ".cubin") == CONTENT
    assert cache.keep("other", ".cubin", CONTENT).parent != cache_folder
    assert cache.kept("other", ".cubin") == CONTENT


@pytest.mark.parametrize("step", ["mkstemp", "fsync", "replace"])
def test_a_full_disk_leaves_nothing_behind(step: str, cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(cache_folder)
    before = sorted(cache_folder.iterdir())

    def full(*arguments: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        owner = {"mkstemp": cache.tempfile, "fsync": os, "replace": Path}[step]
        patch.setattr(owner, step, full)
        with pytest.raises(OSError, match="No space left"):
            cache.keep("other", ".cubin", CONTENT)
    assert sorted(cache_folder.iterdir()) == before
    assert not list(cache._temporary().glob(f"{cache.PART}*"))


def test_what_a_killed_process_left_is_removed(
    cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(cache_folder)
    old, new = cache_folder / f"{cache.PART}old", cache_folder / f"{cache.PART}new"
    for path, age in ((old, cache.ABANDONED + 5), (new, 0)):
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age,) * 2)
    cache.folder()
    assert new.exists() and not old.exists()  # another process may be writing it
    monkeypatch.setattr(cache.tempfile, "tempdir", str(tmp_path))
    left = tmp_path / f"{cache.TEMPORARY}left"
    left.mkdir()
    os.utime(left, (0, 0))
    other = cache._temporary.__wrapped__()
    assert not left.exists() and other.parent == tmp_path


WRITER = """
import itertools, sys, types
package = sys.modules["gpu_rnn"] = types.ModuleType("gpu_rnn")  # without torch, whose import takes seconds
package.__path__ = [sys.argv[1]]
from gpu_rnn import cache
content = bytes(range(256)) * 4096
print("ready", flush=True)
for k in itertools.count():
    cache.keep(f"key{k % 4}", ".cubin", content)
    cache.write("tuned.json", content)
"""


def killed_while_writing(folder: Path, times: int) -> None:
    """Every file that has a name of ours is whole, whenever its writer was killed."""
    content = bytes(range(256)) * 4096
    assert cache.folder() == folder
    for k in range(times):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(Path(cache.__file__).parent)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        time.sleep(0.002 * (k % 25))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        for path in folder.iterdir():
            assert path.name.startswith(cache.PART) or path.read_bytes() == content
        assert cache.kept("key0", ".cubin") in (None, content)


def test_a_writer_that_is_killed_tears_nothing(cache_folder: Path) -> None:
    killed_while_writing(cache_folder, 10)


@pytest.mark.slow
def test_writers_that_are_killed_at_any_time_tear_nothing(cache_folder: Path) -> None:
    killed_while_writing(cache_folder, 200)


def test_a_folder_named_relatively_is_the_one_of_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that changes its working directory goes on with the cache that it began with."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPU_RNN_CACHE", "relative")
    first = cache.keep("first", ".cubin", CONTENT)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert cache.kept("first", ".cubin") == CONTENT
    assert cache.keep("second", ".cubin", CONTENT).parent == first.parent == tmp_path / "relative"
