# SPDX-License-Identifier: Apache-2.0
"""From the host to a GPU without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor

from gpu_rnn.call import onlookers


def to_device(values: Tensor, device: torch.device, name: str, instead: str = "it") -> Tensor:
    """A tensor on a device. From a CPU to a GPU it goes by way of page-locked memory: else the host would wait for the
    copy, and so for all that is queued before it.

    Raises:
        RuntimeError: a CUDA graph is captured: at each replay it would read again what the host holds by then.
    """
    if values.device == device:
        return values
    if not (values.is_cpu and device.type == "cuda") or onlookers.recorded(values):
        return values.to(device)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"a CUDA graph cannot read {name} from the CPU at each replay: give {instead} on {device}")
    return values.pin_memory().to(device, non_blocking=True)
