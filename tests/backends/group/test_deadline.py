# SPDX-License-Identifier: Apache-2.0
"""A launch whose blocks wait for one that never comes ends: all is NaN, and the next call says why.

On the CPU runtime, whose time is virtual, and on a GPU; test_kernels.py has the kernels by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import gpu_rnn
from gpu_rnn.backends.group import clusters
from gpu_rnn.backends.group import launch as group
from tests.support.cuda.machines import NEEDS_COMPILER
from tests.support.group import pretend

PLACES = [
    pytest.param("cpu", marks=[pytest.mark.cuda_cpu, NEEDS_COMPILER]),
    pytest.param("cuda", marks=pytest.mark.gpu(alone=True)),  # who shares the GPU gets a part of each second
]
HIDDEN = (
    256  # 768 KiB of a GRU in full float32: more than a block holds, so groups have members that wait for each other
)


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "cpu":
        pretend(monkeypatch)
    # A member that never starts is waited for 60 times as long.
    monkeypatch.setenv("GPU_RNN_DEADLINE", "0.002" if request.param == "cpu" else "0.02")
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")
    monkeypatch.setattr(clusters, "GPC", {})  # whose blocks start together: none of them alone is missing
    yield request.param


def one_block_less(backward: bool, launches: Callable[..., list[group.Launch]] = group._launches) -> Callable[..., Any]:
    """The launches of one pass without their last block, a member of the last group."""

    def found(*arguments: Any) -> list[group.Launch]:
        made = launches(*arguments)
        assert all(launch.layout.members > 1 for launch in made)
        return [replace(launch, grid=launch.grid - (launch.layout.backward == backward)) for launch in made]

    return found


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_data_that_never_comes(cell: str, backward: bool, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = getattr(gpu_rnn, cell)(4, HIDDEN, backend="group", device=place)
    x = torch.randn(3, 2, 4, device=place, requires_grad=True)
    with monkeypatch.context() as broken:
        broken.setattr(group, "_launches", one_block_less(backward))
        y, _ = layer(x)
        (d_x,) = torch.autograd.grad(y.sum(), x) if backward else (None,)
        wait(place)
    assert (d_x if backward else y).isnan().all()
    assert y.isfinite().all() == backward
    what = "group_backward" if backward else "group_forward"
    with pytest.raises(RuntimeError, match=rf"{what} of .* gave up in step \d+ of group \d+"):
        layer(x)
    y, _ = layer(x)  # and then all is well again
    wait(place)
    gpu_rnn.check()
    assert y.isfinite().all()


def wait(place: str) -> None:
    if place == "cuda":
        torch.cuda.synchronize()
