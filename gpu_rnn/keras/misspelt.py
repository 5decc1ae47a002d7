# SPDX-License-Identifier: Apache-2.0
"""Keras's errors for arguments that it does not know, with the one that was perhaps meant."""

from __future__ import annotations

import inspect
from typing import Any

from gpu_rnn.spelling import UNKNOWN, meant


class Advising:
    """A mixin, before Keras's layer."""

    call: Any

    def __init__(self, *args: Any, **options: Any) -> None:
        try:
            super().__init__(*args, **options)
        except ValueError as error:
            known = inspect.signature(type(self)).parameters
            near = [meant(name, known) for name in options if repr(name) in str(error) and name not in known]
            if any(near):
                raise ValueError(f"{error}{''.join(near)}") from error
            raise

    def __call__(self, *args: Any, **options: Any) -> Any:
        try:
            return super().__call__(*args, **options)  # type: ignore[misc]
        except TypeError as error:
            unknown, known = UNKNOWN.search(str(error)), inspect.signature(self.call).parameters
            if unknown is None or unknown[1] not in options or unknown[1] in known:
                raise  # from inside
            raise TypeError(f"{type(self).__name__}.call() {error}{meant(unknown[1], known)}") from None
