# SPDX-License-Identifier: Apache-2.0
"""The stub driver under Triton's launcher: it sees every launch, and its failures come out as a driver's would."""

import pytest

from tests.support.stub_driver import NEEDS_STUB, run

pytestmark = [pytest.mark.compile, NEEDS_STUB]

LAYER = """
def layer(backend):
    gpu_rnn.LSTM(4, 8, backend=backend, activation="relu").requires_grad_(False)(torch.randn(3, 2, 4))
"""


def test_launches_and_modules_are_seen() -> None:
    found = run(
        LAYER
        + """
layer("resident")
print(*(launch.kernel for launch in driver.launches), *driver.modules, driver.launches[0].threads)
layer("resident")
print(len(driver.launches), len(driver.modules))
driver.clear()
layer("step")
print(*(launch.kernel for launch in driver.launches), *driver.modules)
"""
    )
    assert found.splitlines() == [
        "resident_forward resident_forward 64", "2 1", "step_forward step_forward step_forward step_forward"
    ]  # fmt: skip


def test_failures_are_the_drivers() -> None:
    found = run(
        LAYER
        + """
driver.fail(launches=719)
try:
    layer("resident")
except RuntimeError as error:
    print(error)
"""
    )
    assert "status 719 of the stub driver" in found
