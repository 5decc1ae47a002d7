# SPDX-License-Identifier: Apache-2.0
"""The two recordings that the demo learns: JapaneseVowels comes with the package, PLAID with sktime."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_sequence

__all__ = ["Dataset", "Split", "japanese_vowels", "plaid", "read_ts"]

VOWELS_FILE = "japanese_vowels.npz"
VOWELS_TRAIN, VOWELS_TEST, VOWELS_CHANNELS, VOWELS_SPEAKERS = 270, 370, 12, 9

# PLAID's currents span 1e-6 to 460 (the file's own values), so they are learnt on a logarithmic scale that is straight
# below FLOOR, the noise of an outlet with nothing switched on.
PLAID_FLOOR = 1e-4
PLAID_TRAIN, PLAID_TEST, PLAID_CLASSES = 537, 537, 11


@dataclass(frozen=True)
class Split:
    """Recordings of different lengths, zero-padded at the end."""

    inputs: Tensor  # (N, T, C) float32, where T is the longest recording's length
    lengths: Tensor  # (N,) int64, on the CPU as pack_padded_sequence wants it
    labels: Tensor  # (N,) int64

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Split:
        return replace(self, inputs=self.inputs.to(device), labels=self.labels.to(device))

    def packed(self, rows: Tensor | None = None) -> PackedSequence:
        """Packs the named rows (all by default) with their true lengths.

        Args:
            rows: (B,) int64 on the CPU.
        """
        rows = torch.arange(len(self)) if rows is None else rows
        inputs = self.inputs[rows.to(self.inputs.device)]
        return pack_padded_sequence(inputs, self.lengths[rows], batch_first=True, enforce_sorted=False)


@dataclass(frozen=True)
class Dataset:
    """A named data set with its standard split."""

    name: str
    train: Split
    test: Split
    classes: int
    peak_rate: float  # learning rate; of 1e-3, 3e-3 and 1e-2 the one that learns best with torch.nn

    @property
    def channels(self) -> int:
        return self.train.inputs.shape[2]

    def to(self, device: torch.device) -> Dataset:
        return replace(self, train=self.train.to(device), test=self.test.to(device))

    def __str__(self) -> str:
        lengths = torch.cat((self.train.lengths, self.test.lengths))
        return (
            f"{self.name}: {len(self.train)} training and {len(self.test)} test recordings, "
            f"{self.channels} channel{'s' * (self.channels > 1)}, "
            f"{int(lengths.min())} to {int(lengths.max()):,} steps, {self.classes} classes"
        )


def japanese_vowels() -> Dataset:
    """Nine speakers saying /ae/: 12 cepstrum coefficients, 7 to 29 steps; the class is the speaker.

    Each channel is standardised with the training set's mean and deviation.

    Source: M. Kudo, J. Toyama, M. Shimbo, "Multidimensional curve classification using passing-through regions",
    Pattern Recognition Letters 20 (1999) 1103-1111; UCI Machine Learning Repository, doi 10.24432/C5NS47, CC BY 4.0.

    Raises:
        RuntimeError: the file in the package is not the one that was released.

    Example:
        >>> from gpu_rnn.demo.datasets import japanese_vowels
        >>> print(japanese_vowels())
        JapaneseVowels: 270 training and 370 test recordings, 12 channels, 7 to 29 steps, 9 classes
    """
    path = resources.files("gpu_rnn.demo").joinpath("data", VOWELS_FILE)
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        steps, lengths, labels = (torch.from_numpy(arrays[key]) for key in ("steps", "lengths", "labels"))
    count = VOWELS_TRAIN + VOWELS_TEST
    right = (
        lengths.shape == labels.shape == (count,)
        and steps.shape == (int(lengths.sum()), VOWELS_CHANNELS)
        and labels.unique().tolist() == list(range(VOWELS_SPEAKERS))
    )
    if not right:
        raise RuntimeError(
            f"{path} is damaged: reinstall gpu-rnn, or make it again with tools/convert_japanese_vowels.py"
        )
    in_train = steps[: int(lengths[:VOWELS_TRAIN].sum())]
    steps = (steps - in_train.mean(0)) / in_train.std(0)
    recordings = list(steps.split(lengths.tolist()))
    return _dataset("JapaneseVowels", recordings, labels.long(), VOWELS_TRAIN, VOWELS_SPEAKERS, peak_rate=3e-3)


def plaid() -> Dataset:
    """Eleven kinds of household appliance by the current they draw, 100 to 1,344 steps.

    Two channels, the current and its change since the step before, both on a signed logarithmic scale. The recordings
    are read from an installed sktime, which is not imported.

    Source: J. Gao et al., "PLAID: a public dataset of high-resolution electrical appliance measurements for load
    identification research", BuildSys 2014.

    Raises:
        ModuleNotFoundError: sktime, or the data set in it, is missing; the message says what to install.
    """
    folder = _sktime_folder() / "datasets" / "data" / "PLAID"
    if not folder.is_dir():
        raise ModuleNotFoundError(f"this sktime has no {folder}: pip install --upgrade 'gpu-rnn[long]'")
    train, train_labels = read_ts(folder / "PLAID_TRAIN.ts")
    test, test_labels = read_ts(folder / "PLAID_TEST.ts")
    names = sorted(set(train_labels), key=int)
    if (len(train), len(test), len(names)) != (PLAID_TRAIN, PLAID_TEST, PLAID_CLASSES):
        raise RuntimeError(f"{folder} is not PLAID as released (537 + 537 recordings of 11 appliances)")
    labels = torch.tensor([names.index(label) for label in train_labels + test_labels])
    recordings = [_current_and_change(current) for current in map(torch.from_numpy, train + test)]
    return _dataset("PLAID", recordings, labels, PLAID_TRAIN, PLAID_CLASSES, peak_rate=1e-2)


def read_ts(path: Path) -> tuple[list[np.ndarray], list[str]]:
    """Reads a file of the .ts format: one recording a line, its channels and then its label between colons.

    Returns:
        The recordings, each (T, C) float32, and their labels as written.

    Source of the format: https://www.sktime.net/en/stable/api_reference/file_specifications/ts.html
    """
    recordings, labels = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line or line.startswith(("#", "@")):
            continue
        *channels, label = line.split(":")
        columns = [np.array(channel.split(","), dtype=np.float64) for channel in channels]
        recordings.append(np.stack(columns, axis=1).astype(np.float32))
        labels.append(label.strip())
    return recordings, labels


def _sktime_folder() -> Path:
    spec = importlib.util.find_spec("sktime")  # finds the package without paying for its import
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("PLAID comes with sktime, which is not installed: pip install 'gpu-rnn[long]'")
    return Path(spec.origin).parent


def _current_and_change(current: Tensor) -> Tensor:  # (T, 1) -> (T, 2)
    both = torch.cat((current, torch.diff(current, dim=0, prepend=current[:1])), dim=1)
    return both.sign() * (both.abs() / PLAID_FLOOR).log1p() / 5  # 5: most values then lie within 1 of 0


def _dataset(
    name: str, recordings: list[Tensor], labels: Tensor, n_train: int, classes: int, *, peak_rate: float
) -> Dataset:
    def split(part: slice) -> Split:
        lengths = torch.tensor([len(recording) for recording in recordings[part]])
        return Split(pad_sequence(recordings[part], batch_first=True), lengths, labels[part])

    return Dataset(name, split(slice(0, n_train)), split(slice(n_train, None)), classes, peak_rate)
