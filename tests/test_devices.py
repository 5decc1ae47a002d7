# SPDX-License-Identifier: Apache-2.0
"""What the cost models are told of a device that a driver names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

from gpu_rnn import devices

GPU = torch.device("cuda", 0)
Describe = Callable[..., devices.Device]


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> Iterator[Describe]:
    """The device that a driver describes so."""

    def found(name: str, major: int, minor: int, sms: int, **measured: int) -> devices.Device:
        properties = SimpleNamespace(
            name=name,
            major=major,
            minor=minor,
            multi_processor_count=sms,
            shared_memory_per_block_optin=232448,
            **measured,
        )
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        devices._gpu.cache_clear()
        return devices.of(GPU)

    yield found
    devices._gpu.cache_clear()


@pytest.mark.parametrize(("name", "rate"), [("NVIDIA H200", 4800.0), ("NVIDIA H100 80GB HBM3", 3350.0)])
def test_relatives_are_told_apart_by_name(name: str, rate: float, described: Describe) -> None:
    found = described(name, 9, 0, 132)
    assert (found.name, found.memory_rate, found.clock) == (name, rate, 1.83)
    assert found.tensor_flops == pytest.approx(989.4)


def test_a_stranger_is_measured(described: Describe) -> None:
    """An H100 NVL by its driver: 2 x 2619 MHz x 6016 bits."""
    found = described(
        "NVIDIA H100 NVL", 9, 0, 132, memory_clock_rate=2619000, memory_bus_width=6016, clock_rate=1785000
    )
    assert found.memory_rate == pytest.approx(3939, abs=1) and found.clock == pytest.approx(1.785)


def test_where_the_driver_says_nothing_the_nearest_relative_stands_for_it(described: Describe) -> None:
    found = described("NVIDIA H800", 9, 0, 66, memory_clock_rate=0)
    assert (found.memory_rate, found.clock) == (3350.0, 1.83) and found.tensor_flops == pytest.approx(989.4 / 2)


def test_a_slice_has_not_the_whole_memory_to_itself(described: Describe) -> None:
    found = described("NVIDIA H200 MIG 1g.18gb", 9, 0, 16, memory_clock_rate=3201000, memory_bus_width=6144)
    assert found.memory_rate <= 4800.0


@pytest.mark.gpu
def test_a_device_at_hand_says_how_fast_its_memory_is() -> None:
    found = torch.cuda.get_device_properties(GPU)
    if "MIG" in found.name or not getattr(found, "memory_clock_rate", 0):
        pytest.skip("this version of torch, or this device, says nothing of the memory's clock")
    key = devices.known_as(found.name)
    if key is None:
        pytest.skip(f"{found.name} is not described")
    assert devices._memory_rate(found) == pytest.approx(devices.DEVICES[key].memory_rate, rel=0.1)
