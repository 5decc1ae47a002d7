# SPDX-License-Identifier: Apache-2.0
"""Layers that were trained remember for longer than those with initial weights: the tolerance bounds them as well."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import gpu_rnn
from gpu_rnn.call import relaxation
from gpu_rnn.demo import datasets, models
from gpu_rnn.demo.datasets import Dataset
from gpu_rnn.layers.base import LayerBase
from tests.support import native
from tests.support.time_chunks import in_chunks, outcomes

STEPS, CHUNK = 4096, 512
CASES = {
    "JapaneseVowels": (datasets.japanese_vowels, 60, 1e-2),
    "PLAID": (datasets.plaid, 4, 1e-2),  # up to 1,344 steps in each
}
pytestmark = [pytest.mark.slow, native.NEEDS_C]


def trained(variant: models.Variant, data: Dataset, batches: int, rate: float) -> LayerBase:
    torch.manual_seed(0)
    layer = variant.layer(gpu_rnn, data.channels)
    model = models.Classifier(layer, data.classes)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    for rows in torch.randperm(len(data.train)).repeat(4)[: 27 * batches].split(27):
        loss = cross_entropy(model(data.train.packed(rows)), data.train.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return layer.double()


def recordings(data: Dataset) -> Tensor:
    """(T, 1, channels): one after the other."""
    pairs = zip(data.test.inputs, data.test.lengths.tolist(), strict=True)
    return torch.cat([steps[:length] for steps, length in pairs])[:STEPS, None].double()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("variant", models.STANDARD, ids=lambda variant: variant.label)
def test_trained_weights(variant: models.Variant, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    load, batches, rate = CASES[name]
    data = loaded(load)
    layer, x = trained(variant, data, batches, rate), recordings(data).requires_grad_()
    layer.backend = "native"
    leaves = [x, *layer.parameters()]

    def values_and_gradients(**call: float) -> list[Tensor]:
        y, _ = layer(x, **call)
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    borders: dict[str, list[Tensor]] = {}

    class Recorded(relaxation._Forward):
        def run(self, values: list[Tensor], rows: Tensor | None) -> None:
            super().run(values, rows)
            borders["wanted"], borders["starts"] = self.handed()[0], values

    monkeypatch.setattr(relaxation, "_Forward", Recorded)
    expected = values_and_gradients()
    for tolerance in (1e-3, 1e-6):
        with in_chunks(STEPS // CHUNK):
            found = values_and_gradients(time_parallel=tolerance)
            assert all(1 < outcome.passes < STEPS // CHUNK for outcome in outcomes())
        for wanted, start in zip(borders["wanted"], borders["starts"], strict=True):
            assert (wanted - start).abs().max() <= tolerance
        for value, truth in zip(found, expected, strict=True):
            torch.testing.assert_close(value, truth, rtol=0, atol=2 * tolerance * max(1.0, truth.abs().max().item()))


def loaded(load: Callable[[], Dataset]) -> Dataset:
    try:
        return load()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
