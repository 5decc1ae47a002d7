# SPDX-License-Identifier: Apache-2.0
"""Where the folders of the checkout are."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
BUILD = ROOT / "build"
DATA = TESTS / "data"
