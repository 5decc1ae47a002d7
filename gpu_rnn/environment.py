# SPDX-License-Identifier: Apache-2.0
"""The environment's variables: each is read and checked here, and nowhere else. One that is empty counts as not set."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from typing import Any

DEADLINE = 10.0  # seconds: long beside time slicing, short beside a hang
SHORTEST, LONGEST = 1e-3, 1e6  # s: shorter is no wait for another block, longer is eleven days
APPROXIMATED = {"none": (), "bf16": ("bfloat16",), "16-bit": ("bfloat16", "float16")}
_NUMBER = re.compile(r"(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)


def _given(name: str) -> str:
    return os.environ.get(name, "").strip()


def _refused(name: str, value: str, allowed: str) -> ValueError:
    return ValueError(f"{name} is {value!r} in the environment, not {allowed}: correct it, or unset it")


# os.environ answers by an exception, which takes as long as the rest of a short call's questions; what it keeps does
# not.
_VALUES: Mapping[Any, object] = getattr(os.environ, "_data", os.environ)
_BACKEND, _APPROXIMATE = (
    os.environ.encodekey(name) if _VALUES is not os.environ else name
    for name in ("GPU_RNN_BACKEND", "GPU_RNN_APPROXIMATE")
)


def names_a_backend() -> bool:
    """Whether a backend may be preferred; for calls that are too short for more."""
    return _BACKEND in _VALUES


def of_calls() -> tuple[object, object]:
    """What a call goes by, unread: the same as long as nobody changes it."""
    return _VALUES.get(_BACKEND), _VALUES.get(_APPROXIMATE)


def unchecked_backend() -> str:
    """As `backend`, for what torch.compile traces; `backend` is asked when it runs."""
    return os.environ.get("GPU_RNN_BACKEND", "")


def backend(known: Collection[str]) -> str:
    """The backend that "auto" prefers; empty for none.

    Raises:
        ValueError: it is none of those known.
    """
    if not names_a_backend():
        return ""
    name = _given("GPU_RNN_BACKEND")
    if name and name != "auto" and name not in known:
        raise _refused("GPU_RNN_BACKEND", name, f"'auto' or one of {', '.join(known)}")
    return "" if name == "auto" else name


def cache_folder() -> str:
    """The folder for compiled kernels and tuned choices; empty for the user's cache folder."""
    return _given("GPU_RNN_CACHE")


def c_compiler() -> str:
    """The command of a C compiler; empty for the one that is found."""
    return _given("CC")


def deadline() -> float:
    """Seconds that a kernel waits for data of another block.

    Raises:
        ValueError: it is no number, or not one of seconds that a wait can have.
    """
    text = _given("GPU_RNN_DEADLINE")
    seconds = DEADLINE if not text else float(text) if _NUMBER.fullmatch(text) else 0.0
    if not SHORTEST <= seconds <= LONGEST:
        raise _refused("GPU_RNN_DEADLINE", text, f"a number of seconds from {SHORTEST:g} to {LONGEST:.0f}")
    return seconds


def approximated() -> tuple[str, ...]:
    """The dtypes in which tanh and sigmoid may be the hardware's.

    Raises:
        ValueError: the variable names none of the choices.
    """
    text = _given("GPU_RNN_APPROXIMATE")
    if text and text not in APPROXIMATED:
        raise _refused("GPU_RNN_APPROXIMATE", text, f"one of {', '.join(APPROXIMATED)}")
    return APPROXIMATED[text or "bf16"]
