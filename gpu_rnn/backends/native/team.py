# SPDX-License-Identifier: Apache-2.0
"""torch's own threads, for the loop in C.

torch's products leave them waiting, and awake, for the next piece of work: threads of the loop's own would share the
processors with them. Results do not depend on which threads compute.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from pathlib import Path

import torch

from gpu_rnn import forking
from gpu_rnn.memo import memoize


def address() -> int:
    """Of GOMP_parallel (function, argument, number of threads, flags) in torch's libgomp; 0 where there is none, or not
    to be used: the loop then starts threads."""
    return 0 if forking.is_child() else _address()  # libgomp would wait for the parent's threads for ever


@memoize(1)
def _address() -> int:
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        with suppress(OSError, AttributeError):  # of a library that cannot be loaded, or is another one
            return ctypes.cast(ctypes.CDLL(str(path)).GOMP_parallel, ctypes.c_void_p).value or 0
    return 0
