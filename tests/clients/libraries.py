# SPDX-License-Identifier: Apache-2.0
"""Libraries that these tests are of, or the reason why a test is skipped without one."""

from __future__ import annotations

from typing import Any

import pytest


def library(name: str, installs: str, extra: str = "clients") -> Any:
    """A module of a library. `make test-clients` installs them all; `installs` is the package to ask for."""
    return pytest.importorskip(
        name, reason=f"needs {installs}: pip install 'gpu-rnn[{extra}]', or make test-clients", exc_type=ImportError
    )
