# SPDX-License-Identifier: Apache-2.0
"""Tuned choices outlive a process where anything can be written, and whatever stands in their files breaks no call."""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import filelock
import pytest
import torch

import gpu_rnn
from gpu_rnn import GRU, LSTM, cache, cli
from gpu_rnn.diagnostics import doctor, tuning
from gpu_rnn.dispatch import choice, measured
from tests.support.tuning import QUICK, I, decide, x

pytestmark = pytest.mark.usefixtures("cache_folder")


BROKEN: dict[str, str | dict[str, measured.Times]] = {
    "text": "no JSON",
    "a list": "[]",
    "nothing": "{}",
    "no times": '{{"device": "{device}", "gpu_rnn": "{gpu_rnn}", "torch": "{torch}", "triton": "{triton}", '
    '"choices": 3}}',
    "another version": '{{"device": "{device}", "gpu_rnn": "0", "torch": "{torch}", "triton": "{triton}", '
    '"choices": {{}}}}',
    "too deep": "[" * 100_000,
    "changed by one digit": '{{"device": "{device}", "gpu_rnn": "{gpu_rnn}", "torch": "{torch}", "triton": "{triton}", '
    '"digest": "0", "choices": {{}}}}',
    **{f"{time} µs": {"a call": {"step": time}} for time in (math.nan, -1.0, 0, math.inf)},
}


def setting_of(path: Path) -> dict[str, str]:
    found = json.loads(path.read_text())
    return {name: value for name, value in found.items() if name not in ("digest", "choices")}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_ignored_and_rewritten(
    kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    layer = LSTM(I, 4)
    decide(monkeypatch, "step")
    path = gpu_rnn.tune(layer, x()).path
    setting = setting_of(path)
    broken = BROKEN[kind]
    if isinstance(broken, dict):
        path.write_bytes(measured.written(setting, broken))
    else:
        path.write_text(broken.format(**setting) if "{{" in broken else broken)
    for cached in (measured._kept, measured.any_on_cpu, choice._select, choice._candidates):  # as in a new process
        cached.cache_clear()
    with caplog.at_level(logging.INFO, logger="gpu_rnn"):
        assert gpu_rnn.explain(layer, x()).chosen == "aten"
        assert gpu_rnn.tune(layer, x()).path == path
    advice = "for it is damaged: tune again, which writes it anew, or delete it"
    assert [record.getMessage() for record in caplog.records] == [f"tuned choices in {path} are not used, {advice}"]
    assert json.loads(path.read_text())["choices"] and gpu_rnn.explain(layer, x()).chosen == "step"


def test_a_file_that_cannot_be_read_is_named_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path) -> bytes:  # root may read every file
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(cache, "read", refuse)
    assert gpu_rnn.explain(LSTM(I, 4), x()).chosen == "aten"
    (said,) = [record.getMessage() for record in caplog.records]
    assert "cannot be read ([Errno 13] Permission denied" in said and said.endswith("make it readable, or tune again")


def test_processes_add_to_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    decide(monkeypatch, "step")
    path = gpu_rnn.tune(LSTM(I, 4), x()).path
    kept = json.loads(path.read_text())["choices"]
    other = {"by another process": {"step": 1.0}}
    path.write_bytes(measured.written(setting_of(path), kept | other))
    gpu_rnn.tune(GRU(I, 4), x())
    assert kept.keys() | other.keys() < json.loads(path.read_text())["choices"].keys()


def test_one_process_waits_for_another_that_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    decide(monkeypatch, "step")
    path = gpu_rnn.tune(LSTM(I, 4), x()).path
    before = json.loads(path.read_text())["choices"].keys()
    reading, other = threading.Event(), {"by another process": {"step": 1.0}}

    def another_process() -> None:
        with cache.alone(path.name):
            found = json.loads(path.read_text())
            reading.set()
            time.sleep(0.3)
            path.write_bytes(measured.written(setting_of(path), found["choices"] | other))

    thread = threading.Thread(target=another_process)
    thread.start()
    reading.wait()
    gpu_rnn.tune(GRU(I, 4), x())
    thread.join()
    assert before | other.keys() < json.loads(path.read_text())["choices"].keys()


HOLDER = """
import sys, time, types
package = sys.modules["gpu_rnn"] = types.ModuleType("gpu_rnn")  # without torch, whose import takes seconds
package.__path__ = [sys.argv[1]]
from gpu_rnn import cache
with cache.alone(sys.argv[2]):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_a_process_that_is_killed_leaves_its_lock_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once: nobody waits until its patience is at an end. A file of the lock's name holds nobody up either."""
    decide(monkeypatch, "step")
    path = gpu_rnn.tune(LSTM(I, 4), x(), **QUICK).path
    held, freed = [], []
    monkeypatch.setattr(cache, "PATIENCE", 0.3)
    command = [sys.executable, "-c", HOLDER, str(Path(cache.__file__).parent), path.name]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"locked\n"
        for seconds in (held, freed):
            start = time.monotonic()
            with cache.alone(path.name):
                seconds.append(time.monotonic() - start)
            monkeypatch.setattr(cache, "PATIENCE", 60.0)
            process.kill()
            process.wait()
    assert held[0] >= 0.3 and freed[0] < 30 and path.with_name(f"{path.name}.lock").exists()
    assert gpu_rnn.tune(GRU(I, 4), x(), **QUICK).lasting


@pytest.mark.parametrize("refusal", [OSError(38, "Function not implemented"), NotImplementedError("no flock")])
def test_a_disk_without_locks_is_written_to(refusal: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object, **options: object) -> None:
        raise refusal

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    assert gpu_rnn.tune(GRU(I, 4), x(), **QUICK).lasting


def test_where_nothing_can_be_written_this_process_goes_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("GPU_RNN_CACHE", str(blocked / "cache"))
    cache.folder.cache_clear()
    decide(monkeypatch, "step")
    tuned = gpu_rnn.tune(LSTM(I, 4), x(), **QUICK)
    assert tmp_path not in tuned.path.parents and not tuned.lasting
    said = " ".join(str(tuned).splitlines()[-2:])
    assert "holds for T 5 to 8, B 3 to 4 in this process only" in said and "set GPU_RNN_CACHE to a folder" in said
    assert str(tuned.path) not in said
    assert gpu_rnn.explain(LSTM(I, 4), x()).chosen == "step"
    tuning.forget()
    assert not tuned.path.exists() and gpu_rnn.explain(LSTM(I, 4), x()).chosen == "aten"


def test_a_command_whose_choice_nobody_finds_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["tune", "--hidden", "4", "--batch", "2", "--steps", "3", "--seconds", "1e-9", "--device", "cpu"]
    assert cli.main(command) == 0
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("GPU_RNN_CACHE", str(tmp_path / "file"))
    cache.folder.cache_clear()
    assert cli.main(command) == 1
    assert "in this process only" in capsys.readouterr().out


def test_a_full_disk_is_said_too(monkeypatch: pytest.MonkeyPatch, cache_folder: Path) -> None:
    replace = Path.replace

    def full(self: Path, target: Path) -> Path:
        if target.parent == cache_folder:
            raise OSError(28, "No space left on device")
        return replace(self, target)

    assert gpu_rnn.tune(LSTM(I, 4), x(), **QUICK).lasting
    monkeypatch.setattr(Path, "replace", full)
    assert not gpu_rnn.tune(LSTM(I, 4), x(), **QUICK).lasting
    monkeypatch.undo()


def test_doctor_says_what_the_cache_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_folder: Path) -> None:
    def said() -> list[str]:
        lines = doctor.report(torch.device("cpu")).splitlines()
        first = next(number for number, line in enumerate(lines) if line.startswith("cache"))
        return lines[first : next(number for number, line in enumerate(lines) if line.startswith("NVRTC"))]

    assert said() == [f"cache    {cache_folder}: tuned choices: 0 for this device and these versions"]
    tuned = gpu_rnn.tune(LSTM(I, 4), x(), **QUICK)
    count = len(json.loads(tuned.path.read_text())["choices"])
    (cache_folder / "tuned-0.json").write_bytes(measured.written({}, {"one": {"step": 1.0}}))
    (cache_folder / "tuned-1.json").write_text("no JSON")
    kept, broken = said()
    assert kept.endswith(f"tuned choices: {count} for this device and these versions, 1 for other devices or versions")
    assert broken.split() == "tuned-1.json is damaged or cannot be read: tune again, or delete it".split()
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("GPU_RNN_CACHE", str(tmp_path / "file"))
    cache.folder.cache_clear()
    assert "cannot be written to, so nothing is kept: set GPU_RNN_CACHE" in said()[1]


# As in a container that runs under a number which has no entry in passwd.
HOMELESS = """
import pwd
def nobody(uid):
    raise KeyError(uid)
pwd.getpwuid = nobody
import torch, gpu_rnn
layer = gpu_rnn.GRU(2, 4, activation="relu")
layer(torch.randn(3, 2, 2))[0].sum().backward()
gpu_rnn.LSTM(2, 4)(torch.randn(3, 2, 2))
tuned = gpu_rnn.tune(layer, torch.randn(3, 2, 2), seconds=1e-9)
assert tuned.passes[0].now == gpu_rnn.explain(layer.eval().requires_grad_(False), torch.empty(3, 2, 2)).chosen
print(tuned.path, str(tuned).count("in this process only"))
gpu_rnn.tuning.forget()
print(tuned.path.exists())
"""


@pytest.mark.skipif(importlib.util.find_spec("pwd") is None, reason="this system has no passwd")
def test_a_user_without_a_home() -> None:
    nowhere = {"HOME", "XDG_CACHE_HOME", "GPU_RNN_CACHE"}
    environment = {name: value for name, value in os.environ.items() if name not in nowhere} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", HOMELESS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path, said, left = done.stdout.split()
    assert (said, left) == ("1", "False") and not Path(path).parent.exists()


def test_no_temporary_folder_is_made_without_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_temporary", functools.cache(lambda: pytest.fail("made")))
    assert gpu_rnn.tune(LSTM(I, 4), x(), **QUICK).lasting


def test_the_file_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read, parsed = [], measured._parsed
    monkeypatch.setattr(measured, "_parsed", lambda *arguments: read.append(1) or parsed(*arguments))
    for steps in (3, 4, 5):
        LSTM(I, 4)(x(steps))
        GRU(I, 4, activation="relu")(x(steps))[0].sum().backward()
    assert len(read) == 1
