# SPDX-License-Identifier: Apache-2.0
"""torch's setting for fp32 products is after a call what it was before, and goes on following what it followed."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpu_rnn.backends import precision

SAYINGS = ("none", "ieee", "tf32")
ON_GPU: Any = SimpleNamespace(is_cuda=True, dtype=torch.float32)


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """Under the default nothing is said at any level."""
    assert [precision._effective(level) for level in range(3)] == ["none"] * 3
    yield
    for level in range(3):
        precision._set(level, "none")


def say(*sayings: str) -> None:
    for level, saying in enumerate(sayings):
        precision._set(level, saying)


def meanings() -> list[str]:
    """What products go by as they are, and after each change above them."""
    found = [precision._effective(0)]
    for level, saying in itertools.product((1, 2), SAYINGS):
        precision._set(level, saying)
        found.append(precision._effective(0))
    return found


@pytest.mark.parametrize("wanted", ["ieee", "tf32"])
@pytest.mark.parametrize("sayings", [*itertools.product(SAYINGS, repeat=3)], ids=" ".join)
def test_every_level_says_what_it_said(sayings: tuple[str, ...], wanted: str) -> None:
    say(*sayings)
    expected = meanings()
    say(*sayings)
    with precision.of_products(wanted, ON_GPU):
        assert torch.backends.cuda.matmul.fp32_precision == wanted
    assert meanings() == expected
    say(sayings[0], sayings[1], "none")
    with precision.of_products(wanted, ON_GPU):
        precision._set(2, sayings[2])  # somebody changes it meanwhile
    assert meanings() == expected


def test_the_generic_setting_is_followed_after_a_call() -> None:
    torch.backends.fp32_precision = "ieee"
    with precision.of_products("tf32", ON_GPU):
        pass
    torch.backends.fp32_precision = "tf32"
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"


@pytest.mark.parametrize("legacy", ["highest", "high"])
def test_the_older_setting_still_answers(legacy: str) -> None:
    """torch refuses to answer where the older setting and the newer one disagree."""
    torch.set_float32_matmul_precision(legacy)
    for wanted in ("ieee", "tf32"):
        with precision.of_products(wanted, ON_GPU):
            pass
        assert torch.get_float32_matmul_precision() == legacy
    torch.set_float32_matmul_precision("highest")
    torch._C._set_fp32_precision_setter("mkldnn", "matmul", "none")


def test_what_is_set_during_a_call_stays() -> None:
    with precision.of_products("tf32", ON_GPU):
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"


def test_the_last_of_several_threads_restores() -> None:
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with precision.of_products("tf32", ON_GPU):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(10)
    with precision.of_products("tf32", ON_GPU):
        leave.set()
        thread.join()
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert torch.backends.cuda.matmul.fp32_precision == "none"


def test_other_tensors_touch_nothing() -> None:
    for like in (torch.empty(1), SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)):
        with precision.of_products("tf32", like):  # type: ignore[arg-type]
            assert torch.backends.cuda.matmul.fp32_precision == "none"
