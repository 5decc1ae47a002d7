# SPDX-License-Identifier: Apache-2.0
"""`.ci/venv` installs what is missing, once."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.waiting import PATIENCE

STUB = """#!/bin/sh
# Stands for Python: makes a .venv of itself, and writes down what it is asked.
echo "$@" >> "$LOG"
case "$*" in
    "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    *%d.%d*) echo 3.11 ;;
esac
"""


def checkout(folder: Path, python: str) -> dict[str, str]:
    """What `.ci/venv` reads, in a folder of its own, and the environment in which `python` is what it installs with."""
    (folder / ".ci").mkdir()
    for name in (".ci/venv", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
    stub = folder / "python"
    stub.write_text(python)
    stub.chmod(0o755)
    return {**os.environ, "PYTHON": str(stub), "LOG": str(folder / "log")}


def test_an_installation_that_is_stopped_is_said_to_be(tmp_path: Path) -> None:
    slow = STUB.replace("esac", '    *"pip install"*) sleep 60 ;;\nesac')
    command, log = [tmp_path / ".ci" / "venv", "demo"], tmp_path / "log"
    environment = checkout(tmp_path, slow)
    with subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True) as made:
        end = time.monotonic() + PATIENCE
        while not log.exists() or "pip install" not in log.read_text():
            assert made.poll() is None and time.monotonic() < end
            time.sleep(0.02)
        os.killpg(made.pid, signal.SIGINT)  # as a terminal does at Ctrl-C
        assert made.stderr is not None and "stopped while it installed" in made.stderr.read()
    assert made.returncode == 1 and not (tmp_path / ".venv" / "stamp").exists()


@pytest.mark.parametrize("extras", [("demo",), ("demo", "test", "docs")])
def test_what_is_installed_is_not_installed_again(tmp_path: Path, extras: tuple[str, ...]) -> None:
    environment, log = checkout(tmp_path, STUB), tmp_path / "log"

    def make(*extras: str) -> list[str]:
        log.write_text("")
        subprocess.run([tmp_path / ".ci" / "venv", *extras], env=environment, check=True, stdout=subprocess.DEVNULL)
        return [line for line in log.read_text().splitlines() if "pip install" in line]

    assert len(make(*extras)) == 1
    assert not make(*extras) and not make(extras[0])
    assert len(make(*extras, "keras")) == 1
