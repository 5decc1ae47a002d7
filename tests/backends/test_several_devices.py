# SPDX-License-Identifier: Apache-2.0
"""A kernel's module belongs to one device: what is loaded, counted and launched while which device is current."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpu_rnn.backends.group import nvrtc

MULTIPROCESSORS = (132, 108)


class Machine:
    """Two GPUs, of which the first is current; what CuPy was asked for, with the device that was current then."""

    def __init__(self) -> None:
        self.current, self.done = 0, []

    def note(self, *what: Any) -> None:
        self.done.append((*what, self.current))

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device.index
        yield
        self.current = before

    def set_device(self, index: int) -> None:
        self.note(f"set {index}")

    def module(self) -> Any:
        module = SimpleNamespace()
        module.load = lambda code: self.note("load", code)
        module.get_function = lambda name: Kernel(self, 1000 + self.current)
        return module

    def occupancy(self, pointer: int, threads: int, shared_bytes: int) -> int:
        self.note("occupancy", pointer, threads, shared_bytes)
        return 2


class Kernel:
    def __init__(self, machine: Machine, pointer: int) -> None:
        self.machine, self.ptr = machine, pointer

    def __call__(
        self, grid: tuple[int], block: tuple[int], values: Sequence[Any], shared: int, stream: Any, together: bool
    ) -> None:
        self.machine.note("launch", self.ptr, grid, block, [int(v) for v in values], shared, stream.ptr, together)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    error = type("Error", (RuntimeError,), {})
    driver = SimpleNamespace(
        CUDADriverError=error,
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8,
        funcSetAttribute=lambda pointer, attribute, value: machine.note("shared", pointer, attribute, value),
        occupancyMaxActiveBlocksPerMultiprocessor=machine.occupancy,
    )
    runtime = SimpleNamespace(CUDARuntimeError=error, setDevice=machine.set_device)
    cuda = SimpleNamespace(driver=driver, runtime=runtime, Module=machine.module)  # and no Device
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(nvrtc, "compile_cubin", lambda source, arch: b"machine code")
    monkeypatch.setattr(torch.cuda, "device", machine.device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: machine.current)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=70 + device.index))
    found = [SimpleNamespace(multi_processor_count=count) for count in MULTIPROCESSORS]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found[device.index])
    return machine


def test_everything_happens_on_the_tensors_device(machine: Machine) -> None:
    function = nvrtc.Function("text", "kernel", "sm_90a", shared_bytes=4096, cooperative=True)
    assert not machine.done  # nothing is loaded before it is known where
    second = torch.device("cuda", 1)
    assert function.resident(second, 128) == 2 * 108
    function(3, 128, [7], second)
    assert machine.done == [
        ("set 1", 1),
        ("load", b"machine code", 1),
        ("shared", 1001, 8, 4096, 1),
        ("occupancy", 1001, 128, 4096, 1),
        ("set 1", 1),
        ("launch", 1001, (3,), (128,), [7], 4096, 71, True, 1),
    ]
    assert machine.current == 0


def test_each_device_has_a_module_of_its_own(machine: Machine) -> None:
    function = nvrtc.Function("text", "kernel", "sm_90a")
    for index in (1, 0, 1, 0):
        function(1, 32, [], torch.device("cuda", index))
    loads = [done for done in machine.done if done[0] == "load"]
    assert loads == [("load", b"machine code", 1), ("load", b"machine code", 0)]
    launches = [(done[1], done[6], done[-1]) for done in machine.done if done[0] == "launch"]
    assert launches == [(1001, 71, 1), (1000, 70, 0), (1001, 71, 1), (1000, 70, 0)]


@pytest.mark.gpu
def test_a_launch_leaves_the_current_device_as_it_was() -> None:
    """On the last device, with the first one current: no context is made on a device that nothing lies on."""
    if nvrtc.no_driver():
        pytest.skip(nvrtc.no_driver())
    text = 'extern "C" __global__ void one(float *p) { *p = 1.0f; }'
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    current = torch.cuda.current_device()
    used = [torch._C._cuda_hasPrimaryContext(k) for k in range(device.index)]
    word = torch.zeros(1, device=device)
    function = nvrtc.Function(text, "one", nvrtc.architecture(torch.cuda.get_device_capability(device)))
    assert function.resident(device, 32) > 0
    function(1, 1, [word], device)
    assert word.item() == 1.0 and torch.cuda.current_device() == current
    assert [torch._C._cuda_hasPrimaryContext(k) for k in range(device.index)] == used
