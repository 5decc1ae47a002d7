# SPDX-License-Identifier: Apache-2.0
"""Which graphs of the step loop are kept; what they compute is in test_step_kernels.py, on a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpu_rnn.launch import graphs


class Loop:
    def __init__(self, count: int) -> None:
        self.one, self.more = torch.empty(count, dtype=torch.uint8), [torch.empty(count, dtype=torch.uint8), None]

    def run(self, steps: int) -> None:
        raise NotImplementedError


@pytest.fixture
def get(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`Chunks.get` for a tensor on a GPU, whose loop takes so many bytes twice."""
    monkeypatch.setattr(graphs.Chunks, "kept", type(graphs.Chunks.kept)())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=1))
    like = SimpleNamespace(shape=(graphs.CHUNK, 2), is_cuda=True, device="cuda", dtype=torch.float32)
    return lambda key, size=1: graphs.Chunks.get((key,), lambda steps: Loop(size), like)


def test_the_oldest_goes_where_there_are_too_many(get: Any) -> None:
    first = get(0)
    assert get(0) is first
    for key in range(1, graphs.GRAPHS):
        get(key)
    assert get(0) is first
    get("one more")
    assert get(0) is first  # used since key 1 was
    assert len(graphs.Chunks.kept) == graphs.GRAPHS


def test_the_oldest_goes_where_they_take_too_much(get: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "BYTES", 100)
    first, second = get(1, 30), get(2, 30)  # 60 bytes each
    assert get(1) is first
    get(3, 30)
    assert get(1) is first
    assert get(2) is not second
