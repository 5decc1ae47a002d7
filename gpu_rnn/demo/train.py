# SPDX-License-Identifier: Apache-2.0
"""Training of one classifier, the same for every library: Adam, one-cycle learning rate, final accuracy reported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from gpu_rnn.demo.datasets import Dataset
from gpu_rnn.demo.models import Classifier, Variant

__all__ = ["Epoch", "Run", "repeat", "train"]

BATCH = 27  # a tenth of JapaneseVowels' training set
MAX_NORM = 1.0  # PLAID's thousand steps need it; on JapaneseVowels it changes little


@dataclass(frozen=True)
class Epoch:
    loss: float  # mean cross-entropy over the epoch's training batches
    accuracy: float  # on the test split, after the epoch, 0 to 1


@dataclass(frozen=True)
class Run:
    """One variant trained with one library, once a seed."""

    variant: Variant
    library: str
    seeds: list[list[Epoch]]

    @property
    def title(self) -> str:
        return f"{self.variant.label} ({self.library})"

    @property
    def final(self) -> list[float]:
        """Test accuracy at the end of training, one a seed."""
        return [epochs[-1].accuracy for epochs in self.seeds]

    @property
    def mean(self) -> float:
        return sum(self.final) / len(self.final)


def train(variant: Variant, library: ModuleType, data: Dataset, *, seed: int, epochs: int) -> Iterator[Epoch]:
    """Trains one classifier from scratch, yielding after every epoch.

    The seed fixes the initial weights and the order of the batches, so two libraries that draw their weights alike
    start from the same point and see the same batches.
    """
    device = data.train.inputs.device
    torch.manual_seed(seed)
    model = Classifier(variant.layer(library, data.channels), data.classes).to(device)
    order = torch.Generator().manual_seed(seed)
    batches = -(-len(data.train) // BATCH)
    optimizer = torch.optim.Adam(model.parameters(), lr=data.peak_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, data.peak_rate, total_steps=epochs * batches)
    test = data.test.packed()
    for _ in range(epochs):
        losses = []
        for rows in torch.randperm(len(data.train), generator=order).split(BATCH):
            loss = cross_entropy(model(data.train.packed(rows)), data.train.labels[rows.to(device)])
            optimizer.zero_grad()
            loss.backward()
            clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        with torch.no_grad():
            accuracy = (model(test).argmax(1) == data.test.labels).float().mean()
        yield Epoch(float(torch.stack(losses).mean()), float(accuracy))


def repeat(
    variant: Variant,
    library: ModuleType,
    data: Dataset,
    *,
    seeds: int,
    epochs: int,
    progress: Callable[[Epoch], None],
) -> Run:
    """Trains with seeds 0, 1, … and tells `progress` of every epoch."""
    histories: list[list[Epoch]] = []
    for seed in range(seeds):
        histories.append([])
        for epoch in train(variant, library, data, seed=seed, epochs=epochs):
            histories[-1].append(epoch)
            progress(epoch)
    return Run(variant, library.__name__, histories)
