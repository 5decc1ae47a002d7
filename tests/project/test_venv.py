# SPDX-License-Identifier: Apache-2.0
"""`.ci/venv` installs what is missing, once."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.paths import ROOT

STUB = """#!/bin/sh
# Stands for Python: makes a .venv of itself, and writes down what it is asked.
echo "$@" >> "$LOG"
case "$*" in
    "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    *%d.%d*) echo 3.11 ;;
esac
"""


@pytest.mark.parametrize("extras", [("demo",), ("demo", "test", "docs")])
def test_what_is_installed_is_not_installed_again(tmp_path: Path, extras: tuple[str, ...]) -> None:
    (tmp_path / ".ci").mkdir()
    for name in (".ci/venv", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    stub, log = tmp_path / "python", tmp_path / "log"
    stub.write_text(STUB)
    stub.chmod(0o755)

    def make(*extras: str) -> list[str]:
        log.write_text("")
        environment = {**os.environ, "PYTHON": str(stub), "LOG": str(log)}
        subprocess.run([tmp_path / ".ci" / "venv", *extras], env=environment, check=True, stdout=subprocess.DEVNULL)
        return [line for line in log.read_text().splitlines() if "pip install" in line]

    assert len(make(*extras)) == 1
    assert not make(*extras) and not make(extras[0])
    assert len(make(*extras, "keras")) == 1
