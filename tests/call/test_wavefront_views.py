# SPDX-License-Identifier: Apache-2.0
"""A wavefront's geometry: each diagonal finds what it needs, and what it is of the whole tensors."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from gpu_rnn.call import wavefront_views
from gpu_rnn.call.wavefront_views import Diagonal


@pytest.mark.parametrize(("layers", "steps", "chunk"), [*product((2, 3, 5), (1, 4, 7, 12), (1, 2, 3, 7, 12))])
def test_every_chunk_finds_what_it_needs(layers: int, steps: int, chunk: int) -> None:
    if chunk > steps:
        return
    done = torch.zeros(layers, steps, dtype=torch.bool)
    for diagonal in wavefront_views.diagonals(layers, steps, chunk):
        together = []
        for layer in range(diagonal.first, diagonal.last):
            start = diagonal.start - (layer - diagonal.first) * diagonal.chunk
            own = slice(start, start + diagonal.chunk)
            assert 0 <= start and own.stop <= steps and not done[layer, own].any()
            assert done[layer, :start].all() and (layer == 0 or done[layer - 1, own].all())
            together.append((layer, own))
        for place in together:
            done[place] = True
    assert done.all()


def test_views() -> None:
    """What a diagonal is of tensors of all layers and steps."""
    whole = torch.arange(3 * 8 * 2 * 5, dtype=torch.float64).view(3, 8, 2, 5)
    initial = -torch.arange(3 * 2 * 5, dtype=torch.float64).view(2, 3, 5)
    for diagonal in wavefront_views.diagonals(3, 8, 2):
        layers = range(diagonal.first, diagonal.last)
        starts = [diagonal.start - 2 * k for k in range(len(layers))]
        parts = [whole[layer, start : start + 2] for layer, start in zip(layers, starts, strict=True)]
        assert diagonal.of(whole).equal(torch.stack(parts, 2))
        assert diagonal.rows(whole).equal(torch.stack([part.flatten(0, 1) for part in parts]))
        before = [whole[la, start - 1] if start else initial[:, la] for la, start in zip(layers, starts, strict=True)]
        assert diagonal.before(whole, initial).equal(torch.stack(before, 1))
    row = torch.arange(30).view(1, 2, 3, 5).permute(1, 2, 0, 3)  # contiguous, though a row is 30 away from the next
    assert row.stride(2) == 30 and Diagonal(0, 2, 1, 1).rows(row).equal(torch.stack([row[0, 1], row[1, 0]]))
    assert Diagonal(0, 3, 4, 2).above(0) == Diagonal(1, 3, 2, 2)
    assert Diagonal(1, 3, 4, 2).above(0) == Diagonal(1, 3, 4, 2)
    assert Diagonal(0, 1, 4, 2).above(0).count == Diagonal(2, 3, 4, 2).below(2).count == 0
    assert Diagonal(1, 3, 4, 2).below(2) == Diagonal(1, 2, 4, 2)
