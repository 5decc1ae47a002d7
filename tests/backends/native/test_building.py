# SPDX-License-Identifier: Apache-2.0
"""How a library in C is built, kept and found again, and what is said where that fails."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import gpu_rnn
from gpu_rnn import cache, memo
from gpu_rnn.backends.native import building, launch
from gpu_rnn.diagnostics import doctor
from tests.support import native
from tests.support.paths import ROOT

TEXT = "int run(void) { return 7; }"
CALL = """
import torch, gpu_rnn
torch.set_num_threads(1)
torch.manual_seed(0)
with torch.no_grad():
    print(gpu_rnn.LSTM(2, 3, backend="native")(torch.ones(4, 1, 2))[0].sum().item())
"""


@pytest.fixture(autouse=True)
def forgotten(cache_folder: Path) -> Iterator[None]:
    """Nothing is built, kept or known to fail."""
    remembered = (building.library, building._compiler, building._version, building._unanswered, launch._failures)

    def clear() -> None:
        for each in remembered:
            each.clear() if isinstance(each, dict) else each.cache_clear()
        memo.clear()

    clear()
    yield
    clear()


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that says what it was asked, and does as the true one."""
    path, true = tmp_path / "compiler", needed()
    path.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\nexec {true} "$@"\n')
    path.chmod(0o700)
    monkeypatch.setenv("CC", str(path))
    return path


def needed() -> str:
    native.any_compiler()
    return shlex.join(building.compiler())


def test_a_build_is_said_once(compiler: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "gpu_rnn"):
        for _ in range(2):
            building.library(TEXT, ())
            building.library.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [
        f"native: builds a library with {compiler}, which is kept for later calls"
    ]


def test_that_there_is_no_compiler_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    launch._say_once.cache_clear()
    with caplog.at_level("INFO", "gpu_rnn"):
        for steps in (3, 4):
            gpu_rnn.LSTM(2, 3, activation="relu")(torch.ones(steps, 1, 2))
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("native: not used: needs a C compiler: CC is 'no-such-compiler'")


def builds(compiler: Path) -> int:
    asked = compiler.parent / "asked"
    return sum("-shared" in line for line in asked.read_text().splitlines()) if asked.exists() else 0


def test_a_text_is_built_once(compiler: Path, cache_folder: Path) -> None:
    for _ in range(2):
        building.library.cache_clear()
        assert building.library(TEXT, ()).run() == 7
    assert builds(compiler) == 1
    assert building.library(TEXT.replace("7", "8"), ()).run() == 8
    assert building.library(TEXT, ("-DWHATEVER",)).run() == 7
    assert builds(compiler) == 3


def test_nothing_is_built_before_it_is_taken(compiler: Path) -> None:
    layer = gpu_rnn.LSTM(2, 3)
    gpu_rnn.explain(layer, torch.zeros(3, 1, 2))
    layer(torch.zeros(3, 1, 2))
    assert builds(compiler) == 0
    layer.backend = "native"
    layer(torch.zeros(3, 1, 2))
    assert builds(compiler) == 2  # forward and backward
    layer(torch.zeros(5, 4, 2))
    assert builds(compiler) == 2


@pytest.mark.parametrize("content", [b"", b"\x7fELF torn"])
def test_a_library_that_was_changed_is_built_again(content: bytes, compiler: Path, cache_folder: Path) -> None:
    building.library(TEXT, ())
    (path,) = cache_folder.glob("native-*.so")
    path.unlink()
    path.write_bytes(content)
    building.library.cache_clear()
    assert building.library(TEXT, ()).run() == 7
    assert builds(compiler) == 2


def test_a_foreign_cache_is_not_used(compiler: Path, cache_folder: Path) -> None:
    cache_folder.mkdir(mode=0o777)
    cache_folder.chmod(0o777)
    cache.folder.cache_clear()
    assert building.library(TEXT, ()).run() == 7
    assert not list(cache_folder.iterdir())


def refused(words: str) -> None:
    """The layer says why; left to itself it runs on another backend."""
    layer, x = gpu_rnn.GRU(2, 3, reset_after=True, backend="native"), torch.zeros(3, 1, 2)
    with pytest.raises(ValueError, match=f"(?s)backend='native' cannot run this call:.*{words}"):
        layer(x)
    layer.backend = "auto"
    layer(x)[0].sum().backward()


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "none-such")
    refused("needs a C compiler: CC is 'none-such'")
    monkeypatch.setenv("CC", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    building._compiler.cache_clear()
    memo.clear("gpu_rnn.dispatch")
    refused("none of cc, gcc, clang is found; install gcc, or name one in CC")
    assert any("C        needs a C compiler" in line for line in doctor._compilers(torch.device("cpu")))


# What "$out" is in these scripts: where the library shall be.
OUT = 'for word; do [ "$last" = -o ] && out=$word; last=$word; done; '
VERSION = 'case "$*" in *--version*) echo version; exit 0;; esac; '
FAILURES = [
    ("echo it cannot >&2; exit 3", "fails: it cannot"),
    (VERSION + "exit 3", "fails: it ends with 3"),
    (r"printf '\377\376 no text' >&2; exit 3", "fails: .* no text"),
    ("exec /nowhere/at/all", "fails: "),
    (VERSION + "exit 0", "makes no library: it says nothing"),
    (VERSION + OUT + 'echo nonsense > "$out"', "cannot be kept or loaded"),
    (VERSION + OUT + 'exec {true} -shared -x c /dev/null -o "$out"', "cannot be kept or loaded .* lacks run"),
]


def write(path: Path, script: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o700)


@pytest.mark.parametrize(("script", "words"), FAILURES, ids=[words for _, words in FAILURES])
def test_a_compiler_that_fails(script: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    true = needed()
    write(tmp_path / "compiler", script.replace("{true}", true))
    monkeypatch.setenv("CC", str(tmp_path / "compiler"))
    refused(words)
    building.library.cache_clear()
    write(tmp_path / "compiler", VERSION + f'exec {true} "$@"')  # mended, and still the same by its name
    assert building.library(TEXT, ()).run() == 7


@pytest.mark.parametrize(("script", "limit"), [("", "TO_ANSWER"), (VERSION, "SECONDS")])
def test_a_compiler_that_hangs(script: str, limit: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is waited for once, and its children end with it."""
    write(tmp_path / "compiler", script + f"echo >> {tmp_path}/asked; sleep 1000 & echo $! > {tmp_path}/child; wait")
    monkeypatch.setenv("CC", str(tmp_path / "compiler"))
    monkeypatch.setattr(building, limit, 1.0)
    refused("does not end within 1 s")
    assert has_ended(int((tmp_path / "child").read_text()))
    refused("does not end within 1 s")
    with pytest.raises(building.CompilerError, match="does not end"):
        building.library(TEXT, ())
    assert (tmp_path / "asked").read_text() == "\n"


def has_ended(process: int) -> bool:
    """Or is about to."""
    for _ in range(200):
        status = Path(f"/proc/{process}/stat")
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("named", ["{0}/wrapper {1}", "{0}/two words/compiler", "'{0}/two words/compiler' -DWHATEVER"])
def test_what_may_be_named_as_the_compiler(named: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    true = needed()
    write(tmp_path / "wrapper", 'exec "$@"')
    write(tmp_path / "two words" / "compiler", f'exec {true} "$@"')
    monkeypatch.setenv("CC", named.format(tmp_path, true))
    monkeypatch.setenv("GPU_RNN_CACHE", str(tmp_path / "a cache of mine"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "two words"))
    cache.folder.cache_clear()
    assert building.library(TEXT, ()).run() == 7
    assert len(list((tmp_path / "a cache of mine").glob("native-*.so"))) == 1


def test_a_quotation_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "gcc '-O3")
    refused("CC is .*: No closing quotation")


def test_a_library_of_another_c_library_is_passed_over(compiler: Path, cache_folder: Path) -> None:
    """As on a shared disk: whole, by its name, yet nothing that loads here."""
    building.library(TEXT, ())
    (path,) = cache_folder.glob("native-*.so")
    key = path.name.rpartition("-")[0]
    path.unlink()
    other = cache.keep(key, ".so", b"\x7fELF of another machine")
    building.library.cache_clear()
    assert building.library(TEXT, ()).run() == 7
    assert builds(compiler) == 2 and other.exists()
    building.library.cache_clear()
    assert building.library(TEXT, ()).run() == 7
    assert builds(compiler) == 2


def test_machines_with_other_instructions_share_a_cache(compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None takes what was built for another one."""
    loaded, library = [], building._loaded
    monkeypatch.setattr(building, "_loaded", lambda path, *rest: loaded.append(path) or library(path, *rest))
    every, x = building.instruction_sets(), torch.ones(4, 2, 2)
    for targets in [*((each,) for each in every), *((each,) for each in every)]:
        monkeypatch.setattr(building, "instruction_sets", lambda targets=targets: targets)
        building.library.cache_clear()
        memo.clear()
        with torch.no_grad():
            gpu_rnn.RNN(2, 3, backend="native")(x)
    assert builds(compiler) == len(every) == len({*loaded})
    assert loaded[: len(every)] == loaded[len(every) :]


def test_a_cache_that_cannot_be_made(compiler: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GPU_RNN_CACHE", str(tmp_path / "file" / "folder"))
    cache.folder.cache_clear()
    assert building.library(TEXT, ()).run() == 7


def test_threads_that_build_at_once(compiler: Path, cache_folder: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: building.library(TEXT, ()).run(), range(8)))
    assert found == [7] * 8 and len(list(cache_folder.glob("native-*.so"))) == 1


def start(cache_folder: Path, text: str = CALL) -> subprocess.Popen[str]:
    given = os.environ | {"GPU_RNN_CACHE": str(cache_folder), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", text], cwd=ROOT, env=given, stdout=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str]) -> str:
    answer, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and answer
    return answer


@pytest.mark.slow
def test_processes_that_build_at_once_give_the_same(compiler: Path, cache_folder: Path) -> None:
    each = [start(cache_folder) for _ in range(2)]
    assert len({said(process) for process in each}) == 1
    assert len(list(cache_folder.glob("native-*.so"))) == 1


@pytest.mark.slow
def test_a_process_that_is_killed_while_it_builds(compiler: Path, cache_folder: Path) -> None:
    """Nothing of it is used, and nobody waits for it."""
    honest, folder = compiler.read_text(), compiler.parent
    write(compiler, VERSION + f"echo $$ > {folder}/building; exec sleep 20")
    process = start(cache_folder)
    while not (folder / "building").exists() or not (folder / "building").read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.communicate()
    os.kill(int((folder / "building").read_text()), signal.SIGKILL)
    assert not list(cache_folder.glob("native-*.so"))
    compiler.write_text(honest)
    assert said(start(cache_folder))
    assert len(list(cache_folder.glob("native-*.so"))) == 1


INTERRUPTED = (
    CALL.replace("    print(", "    call = lambda: (")
    + """
from pathlib import Path
path = Path({compiler!r})
try:
    call()
except KeyboardInterrupt:
    path.write_text({honest!r})
    print("interrupted", call())
"""
)


@pytest.mark.slow
def test_an_interrupted_build(compiler: Path, cache_folder: Path) -> None:
    """Ctrl-C ends the compiler too, and the next call builds."""
    honest, folder = compiler.read_text(), compiler.parent
    write(compiler, VERSION + f"sleep 1000 & echo $! > {folder}/child; sleep 0.5; kill -INT $PPID; wait")
    text = INTERRUPTED.format(compiler=str(compiler), honest=honest)
    assert said(start(cache_folder, text)).startswith("interrupted ")
    assert has_ended(int((folder / "child").read_text()))


FULL = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, 1 << 12))
import shlex
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import torch, gpu_rnn
layer, x = gpu_rnn.GRU(2, 3, activation="softsign"), torch.zeros(3, 1, 2)
layer(x)[0].sum().backward()
layer.backend = "native"
try:
    layer(x)
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_full_disk(compiler: Path, cache_folder: Path) -> None:
    assert "the C compiler" in said(start(cache_folder, FULL))


def test_the_doctor_names_compiler_and_instruction_sets() -> None:
    needed()
    (line,) = [line for line in doctor._compilers(torch.device("cpu")) if line.startswith("C        ")]
    assert building.compiler()[0] in line and building.version() in line
    assert line.endswith(", ".join(each.name for each in building.instruction_sets()))


@pytest.mark.parametrize("terminal", [True, False])
def test_who_waits_at_a_terminal_is_told_for_what(
    terminal: bool, compiler: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the words go when it is over; a file or a pipe gets none."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    building.library(TEXT, ())
    words = "gpu_rnn: compiler builds a time loop, once for this machine"
    assert capsys.readouterr().err == (f"{words}\r{' ' * len(words)}\r" if terminal else "")
    building.library.cache_clear()
    building.library(TEXT, ())  # which is kept
    assert not capsys.readouterr().err
