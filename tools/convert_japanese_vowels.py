# SPDX-License-Identifier: Apache-2.0
"""Makes gpu_rnn/demo/data/japanese_vowels.npz from the .ts files in sktime's wheel.

    pip download sktime==1.2.0 --no-deps
    python tools/convert_japanese_vowels.py sktime-1.2.0-py3-none-any.whl

The values are the file's own, rounded to float32; nothing is scaled, padded or left out.
"""

from __future__ import annotations

import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from gpu_rnn.demo.datasets import VOWELS_FILE, read_ts

TARGET = Path(__file__).parents[1] / "gpu_rnn" / "demo" / "data" / VOWELS_FILE
MEMBERS = [f"sktime/datasets/data/JapaneseVowels/JapaneseVowels_{part}.ts" for part in ("TRAIN", "TEST")]


def convert(wheel: Path, target: Path = TARGET) -> None:
    """Writes steps (sum of T, 12) float32, lengths (640,) and labels (640,) int64, the 270 training recordings
    first."""
    recordings: list[np.ndarray] = []
    labels: list[int] = []
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        for member in MEMBERS:
            found, names = read_ts(Path(archive.extract(member, folder)))
            recordings += found
            labels += [int(name) - 1 for name in names]  # speakers are numbered from 1 in the file
    lengths = np.array([len(recording) for recording in recordings])
    np.savez_compressed(target, steps=np.concatenate(recordings), lengths=lengths, labels=np.array(labels))
    print(f"{target}: {len(recordings)} recordings, {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    convert(Path(sys.argv[1]))
