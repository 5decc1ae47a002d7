# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/sanitize.py`: what NVIDIA's tools report is a failure, and what they do not see is not believed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import certify, sanitize
from benchmarks.certifying import record
from benchmarks.certifying.certificate import NOT_RUN, Outcome
from gpu_rnn.backends.group import nvrtc
from tests.support.paths import ROOT

TOOL = """#!/bin/sh
while [ $# -gt 0 ]; do case $1 in
    --tool) tool=$2 ;; --log-file) log=$2 ;; --kernels) done=$2 ;; --planted) planted=yes ;; --kernel-name) names=$2 ;;
esac; shift; done
case $names in regex=*) ;; *) exit 0 ;; esac  # no kernel has parentheses in its name
if [ -n "$planted" ]; then [ $tool != "$BLIND" ] && exit 86; echo '========= Device not supported' > "$log"; exit 1; fi
echo '{"name": "group LSTM", "outcome": "begun"}' >> "$done"
[ $tool = memcheck ] && exit 0
printf '========= Error: Race reported at group_forward\\n========= RACECHECK SUMMARY: 1 hazard\\n' > "$log"
exit 86
"""


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script in the place of NVIDIA's tool, whose memcheck finds nothing and whose racecheck finds something."""
    path = tmp_path / "compute-sanitizer"
    path.write_text(TOOL)
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv(record.RECORD, str(tmp_path / "record"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sanitize, "_build", lambda backend: None)


def test_what_a_sanitizer_reports_is_a_failure(tool: None, tmp_path: Path) -> None:
    assert sanitize.main([]) == 1
    found = record.read(tmp_path / "record")
    assert [end["name"] for end in found.of("passed")] == ["memcheck group LSTM"]
    assert [(end["name"], end["detail"]) for end in found.of("failed")] == [
        ("racecheck", "exit status 86 in group LSTM: Error: Race reported at group_forward")
    ]


@pytest.mark.parametrize("blind", sanitize.TOOLS)
def test_a_sanitizer_that_sees_no_planted_fault_was_not_run(
    blind: str, tool: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under a runtime that it does not know, or where no kernel is of the names that it was given."""
    monkeypatch.setenv("BLIND", blind)
    assert sanitize.main([]) == sanitize.NOTHING_RAN
    found, outcome = record.read(tmp_path / "record"), Outcome("sanitizer", "", [])
    certify.judge(outcome, found, [sanitize.NOTHING_RAN], "")
    assert outcome.status == NOT_RUN
    assert outcome.skips == {f"{blind} does not report them: exit status 1, Device not supported": 1}


def test_the_sanitizers_look_at_every_kernel_of_ours() -> None:
    (names,) = (option.removeprefix("regex=") for option in sanitize.OPTIONS if option.startswith("regex="))
    kernels = re.findall(r'extern "C" __global__ void (\w+)\(', sanitize.PLANTED)
    for path in (ROOT / "kernels" / "cuda").glob("*.cu"):
        kernels += re.findall(r'extern "C" __global__ void (?:LAUNCH_BOUNDS )?(\w+)\(', path.read_text())
    for backend in ("resident", "step"):
        text = (ROOT / "kernels" / "triton" / f"{backend}.py").read_text()
        kernels += re.findall(rf"@triton.jit.*\ndef ({backend}_\w+)\(", text)
    assert len(kernels) == 7 and all(re.search(names, name) for name in kernels)


@pytest.mark.compile("nvrtc")
def test_the_planted_kernel_compiles() -> None:
    assert nvrtc.compile_cubin(sanitize.PLANTED, "sm_90a")


@pytest.mark.skipif(sanitize.compute_sanitizer() is None, reason="compute-sanitizer is not installed")
def test_the_sanitizers_options_are_known() -> None:
    """Without a GPU the tool ends at once, but not before it has read them."""
    command = [sanitize.compute_sanitizer(), *sanitize.OPTIONS, "--require-cuda-init", "no", sys.executable, "-c", ""]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not re.search("deprecated|ill-formed|unrecogni[sz]ed|Usage", done.stdout + done.stderr)


@pytest.mark.gpu
def test_the_sanitizer_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if sanitize.compute_sanitizer() is None:
        pytest.skip(sanitize.MISSING)
    monkeypatch.setattr(sanitize, "_build", lambda backend: None)
    monkeypatch.setattr(sanitize, "_check", lambda *arguments: 0)  # certify.py's own step
    monkeypatch.setenv(record.RECORD, str(tmp_path / "record"))
    status = sanitize.main([])
    if status == sanitize.NOTHING_RAN:
        pytest.skip("; ".join(record.read(tmp_path / "record").reasons))  # a runtime that the tool does not know
    assert status == 0
