# SPDX-License-Identifier: Apache-2.0
"""What a kernel's limits and the cost models need to know of a device, for the one at hand or one described by name."""

from __future__ import annotations

import os
import platform
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gpu_rnn.memo import memoize


@dataclass(frozen=True)
class Device:
    """A device by its datasheet. Rates are peak, dense, without sparsity.

    Attributes:
        name: as the maker calls it.
        capability: CUDA compute capability; (0, 0) for a CPU.
        sms: streaming multiprocessors, or cores.
        clock: boost clock, GHz.
        shared_memory: bytes that one block may use.
        tensor_flops: fp16/bf16 tensor-core rate with fp32 sums, TFLOP/s.
        memory_rate: device memory, GB/s.
        memory: device memory, bytes; 0 where it is not known, and of a CPU.
    """

    name: str
    capability: tuple[int, int]
    sms: int
    clock: float
    shared_memory: int
    tensor_flops: float
    memory_rate: float
    memory: int = 0

    @property
    def is_gpu(self) -> bool:
        return self.capability != (0, 0)


# The makers' datasheets and architecture whitepapers (NVIDIA A100, Ampere GA102, Ada, H100, Blackwell);
# shared memory per block from the CUDA C++ programming guide, table of compute capabilities.
GB = 2**30  # what a datasheet counts in, as drivers say
DEVICES: dict[str, Device] = {
    "A100": Device("A100 SXM 80GB", (8, 0), 108, 1.41, 166912, 312.0, 2039.0, 80 * GB),
    "RTX 3090": Device("RTX 3090", (8, 6), 82, 1.70, 101376, 71.0, 936.0, 24 * GB),
    "RTX 4090": Device("RTX 4090", (8, 9), 128, 2.52, 101376, 165.2, 1008.0, 24 * GB),
    "H100": Device("H100 SXM 80GB", (9, 0), 132, 1.83, 232448, 989.4, 3350.0, 80 * GB),
    "H200": Device("H200 SXM 141GB", (9, 0), 132, 1.83, 232448, 989.4, 4800.0, 141 * GB),
    "B200": Device("B200 SXM", (10, 0), 148, 1.85, 232448, 2250.0, 8000.0, 180 * GB),
    "RTX 5090": Device("RTX 5090", (12, 0), 170, 2.41, 101376, 209.5, 1792.0, 32 * GB),
}

CPU = Device("CPU", (0, 0), 1, 3.0, 0, 0.0, 0.0)
CPU_FLOPS = 5e10  # fp32 products on one core, rough; predicted times on a CPU only rank the rows


def describe(name: str) -> Device:
    """The described device of that name, such as "H100", in any case and with or without spaces.

    Raises:
        TypeError: no name, such as a torch.device.
        ValueError: a name that is not in `DEVICES`; the known ones are listed.
    """
    if not isinstance(name, str):
        raise TypeError(f"a described device is a name, such as 'H100', not of type {type(name).__name__}")
    wanted = _bare(name)
    for known, device in DEVICES.items():
        if wanted in (_bare(known), _bare(device.name)):
            return device
    if wanted == "cpu":
        return CPU
    raise ValueError(f"no description of a device {name!r}; described are {', '.join(DEVICES)} and CPU")


def is_described(device: Device) -> bool:
    """Whether it was described by name: what it runs does not depend on what is installed here."""
    return device in DEVICES.values()


# Of one family, but with other rates than the device described under that name.
_UNLIKE = re.compile(r"\b(MIG|GRID|PCI[Ee]|NVL|Laptop|Ti|D|Max-Q|(40|64|94|96) ?GB)\b")


def known_as(name: str) -> str | None:
    """The key in `DEVICES` of a driver's name, such as "H100" of "NVIDIA H100 80GB HBM3"; None of what is not
    described."""
    keys = [key for key in DEVICES if re.search(rf"\b{key}\b", name)]
    return keys[0] if keys and not _UNLIKE.search(name) else None


def _bare(name: str) -> str:
    """In lower case and without spaces: "RTX 4090" as "rtx4090"."""
    return "".join(name.split()).casefold()


def of(device: torch.device) -> Device:
    """The device that a tensor lies on: as described under its name, else as its driver says, and where that says
    nothing as the nearest relative. The rate of tensor cores goes with the multiprocessors. A CPU has as many cores
    as torch has threads."""
    if device.type != "cuda" or torch.version.cuda is None:
        return _cpu(torch.get_num_threads())
    return _gpu(device)


@memoize(64)
def _cpu(threads: int) -> Device:
    return replace(CPU, sms=threads)


@memoize(16)
def _gpu(device: torch.device) -> Device:
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    relatives = [DEVICES[key]] if (key := known_as(properties.name)) else []
    relatives = (
        relatives or [d for d in DEVICES.values() if d.capability[0] == properties.major] or list(DEVICES.values())
    )
    nearest = min(
        relatives,
        key=lambda d: (abs(d.capability[1] - properties.minor), abs(d.sms - properties.multi_processor_count)),
    )
    share = properties.multi_processor_count / nearest.sms
    return Device(
        properties.name,
        capability,
        properties.multi_processor_count,
        nearest.clock if key else _measured(properties, "clock_rate") / 1e6 or nearest.clock,
        getattr(properties, "shared_memory_per_block_optin", nearest.shared_memory),
        nearest.tensor_flops * share,
        nearest.memory_rate if key else _memory_rate(properties) or nearest.memory_rate,
        int(_measured(properties, "total_memory")),
    )


def at_hand(described: Device) -> list[torch.device]:
    """The devices of a description that this process uses already: to ask another would make a context there, which
    takes memory and seconds."""
    each = [torch.device("cuda", index) for index in range(torch.cuda.device_count()) if _in_use(index)]
    return [device for device in each if of(device) == described]


def _in_use(index: int) -> bool:
    return bool(torch._C._cuda_hasPrimaryContext(index))  # type: ignore[attr-defined]  # builds without CUDA lack it


def _measured(properties: Any, name: str) -> float:
    """What a driver says of a device, 0 where it or this version of torch says nothing."""
    return float(getattr(properties, name, 0) or 0)


def _memory_rate(properties: Any) -> float:
    """GB/s: two words of the bus's width in a cycle of the memory's clock (kHz), on every memory of theirs."""
    if "MIG" in properties.name:  # the whole device's memory
        return 0.0
    return 2 * _measured(properties, "memory_clock_rate") * 1e3 * _measured(properties, "memory_bus_width") / 8 / 1e9


def pick(name: str | None) -> torch.device:
    """The named device or, by default, the GPU if there is one.

    Raises:
        ValueError: the device is not here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"{name!r} is no device of torch: try cpu, cuda or cuda:1") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"only cpu and cuda devices can be timed here, not {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"{name!r} is not here: torch sees {torch.cuda.device_count()} CUDA devices; leave --device out"
        )
    return device


def main_memory() -> int:
    """Bytes of this machine's memory; 0 where the system does not say."""
    if not {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= set(getattr(os, "sysconf_names", {})):
        return 0
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def cpu_name() -> str:
    """The CPU at hand by a name that a person would use, with the number of torch's threads."""
    return f"{cpu_model()}, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"


@memoize(1)
def cpu_model() -> str:
    """The CPU at hand by a name that a person would use, with its family and model, as virtual machines leave the
    number out of the name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if sys.platform == "linux" and cpuinfo.exists() else []
    found: dict[str, str] = {}
    for key, _, value in (line.partition(":") for line in lines):
        found.setdefault(key.strip(), value.strip())
    name = found.get("model name") or platform.processor() or f"{platform.machine()} CPU with {os.cpu_count()} cores"
    known = "cpu family" in found and "model" in found
    return f"{name}, family {found['cpu family']} model {found['model']}" if known else name
