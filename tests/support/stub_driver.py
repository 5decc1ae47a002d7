# SPDX-License-Identifier: Apache-2.0
"""Triton's real launcher over a driver that does nothing, for tests; benchmarks/stub_driver says what that shows.

@NEEDS_STUB
def test_something() -> None:
    assert run("gpu_rnn.LSTM(4, 8, backend='resident')(torch.randn(3, 2, 4)); print(len(driver.launches))") == "1"
"""

import pytest

from benchmarks.stub_driver.process import missing, run

__all__ = ["NEEDS_STUB", "run"]

NEEDS_STUB = pytest.mark.skipif(bool(missing()), reason=f"not found: {missing() or 'nothing'}")
