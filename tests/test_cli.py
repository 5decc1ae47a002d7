# SPDX-License-Identifier: Apache-2.0
"""The gpu-rnn command as a user meets it: its help, its reports, its errors, Ctrl-C."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gpu_rnn
from gpu_rnn import cli
from gpu_rnn.demo import command
from gpu_rnn.dispatch import choice
from tests.support.waiting import PATIENCE

COMMAND = [sys.executable, "-m", "gpu_rnn"]
ENVIRONMENT = {**os.environ, "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": ""}
needs_extras = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("matplotlib", "tqdm")),
    reason="needs matplotlib and tqdm: pip install 'gpu-rnn[demo]'",
)


def _run(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=cwd,
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


@pytest.mark.parametrize("command", ["doctor", "explain", "tune", "convert", "demo", "bench"])
def test_each_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        cli.main([command, "--help"])
    assert leave.value.code == 0
    assert f"usage: gpu-rnn {command}" in capsys.readouterr().out


def test_help_names_every_command_and_gives_examples(tmp_path: Path) -> None:
    done = _run("--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in ("doctor", "explain", "tune", "convert", "demo", "bench", "examples:"))


def test_the_command_line_loads_nothing_before_it_is_asked() -> None:
    heavy = {"matplotlib", "gpu_rnn.demo", "gpu_rnn.diagnostics.doctor"}
    code = f"import sys, gpu_rnn.cli; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_doctor_reports_versions_and_every_backend(tmp_path: Path) -> None:
    done = _run("doctor", cwd=tmp_path, CC="no-compiler")
    assert done.returncode == 0, done.stderr
    assert f"torch {torch.__version__}" in done.stdout
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if line.split()[:1]}
    assert choice.BACKENDS.keys() <= rows.keys()
    assert "needs an NVIDIA GPU" in rows["resident"]
    assert "CC is 'no-compiler' in the environment, which is not found" in rows["native"]
    assert "chosen" in rows["aten"]


@pytest.mark.parametrize(
    "options",
    [
        ["--hidden", "512", "--batch", "64", "--dtype", "bf16", "--device", "H100"],
        [
            "--cell",
            "gru",
            "--hidden",
            "100",
            "--input",
            "12",
            "--reset-before",
            "--recurrent-activation",
            "hard_sigmoid",
        ],
        ["--cell", "lstm", "--hidden", "40", "--peephole", "--bidirectional", "--layers", "2"],
        ["--cell", "rnn", "--hidden", "40", "--activation", "relu", "--steps", "1", "--dtype", "fp64"],
    ],
    ids=" ".join,
)
def test_explain_prints_a_row_for_every_backend(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", *options]) == 0
    table = capsys.readouterr().out
    assert all(backend in table for backend in choice.BACKENDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["doctor", "--device", "abacus"], "no device of torch"),
        (["doctor", "--device", "cuda:99"], "leave --device out"),
        (["explain", "--hidden", "8", "--device", "Abacus 1"], "Abacus 1"),
        (["explain", "--hidden", "8", "--activation", "wavy"], "wavy"),
        (["explain", "--hidden", "8", "--cell", "gru", "--peephole"], "a GRU has no --peephole"),
        (["explain", "--hidden", "8", "--cell", "gru", "--proj", "4"], "a GRU has no --proj"),
        (["explain", "--hidden", "8", "--cell", "lstm", "--reset-before"], "an LSTM has no --reset-before"),
        (["explain", "--hidden", "8", "--cell", "rnn", "--peephole"], "an RNN has no --peephole"),
        (["explain", "--hidden", "8", "--proj", "8"], "proj_size has to be smaller than hidden_size"),
        (["explain", "--hidden", "1000000"], "CPU has"),
        (["explain", "--hidden", "9999999999"], "no tensors of such sizes can be made on meta: Storage size"),
        (["explain", "--hidden", "64", "--steps", "100000000000"], "GiB: those grow with T and B"),
        (["tune", "--hidden", "1000000", "--layers", "10"], "GiB: W_hh grows with the square of the hidden units"),
    ],
    ids=" ".join,
)
def test_mistakes_get_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("gpu-rnn: ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["doctor", "--x"], "gpu-rnn doctor: error: unrecognized arguments: --x"),
        (["explain", "--hidden", "4", "--zonout=0.1"], "arguments: --zonout=0.1; did you mean --zoneout?"),
        (["explain", "--hiden", "4"], "arguments: --hiden; did you mean --hidden?"),
        (["tune", "--hidden", "4", "--bidirektional"], "arguments: --bidirektional; did you mean --bidirectional?"),
        (["explain", "--hidden", "abc"], "must be a whole number, not 'abc'"),
        (["explain", "--hidden", "9" * 20], "must be less than 2^63, not 99999999999999999999"),
        (["explain", "--hidden", "-3"], "must be more than 0, not -3"),
        (["tune", "--hidden", "4", "--seconds", "0"], "must be more than 0, not 0"),
        (["bench", "--seconds", "soon"], "must be a number, not 'soon'"),
    ],
    ids=" ".join,
)
def test_mistakes_in_options_show_the_usage_of_the_command(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leave:
        cli.main(arguments)
    assert leave.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"usage: gpu-rnn {arguments[0]} ") and words in error


SOURCE = """
import torch
import torch.nn as layers
from torch.nn import GRU as Gated

class Own(layers.LSTM): ...

def make(size):
    return torch.nn.Sequential(torch.nn.LSTM(4, size, num_layers=2, batch_first=True, bidirectional=True), Gated(4, 4))
"""


def test_convert_says_what_it_would_do_with_a_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, other = tmp_path / "model.py", tmp_path / "other.py"
    file.write_text(SOURCE)
    other.write_text("raise SystemExit('this was run')")
    assert cli.main(["convert", "--dry-run", str(file)]) == cli.main(["convert", "--dry-run", str(other)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{file}:6: class Own is left: a subclass, change its base class",
        f"{file}:9: torch.nn.LSTM(4, size, num_layers=2, batch_first=True, bidir… becomes gpu_rnn.LSTM",
        f"{file}:9: Gated(4, 4) becomes gpu_rnn.GRU",
        f"{other} makes none of torch.nn's recurrent layers",
    ]


def test_convert_loads_a_whole_model_only_if_told_to_trust_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, weights, text = (tmp_path / name for name in ("model.pt", "weights.pt", "text.pt"))
    torch.save(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LSTM(8, 16)), model)
    torch.save(torch.nn.LSTM(8, 16).state_dict(), weights)
    assert cli.main(["convert", "--dry-run", "--trust", str(model)]) == 0
    assert capsys.readouterr().out == "1 of 1 recurrent modules would be gpu_rnn's\n  1: LSTM(8, 16)\n"
    assert cli.main(["convert", "--dry-run", str(weights)]) == 0
    assert "holds weights and no modules" in capsys.readouterr().out
    for file, words in ((model, "if you trust it, add --trust"), (tmp_path / "none", "no file")):
        assert cli.main(["convert", "--dry-run", str(file)]) == 1
        assert words in capsys.readouterr().err
    for content in (b"", b"no pickle", b"hello", b"()", b"\x00\x01", model.read_bytes()[:100]):
        text.write_bytes(content)
        for trust in ([], ["--trust"]):
            assert cli.main(["convert", "--dry-run", *trust, str(text)]) == 1
            assert "is nothing that torch.save wrote" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_convert_knows_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model and its program are both zip files; torch's errors for them are about its own loaders."""
    model, x = torch.nn.Linear(4, 8), torch.randn(2, 4)
    torch.jit.save(torch.jit.trace(model, x), tmp_path / "script.pt")
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "exported.pt2")
    for file, kind in (("script.pt", "a TorchScript program"), ("exported.pt2", "an exported program")):
        assert cli.main(["convert", "--dry-run", str(tmp_path / file)]) == 1
        assert f"is {kind}, whose layers are operations: convert the model" in capsys.readouterr().err


def test_whoever_stops_reading_is_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} -m gpu_rnn explain --hidden 8 | head -1"
    shown = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True)
    assert shown.stdout.startswith("lstm: T 100") and not shown.stderr


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        cli.main(["--version"])
    assert (leave.value.code, capsys.readouterr().out) == (0, f"gpu-rnn {gpu_rnn.__version__}\n")


@pytest.mark.parametrize("command", ["explain", "tune"])
def test_both_commands_mean_both_passes(command: str) -> None:
    parser = cli._parser()
    told = [["--hidden", "4", *more] for more in ([], ["--training"], ["--inference"])]
    assert [parser.parse_args([command, *options]).training for options in told] == [True, True, False]


def test_options_of_the_layers_reach_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        cli.main(["explain", "--hidden", "8", "--clip", "3", "--zoneout", "0.1", "--heads", "2", "--device", "H100"])
        == 0
    )
    said = capsys.readouterr().out
    assert ", zoneout, " in said and "without clip only, not this lstm" in said and "hidden 8 in 2 heads" in said


def test_what_training_saves_and_drops_reaches_the_layers(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["explain", "--hidden", "64", "--save", "states", "--recurrent-dropout", ".2", "--device", "H100"]
    assert cli.main(asked) == 0
    said = capsys.readouterr().out
    assert "recurrent dropout" in said and "a layer, are made again" in said


def test_normalisations_reach_the_layers(capsys: pytest.CaptureFixture[str]) -> None:
    for flag, words in (("--layer-norm", "layer normalisation"), ("--rms-norm", "RMS normalisation")):
        assert cli.main(["explain", "--cell", "gru", "--hidden", "8", flag, "--device", "H100"]) == 0
        assert f"does not take {words}" in capsys.readouterr().out
    assert cli.main(["explain", "--hidden", "8", "--layer-norm", "--rms-norm"]) == 1
    assert "two ways to normalise the same products" in capsys.readouterr().err


def test_devices_in_any_case_and_for_inference(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "--hidden", "8", "--device", "rtx4090", "--inference"]) == 0
    assert "float32, inference, on RTX 4090" in capsys.readouterr().out
    assert cli.main(["explain", "--hidden", "8", "--device", "h100 SXM 80gb"]) == 0
    assert "forward and backward, on H100 SXM 80GB" in capsys.readouterr().out


@pytest.mark.parametrize("folder", ["a checkout", "elsewhere"])
def test_bench_times_the_demo_s_layers_wherever_it_is(
    folder: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if folder == "elsewhere":
        monkeypatch.setattr(cli, "__file__", str(tmp_path / "gpu_rnn" / "cli.py"))
    timed: list[tuple[str, str, float]] = []
    monkeypatch.setattr(
        command, "_time_layers", lambda data, seconds: timed.append((data.name, data.train.inputs.device.type, seconds))
    )
    assert cli.main(["bench", "--device", "cpu"]) == cli.main(["bench", "--device", "cpu", "--seconds", "0.5"]) == 0
    assert timed == [("JapaneseVowels", "cpu", 2.0), ("JapaneseVowels", "cpu", 0.5)]


def test_no_seeds_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["demo", "--seeds", "0"])
    assert "must be more than 0, not 0" in capsys.readouterr().err


def test_missing_extras_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["demo", "--quick"]) == 1
    assert "matplotlib and tqdm: pip install 'gpu-rnn[demo]'" in capsys.readouterr().err


@needs_extras
def test_the_quick_demo_runs_to_its_picture(tmp_path: Path) -> None:
    done = _run("demo", "--quick", "--out", "it.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")
    for part in (
        "backend",
        "within torch.nn's range",
        "torch.nn has no such layer",
        "ratio",
        str(tmp_path / "it.png"),
    ):
        assert part in done.stdout
    assert "OUTSIDE" not in done.stdout


def _heed_ctrl_c() -> None:
    """A shell that runs the tests in the background has its children ignore SIGINT, and theirs after them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@needs_extras
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT as POSIX has it")
def test_ctrl_c_ends_the_demo_with_one_line(tmp_path: Path) -> None:
    with subprocess.Popen(
        [*COMMAND, "demo"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=_heed_ctrl_c,
    ) as demo:
        assert demo.stdout is not None
        assert any(line.startswith("JapaneseVowels") for line in demo.stdout)  # waits until training begins
        demo.send_signal(signal.SIGINT)
        _, errors = demo.communicate(timeout=PATIENCE)
    assert demo.returncode == 130
    assert "Traceback" not in errors
    assert errors.rstrip().splitlines()[-1].endswith("gpu-rnn: stopped.")
    assert list(tmp_path.iterdir()) == []
