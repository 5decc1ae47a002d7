# SPDX-License-Identifier: Apache-2.0
"""What conftest.py collects where: on a bare GPU machine, and in the runs of `python tests`."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from gpu_rnn.backends.native import launch as native
from tests.support import resuming
from tests.support.paths import ROOT, TESTS

pytest_plugins = ["pytester"]

# What an image with PyTorch, Triton, CuPy and pytest lacks; importing them raises, find_spec says that they are not
# there.
BARE = ("build", "expecttest", "keras", "mkdocs", "sktime")
COLLECT = f"import pytest, sys; sys.modules |= dict.fromkeys({BARE}); sys.exit(pytest.main(sys.argv[1:]))"
MARKED = re.compile(r"^@pytest\.mark\.gpu|marks=pytest\.mark\.gpu", re.M)


def test_a_bare_gpu_machine_collects_every_gpu_test() -> None:
    """Packages that are missing there cost the tests that need them, and no others."""
    command = [sys.executable, "-c", COLLECT, "--collect-only", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    tests = [line for line in done.stdout.splitlines() if "::" in line]
    files = {line.partition("::")[0] for line in tests}
    marked = {path.relative_to(ROOT).as_posix() for path in TESTS.rglob("test_*.py") if MARKED.search(path.read_text())}
    assert marked - files == {"tests/keras/test_numerics.py"} and "Keras is not installed" in done.stdout
    assert len(tests) > 400


@pytest.fixture
def checkout(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A folder with our conftest.py, whose pytest runs within this process."""
    for name in ("GPU_RNN_CACHE", "TRITON_CACHE_DIR", "TRITON_INTERPRET", "GPU_RNN_TESTS", "GPU_RNN_LEFT"):
        monkeypatch.setenv(name, "")  # what conftest.py sets is undone
        monkeypatch.delenv(name)
    (pytester.path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    pytester.makeconftest((TESTS / "conftest.py").read_text())
    return pytester


def test_a_file_whose_extra_is_missing_is_skipped(checkout: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "expecttest", None)
    checkout.makepyfile(test_other="def test(): pass", test_wants="import expecttest\ndef test(): pass")
    done = checkout.runpytest(".")
    done.assert_outcomes(passed=1, skipped=1)
    done.stdout.fnmatch_lines("SKIPPED * test_wants.py:1: expecttest is not installed: pip install 'gpu-rnn?test?'")


@pytest.mark.parametrize("name", ["gpu_rnn.no_such_part", "no_such_package", "hypothesis.no_such_part"])
def test_a_file_that_cannot_be_imported_is_an_error(name: str, checkout: pytest.Pytester) -> None:
    checkout.makepyfile(test_broken=f"import {name}")
    done = checkout.runpytest(".")
    done.assert_outcomes(errors=1)
    done.stdout.fnmatch_lines(f"*No module named '{name}'")


def test_only_files_that_name_the_wanted_marker_are_imported(checkout: pytest.Pytester) -> None:
    checkout.makepyfile(
        test_plain="raise RuntimeError('imported')", test_gpu="import pytest\n@pytest.mark.gpu\ndef test(): pass"
    )
    checkout.runpytest(".", "-m", "gpu and not slow").assert_outcomes(skipped=1)
    checkout.runpytest(".", "-m", "gpu or slow").assert_outcomes(errors=1)
    checkout.runpytest(".", "-m", "not slow").assert_outcomes(errors=1)


def test_a_marker_from_another_file_is_refused(checkout: pytest.Pytester) -> None:
    """It would leave the file out, unsaid, where only such tests are wanted."""
    checkout.makepyfile(
        shared="import pytest\nNEEDS_A_GPU = pytest.mark.gpu",
        test_far="import shared\n@shared.NEEDS_A_GPU\ndef test(): pass",
    )
    done = checkout.runpytest(".")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines("*test_far.py::test has the marker gpu from another file: name it in its own")


def test_a_run_within_this_process_leaves_the_cost_of_native(checkout: pytest.Pytester) -> None:
    cost = native.cost
    checkout.makepyfile("def test(): pass")
    checkout.runpytest(".").assert_outcomes(passed=1)
    assert native.cost is cost


MARKS = ("gpu(alone=True)", "interpreter", "alone", "gpu", "slow")
SOME = "import pytest\n" + "".join(f"@pytest.mark.{mark}\ndef test_{k}(): pass\n" for k, mark in enumerate(MARKS))


@pytest.mark.parametrize(
    ("interpret", "wanted", "left", "skipped"),
    [("0", "others", {"interpreter": 1, "alone": 1}, 2), ("0", "alone", {"interpreter": 1, "others": 2}, 0)],
)
def test_what_is_left_to_other_runs_is_counted(
    interpret: str,
    wanted: str,
    left: dict[str, int],
    skipped: int,
    checkout: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = checkout.path / "left"
    for name, value in {"TRITON_INTERPRET": interpret, "GPU_RNN_TESTS": wanted, "GPU_RNN_LEFT": str(path)}.items():
        monkeypatch.setenv(name, value)
    checkout.makepyfile(test_some=SOME)
    done = checkout.runpytest(".", "-m", "not slow", "-v")
    done.assert_outcomes(passed=int(wanted == "alone"), skipped=skipped, deselected=sum(left.values()) + 1)
    assert json.loads(path.read_text()) == left
    if skipped:  # what wants a GPU for itself comes last
        done.stdout.fnmatch_lines(["*::test_3 SKIPPED*", "*::test_0 SKIPPED*"])


@pytest.mark.parametrize(
    ("left", "started"),
    [
        ({"interpreter": 9, "alone": 1}, ["compiled", "interpreter", "alone"]),
        ({"interpreter": 9}, ["compiled", "interpreter"]),
        ({}, ["compiled"]),
        (None, ["compiled", "interpreter", "alone"]),  # pytest could not read the files
    ],
)
def test_runs_with_nothing_to_do_are_not_started(
    left: dict[str, int] | None,
    started: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    suite = runpy.run_path(str(TESTS / "__main__.py"))
    ran = []

    def run(name: str) -> tuple[int, Counter[str]]:
        ran.append(name)
        if left is not None:
            suite["LEFT"].write_text(json.dumps(left))
        return int(name == "compiled" and left is None), Counter(passed=2, failed=0, skipped=1)

    monkeypatch.setitem(suite["main"].__globals__, "run", run)
    for name in ("BUILD", "LEFT"):
        monkeypatch.setitem(suite["main"].__globals__, name, tmp_path / name)
    suite["LEFT"] = tmp_path / "LEFT"
    assert suite["main"]() == int(left is None)
    assert ran == started
    assert capsys.readouterr().out == f"total: {2 * len(ran)} passed, 0 failed, {len(ran)} skipped\n"


def test_runs_that_a_test_starts_do_not_say_what_this_one_leaves_to_others() -> None:
    assert "GPU_RNN_LEFT" not in os.environ


def test_a_run_that_was_broken_off_goes_on(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """What passed does not run again, until the code is another; what was red or skipped does."""
    (pytester.path / "build").mkdir()
    monkeypatch.setattr(resuming, "ROOT", pytester.path)
    monkeypatch.setenv("GPU_RNN_PASSED", str(pytester.path / "build" / "passed.txt"))
    monkeypatch.setenv("GPU_RNN_PASSED_BYTES", "0")  # undone, too
    pytester.makepyfile(
        test_some="""
        import pytest
        @pytest.fixture
        def torn():
            yield
            assert False
        @pytest.mark.parametrize("name", ["a b", "σ"])
        def test_good(name): pass
        def test_red(): assert False
        def test_torn(torn): pass
        def test_skipped(): pytest.skip("not here")
        """
    )
    arguments = ["-p", "tests.support.resuming", *(["-n1"] if importlib.util.find_spec("xdist") else [])]
    rest = {"passed": 1, "failed": 1, "errors": 1, "skipped": 1}
    pytester.runpytest(*arguments).assert_outcomes(**rest | {"passed": 3})
    again = pytester.runpytest(*arguments)
    again.assert_outcomes(**rest)  # test_torn passes each time, and its fixture fails after it
    again.stdout.fnmatch_lines("2 tests have passed before*")
    pytester.makepyfile(test_other="def test(): pass")
    pytester.runpytest(*arguments).assert_outcomes(**rest | {"passed": 4})
