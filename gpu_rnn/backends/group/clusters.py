# SPDX-License-Identifier: Apache-2.0
"""Clusters: blocks that run at the same time and write into each other's shared memory.

How many of them fit on a device: by its capability before a kernel is built, and by the driver's count of a kernel.
CuPy does not hand that count out, so the driver is asked through ctypes.
"""

from __future__ import annotations

import ctypes
import sys

from gpu_rnn import memo
from gpu_rnn.devices import Device
from gpu_rnn.memo import memoize

LARGEST = 16  # blocks of a cluster
PORTABLE = 8  # more of them have to be allowed
NON_PORTABLE_ALLOWED = 14  # CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED; CuPy has no name for it
DIMENSION = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
# Multiprocessors of a GPC, of which a cluster's blocks take one each, by capability: NVIDIA's whitepapers of H100 and
# Blackwell. Every GPC is taken to have LARGEST of them.
GPC = {(9, 0): 18, (10, 0): 20}

_refused: dict[Device, str] = memo.hold(
    f"{__name__}._refused", {}, None, stays="a device whose driver refuses clusters is not asked again"
)


def at_once(device: Device, blocks: int) -> int:
    """Clusters of so many blocks that a device is taken to run at once; 0 where it has none or refused one."""
    if device.capability not in GPC or blocks > LARGEST or device in _refused:
        return 0
    return -(-device.sms // GPC[device.capability]) * (LARGEST // blocks)


def refuse(device: Device, reason: str) -> None:
    """From now on no layout for that device has clusters."""
    _refused[device] = reason


def refusal(device: Device) -> str:
    """Why a device that could have clusters has none; empty where there is no such reason."""
    return _refused.get(device, "")


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: its value is a union of 64 bytes, at a multiple of 8."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


@memoize(1)
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def resident(function: int, blocks: int, threads: int, shared_bytes: int) -> int:
    """Clusters of a loaded kernel that the current device runs at once, by its driver's count.

    Raises:
        OSError: there is no driver, or none that knows clusters; the message has its status.
    """
    attribute = _Attribute(DIMENSION, 0, (blocks, 1, 1))
    config = _Config((blocks, 1, 1), (threads, 1, 1), shared_bytes, None, ctypes.pointer(attribute), 1)
    count = ctypes.c_int()
    try:
        ask = _driver().cuOccupancyMaxActiveClusters
    except AttributeError as error:
        raise OSError(f"the driver is older than clusters: {error}") from error
    status = ask(ctypes.byref(count), ctypes.c_void_p(function), ctypes.byref(config))
    if status:
        raise OSError(f"the driver counts no clusters of {blocks} blocks: status {status}")
    return count.value
