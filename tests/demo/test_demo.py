# SPDX-License-Identifier: Apache-2.0
"""The demo's data, its training, its timing and its picture."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import gpu_rnn
from gpu_rnn.demo import command, datasets, picture
from gpu_rnn.demo.models import STANDARD, WITH_OPTIONS, PythonLoop, Variant
from gpu_rnn.demo.timing import Case, CaseTiming, measure, table
from gpu_rnn.demo.train import Epoch, Run, train

# The data set's own documentation: 30 recordings of each speaker to train on, and these to test on.
TEST_RECORDINGS = [31, 35, 88, 44, 29, 24, 40, 50, 29]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def vowels() -> datasets.Dataset:
    return datasets.japanese_vowels()


def test_vowels_are_those_of_the_documentation(vowels: datasets.Dataset) -> None:
    assert (len(vowels.train), len(vowels.test), vowels.channels, vowels.classes) == (270, 370, 12, 9)
    assert vowels.train.labels.bincount().tolist() == [30] * 9
    assert vowels.test.labels.bincount().tolist() == TEST_RECORDINGS
    lengths = torch.cat((vowels.train.lengths, vowels.test.lengths))
    assert (int(lengths.min()), int(lengths.max())) == (7, 29)
    assert vowels.train.lengths[:3].tolist() == [20, 26, 22]
    assert vowels.train.inputs.dtype == vowels.test.inputs.dtype == torch.float32


def test_vowels_are_standardised_over_true_steps_only(vowels: datasets.Dataset) -> None:
    steps = vowels.train.packed().data  # packing leaves the padding out
    assert len(steps) == int(vowels.train.lengths.sum())
    torch.testing.assert_close(steps.mean(0), torch.zeros(12), atol=1e-5, rtol=0)
    torch.testing.assert_close(steps.std(0), torch.ones(12), atol=1e-5, rtol=0)


def test_damaged_data_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "VOWELS_CHANNELS", 13)
    with pytest.raises(RuntimeError, match="damaged: reinstall"):
        datasets.japanese_vowels()


def test_packed_rows_keep_their_lengths(vowels: datasets.Dataset) -> None:
    rows = torch.tensor([5, 200, 17])
    unpacked, lengths = nn.utils.rnn.pad_packed_sequence(vowels.train.packed(rows), batch_first=True)
    assert lengths.tolist() == vowels.train.lengths[rows].tolist()
    torch.testing.assert_close(unpacked, vowels.train.inputs[rows, : int(lengths.max())])


def test_ts_files_are_read(tmp_path: Path) -> None:
    file = tmp_path / "x.ts"
    file.write_text("# comment\n@data\n1,2,3:4,5,6:spoken\n7:8:sung\n")
    recordings, labels = datasets.read_ts(file)
    assert [recording.tolist() for recording in recordings] == [[[1, 4], [2, 5], [3, 6]], [[7, 8]]]
    assert labels == ["spoken", "sung"]


def test_plaid_without_sktime_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'gpu-rnn\[long\]'"):
        datasets.plaid()


def test_plaid_is_read_from_sktime_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "sktime" / "datasets" / "data" / "PLAID"
    folder.mkdir(parents=True)
    (tmp_path / "sktime" / "__init__.py").write_text("raise AssertionError('imported')\n")
    lines = "".join(f"-0.5,{i},0:{i % 11}\n" for i in range(537))
    for part in ("TRAIN", "TEST"):
        (folder / f"PLAID_{part}.ts").write_text("@data\n" + lines)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = datasets.plaid()
    assert (len(found.train), len(found.test), found.channels, found.classes) == (537, 537, 2, 11)
    assert found.train.labels[:12].tolist() == [*range(11), 0]
    current, change = torch.tensor([-0.5, 10.0, 0.0]), torch.tensor([0.0, 10.5, -10.0])
    expected = torch.stack((current, change), dim=1)
    torch.testing.assert_close(found.train.inputs[10], expected.sign() * (1 + 1e4 * expected.abs()).log() / 5)


@pytest.mark.skipif(importlib.util.find_spec("sktime") is None, reason="needs sktime: pip install 'gpu-rnn[long]'")
def test_plaid_is_that_of_its_documentation() -> None:
    found = datasets.plaid()
    lengths = torch.cat((found.train.lengths, found.test.lengths))
    assert (int(lengths.min()), int(lengths.max()), found.classes) == (100, 1344, 11)


@pytest.mark.parametrize("variant", STANDARD + WITH_OPTIONS, ids=lambda variant: variant.label)
def test_two_epochs_lower_the_loss(variant: Variant, vowels: datasets.Dataset) -> None:
    first, second = train(variant, gpu_rnn, vowels, seed=0, epochs=2)
    assert second.loss < 0.95 * first.loss
    assert second.accuracy > 2 / 9  # guessing gives at most 88 of 370


def test_the_same_seed_trains_as_torch_does(vowels: datasets.Dataset) -> None:
    """Same weights at first and the same batches; what is left is rounding."""
    ours, theirs = (list(train(STANDARD[1], library, vowels, seed=3, epochs=2)) for library in (gpu_rnn, nn))
    for our, their in zip(ours, theirs, strict=True):
        assert our.loss == pytest.approx(their.loss, rel=1e-3)


@pytest.mark.parametrize("variant", WITH_OPTIONS, ids=lambda variant: variant.label)
def test_the_python_loop_computes_the_option_layers(variant: Variant, vowels: datasets.Dataset) -> None:
    layer = variant.layer(gpu_rnn, vowels.channels)
    packed = vowels.train.packed(torch.tensor([3, 100, 250, 9]))  # lengths differ and are not sorted
    torch.testing.assert_close(PythonLoop(layer)(packed)[0].data, layer(packed)[0].data, atol=1e-5, rtol=1e-5)


def test_a_wrong_result_is_not_timed(vowels: datasets.Dataset) -> None:
    layer, other = (STANDARD[1].layer(nn, vowels.channels) for _ in range(2))
    case = Case("GRU", layer, other, "another GRU", vowels.train.packed(torch.arange(4)), ("reference",) * 2)
    with pytest.raises(RuntimeError, match=r"GRU differs from another GRU by .* not timed"):
        measure(case, seconds=0.1)


def test_the_table_gives_their_time_over_ours(vowels: datasets.Dataset) -> None:
    case = Case(
        "GRU", nn.Identity(), nn.Identity(), "torch.nn.GRU", vowels.train.packed(torch.arange(2)), ("native", "step")
    )
    timing = CaseTiming(case, forward=(0.002, 0.003), training=(0.004, 0.002))
    lines = table([timing]).splitlines()
    assert lines[-4].split() == ["GRU", "2.00", "3.00", "1.50×", "4.00", "2.00", "0.50×"]
    assert lines[-3].split() == "beside torch.nn.GRU; backend native and step".split()
    assert "theirs divided by ours" in lines[-2] and "a C compiler" in lines[-1]
    both = replace(case, backends=("aten", "native"))  # where torch.nn's kernels run on both sides, a ratio is noise
    lines = table([replace(timing, case=both)]).splitlines()
    assert lines[-4].split() == ["GRU", "2.00", "3.00", "same", "4.00", "2.00", "0.50×"]
    assert lines[-1].startswith("same: ours are the kernels of torch.nn")
    longer = replace(case, label=60 * "x")
    rows = table([CaseTiming(each, (0.002, 0.003), (0.004, 0.002)) for each in (case, longer)]).splitlines()
    assert len({len(line) for line in rows[1:-2:2]}) == 1  # the heads and the figures line up


def test_the_verdict_compares_with_the_range_of_torch() -> None:
    def run(library: str, *accuracies: float) -> Run:
        return Run(STANDARD[0], library, [[Epoch(0.1, accuracy)] for accuracy in accuracies])

    theirs = run("torch.nn", 0.96, 0.98)
    assert "within" in command._accuracy_lines(run("gpu_rnn", 0.97, 0.98), theirs, 370)
    assert "OUTSIDE" in command._accuracy_lines(run("gpu_rnn", 0.95, 0.96), theirs, 370)


def _draw(path: Path) -> None:
    runs = [
        Run(STANDARD[0], library, [[Epoch(1.0, 0.5), Epoch(0.5, end)] for end in (0.9, 0.95)])
        for library in ("torch.nn", "gpu_rnn")
    ]
    case = SimpleNamespace(label="GRU", theirs_label="torch.nn.GRU", backends=("native", "aten"))
    picture.draw(
        runs, [CaseTiming(case, (1e-3, 2e-3), (2e-3, 4e-3))], data="D", timed="T", device="a device", path=path
    )


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'gpu-rnn[demo]'")
    _draw(tmp_path / "new" / "picture.png")
    assert (tmp_path / "new" / "picture.png").read_bytes().startswith(PNG)


def test_the_picture_has_the_mode_of_any_new_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'gpu-rnn[demo]'")
    (tmp_path / "other").touch()
    _draw(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_an_interrupted_picture_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pytest.importorskip("matplotlib.figure", reason="needs matplotlib: pip install 'gpu-rnn[demo]'")

    def interrupted(self: object, path: Path, **options: object) -> None:
        path.write_bytes(PNG)
        raise KeyboardInterrupt

    monkeypatch.setattr(figure.Figure, "savefig", interrupted)
    target = tmp_path / "picture.png"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        _draw(target)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"picture.png": "old"}
