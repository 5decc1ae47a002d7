# SPDX-License-Identifier: Apache-2.0
"""A driver for Triton's compiler on a machine without a GPU."""

from __future__ import annotations

from typing import Any


class NoDevice:
    """The part of a Triton driver that compiling needs."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture  # Triton keeps what it compiles by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)
