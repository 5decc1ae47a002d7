# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/certify.py`: what is broken is found and said, and nothing that was not run counts."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks import certify, soak
from benchmarks.certify import Command, Step
from benchmarks.certifying import certificate, record
from benchmarks.certifying.certificate import FAILED, NOT_RUN, PASSED, Outcome
from benchmarks.measuring import machine
from tests.support.cuda.machines import NEEDS_COMPILER
from tests.support.paths import ROOT

PRIMITIVES = ("-m", "cuda_cpu", "tests/kernels/test_cuda_primitives.py", "-k")
CRASH = (
    "import os; from benchmarks.certifying import record; w = record.Writer(os.environ[record.RECORD]); "
    "w.end('a', 'passed'); w.begin('b'); os.abort()"
)


def certified(
    steps: tuple[Step, ...], folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> tuple[int, Any]:
    """certify.py's exit status and its certificate, with these steps in the place of the emulated ones."""
    monkeypatch.setattr(certify, "steps_on_cpu", lambda soak: steps)
    monkeypatch.setattr(machine, "_commit", lambda: ("0" * 40, "no"))  # whatever is being edited here
    status = certify.main(["--device", "cpu", "--out", str(folder), *arguments])
    return status, json.loads((folder / "certificate.json").read_text())


def code(text: str) -> Command:
    return Command(("-c", text))


@pytest.mark.cuda_cpu
@NEEDS_COMPILER
def test_all_steps_with_an_emulated_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = tuple(certify.pytest(*PRIMITIVES, "shuffles", **{record.SHARD: f"{k}/2"}) for k in (0, 1))
    steps = (
        Step("primitives", "", (certify.pytest(*PRIMITIVES, "indices"),), 100, decisive=True),
        Step("matrix", "", shards, 100),
        Step("sanitizer", "", (), 100, impossible="no such tool"),
        certify.steps_on_cpu(0.1)[-1],
    )
    status, found = certified(steps, tmp_path, monkeypatch)
    assert status == 0
    assert [s["status"] for s in found["steps"]] == [PASSED, PASSED, NOT_RUN, PASSED]
    assert [s["passed"] for s in found["steps"][:3]] == [1, 3, 0]
    assert found["steps"][3]["passed"] >= 1 and found["steps"][3]["notes"]["seed"] >= 0
    assert found["steps"][3]["notes"]["compared"]["step alone"] >= 1
    assert found["torch"] == torch.__version__ and found["date"] and found["device"]
    text = (tmp_path / "certificate.md").read_text()
    assert text.startswith("# Emulated: no GPU, not a certificate, no timings; sanitizer not run\n")
    assert "no such tool" in text and f"seed: {found['steps'][3]['notes']['seed']}" in text


@pytest.mark.parametrize(("script", "option"), [(certify, "--soak"), (soak, "--seconds")])
@pytest.mark.parametrize("seconds", ["0", "-1", "nan"])
def test_no_time_is_refused(script: ModuleType, option: str, seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.main([option, seconds])
    assert f"{option}: must be more than 0, not {seconds}" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_every_step_names_a_file_that_is_there(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = certify.steps_on_gpu(60) if device == "gpu" else certify.steps_on_cpu(60)
    assert [s.name for s in steps] == ["primitives", "matrix", "sanitizer", "deadline", "soak"]
    named = [a for s in steps for command in s.commands for a in command.arguments if a.endswith(".py")]
    assert named and all((ROOT / name).exists() for name in named)
    assert len(steps[1].outcome.commands) == (1 if device == "gpu" else 3)  # shards are one


@pytest.mark.parametrize(("cores", "workers"), [(1, 1), (8, 8), (12, 12), (64, 16)])
def test_the_plan_follows_from_what_was_measured(cores: int, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    steps = certify.steps_on_gpu(certify.SOAK_SECONDS)
    assert len(steps[1].commands) == workers
    assert steps[1].limit >= 2 * certify.MATRIX_SECONDS / workers
    makefile = (ROOT / "Makefile").read_text()
    benchmark = int(re.search(r"timeout (\d+) .*run.py", makefile)[1])
    most = sum(step.limit + 2 * certify.GRACE for step in steps) + benchmark
    assert (most <= 600) == (cores >= 12)  # with fewer the kernels take longer to build than one command may


PYTHON = """#!/bin/sh
case $1 in -c) exit 0 ;; esac
echo "$@" >> ran
case $1 in *certify.py) exit $CERTIFY ;; esac
"""


@pytest.mark.parametrize(("certify_status", "timed", "red"), [(0, True, False), (1, True, True), (130, False, True)])
@pytest.mark.parametrize("device", ["", "cpu"])
def test_a_red_certificate_does_not_keep_speed_from_being_measured(
    certify_status: int, timed: bool, red: bool, device: str, tmp_path: Path
) -> None:
    """`make gpu-check`, with scripts in the place of the interpreter and of what makes it."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    (tmp_path / ".ci").mkdir()
    for name, text in {"python": PYTHON, ".ci/venv": "#!/bin/sh\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    command = ["make", "gpu-check", "PY=./python", f"DEVICE={device}", "COMMIT=abc"]
    environment = os.environ | {"CERTIFY": str(certify_status)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode != 0) == red, done.stderr
    certified, *benchmark = (tmp_path / "ran").read_text().splitlines()
    assert certified == f"benchmarks/certify.py {'--device cpu ' * bool(device)}--commit abc"
    how = "--emulate --set tiny --seconds 30" if device else "--quick --seconds 70"
    assert benchmark == [f"benchmarks/run.py {how} --commit abc"] * timed


def test_a_step_that_fails_ends_what_depends_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "test_broken.py"
    broken.write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 1 == 2\n@pytest.mark.skip(reason='no x')\ndef "
        "test_c(): 0\n"
    )
    steps = (
        Step("primitives", "", (certify.pytest(str(broken), "-p", "no:cacheprovider"),), 60, decisive=True),
        Step("matrix", "", (code("raise SystemExit('never')"),), 60),
    )
    status, found = certified(steps, tmp_path, monkeypatch)
    first, second = found["steps"]
    assert status == 1
    assert (first["status"], first["passed"], first["failed"], first["skips"]) == (FAILED, 1, 1, {"no x": 1})
    assert "assert 1 == 2" in first["failures"][0]["detail"] and "test_b" in first["failures"][0]["repeat"]
    assert (second["status"], second["reason"]) == (NOT_RUN, "primitives failed")
    assert found["verdict"].endswith("primitives failed, matrix not run")
    assert "nothing else is checked" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "status", "reason"),
    [
        (CRASH, FAILED, "crashed, SIGABRT in b"),
        ("import time; time.sleep(60)", FAILED, "not done after 2 s"),
        ("raise SystemExit(3)", FAILED, "exit status 3, and nothing that failed was named"),
        ("pass", NOT_RUN, "nothing ran"),
    ],
)
def test_a_step_that_does_not_end_well(
    command: str, status: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certify, "GRACE", 0.5)
    _, found = certified((Step("matrix", "", (code(command),), 2),), tmp_path, monkeypatch)
    assert (found["steps"][0]["status"], found["steps"][0]["reason"]) == (status, reason)
    assert found["verdict"].endswith(f"matrix {status}")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_so(sent: signal.Signals, tmp_path: Path) -> None:
    script = (
        "import sys, signal; from benchmarks import certify;"
        "signal.signal(signal.SIGINT, signal.default_int_handler);"  # a shell's background children ignore it
        "wait = certify.Command(('-c', 'import time; print(1, flush=True); time.sleep(60)'));"
        "certify.steps_on_cpu = lambda soak: tuple(certify.Step(n, '', (wait,), 60, own_bar=True) for n in 'ab');"
        f"sys.exit(certify.main(['--device', 'cpu', '--out', {str(tmp_path)!r}]))"
    )
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        while process.stdout.readline() != "1\n":
            assert process.poll() is None
        partial = json.loads((tmp_path / "certificate.json").read_text())
        assert partial["verdict"].endswith("a failed, b not run")  # even if nothing more were written
        time.sleep(0.1)
        process.send_signal(sent)
        assert process.wait(30) == 130
    found = json.loads((tmp_path / "certificate.json").read_text())
    assert [s["reason"] for s in found["steps"]] == ["interrupted", "not reached"]
    assert found["verdict"].endswith("a interrupted, b not run")


@pytest.mark.parametrize(
    ("statuses", "said"),
    [
        ((PASSED, PASSED), "certified"),
        ((PASSED, NOT_RUN), "not certified: b not run"),
        ((FAILED, NOT_RUN), "not certified: a failed, b not run"),
        ((), "not certified: no step"),
    ],
)
def test_the_verdict(statuses: tuple[str, ...], said: str) -> None:
    outcomes = [Outcome(name, "", [], status) for name, status in zip("ab", statuses, strict=False)]
    assert certificate.verdict(outcomes, emulated=False) == said
    assert certificate.verdict(outcomes, emulated=True).startswith(certificate.EMULATED)


def test_a_certificate_of_uncommitted_changes_is_none(tmp_path: Path) -> None:
    passed = [Outcome("a", "", [], PASSED)]
    facts = {"commit": "0" * 40, "dirty": "no"}
    assert certificate.write(tmp_path, facts, passed, emulated=False) == "certified"
    for changed, lacking in (({"dirty": "yes"}, "uncommitted changes"), ({"commit": ""}, "no known commit")):
        assert certificate.write(tmp_path, facts | changed, passed, emulated=False) == f"not certified: {lacking}"


def test_another_users_checkout_has_a_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where git asks for a setting of the user's, who may have no folder to keep it in."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout")
    here = machine._commit()
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    bare = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "dubious ownership" in bare.stderr
    assert machine._commit() == here and here[0]


def test_where_git_does_not_answer_there_is_no_commit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GIT_DIR", str(ROOT / "tests"))
    assert machine._commit() == ("", "")
    assert "git does not say which commit this is: fatal: not a git repository" in capsys.readouterr().err


def test_a_home_that_cannot_be_written_keeps_no_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in machine.CACHES:
        monkeypatch.setenv(name, "")  # what is set below is undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    machine.keep_caches()
    assert not {*machine.CACHES} & {*os.environ}
    monkeypatch.setenv("HOME", str(tmp_path / "not there"))
    monkeypatch.setenv("TRITON_CACHE_DIR", "/chosen")
    machine.keep_caches()
    assert os.environ["TRITON_CACHE_DIR"] == "/chosen"
    assert os.environ["CUPY_CACHE_DIR"] == str(ROOT / "build" / "caches" / "cupy")


def test_steps_that_are_left_out_were_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = (Step("matrix", "", (code("raise SystemExit(1)"),), 9), Step("soak", "", (code("pass"),), 9))
    _, found = certified(steps, tmp_path, monkeypatch, "--only", "soak")
    assert [s["reason"] for s in found["steps"]] == ["left out by --only", "nothing ran"]
    assert certify.main(["--device", "cpu", "--only", "sok"]) == 2
    assert "no step 'sok'; there are matrix, soak" in capsys.readouterr().err
