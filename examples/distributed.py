# SPDX-License-Identifier: Apache-2.0
"""One program for one process and for many: data parallel, or sharded, with checkpoints that any number of them reads.

    python examples/distributed.py
    torchrun --nproc-per-node 2 examples/distributed.py             # DistributedDataParallel: the whole model in each
    torchrun --nproc-per-node 2 examples/distributed.py --shard     # FSDP2: a part of every weight in each
    python examples/distributed.py --epochs 0 --checkpoint FOLDER   # what the others saved there, in one process

It learns who speaks in the recordings of the demo, JapaneseVowels, which are of different lengths. The batches are the
same for any number of processes, so that without dropout the weights are, too. On GPUs each process takes one.
"""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import gpu_rnn
from gpu_rnn.demo.datasets import Split, japanese_vowels

BATCH = 54  # recordings, of all processes together; the 270 are five of them


class Speaker(nn.Module):
    """Recordings (B, T, 12) and their lengths (B) -> a score for each of nine speakers."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.rnn = gpu_rnn.LSTM(12, 64, batch_first=True, return_sequences=False, recurrent_dropout=dropout)
        self.head = nn.Linear(64, 9)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.head(self.rnn(x, lengths=lengths)[0])


def place() -> tuple[int, int]:
    """This process's number, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def build(dropout: float, shard: bool, device: torch.device) -> nn.Module:
    torch.manual_seed(0)  # the same weights everywhere
    model = Speaker(dropout).to(device)
    torch.manual_seed(1 + place()[0])  # and dropout of its own for each
    if not dist.is_initialized():
        return model
    if not shard:
        return DistributedDataParallel(model)
    fully_shard(model.rnn)
    return fully_shard(model)


def shares(count: int, epoch: int) -> Iterator[Tensor]:
    """The rows that this process takes of each batch of an epoch."""
    rank, world = place()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(epoch))
    for rows in order[: count // BATCH * BATCH].view(-1, BATCH):
        yield rows[rank::world]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: Split, epochs: int) -> None:
    for epoch in range(epochs):
        for rows in shares(len(data), epoch):
            optimizer.zero_grad()
            scores = model(data.inputs[rows], data.lengths[rows])
            F.cross_entropy(scores, data.labels[rows]).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, data: Split) -> float:
    """Of all recordings; each process looks at its share."""
    rank, world = place()
    model.eval()
    best = model(data.inputs[rank::world], data.lengths[rank::world]).argmax(1)
    right = (best == data.labels[rank::world]).sum()
    if world > 1:
        dist.all_reduce(right)
    return right.item() / len(data)


@contextmanager
def alone() -> Iterator[None]:
    """One process may read and write checkpoints too, which torch warns of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def save(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Each process writes what it holds; names are those of one process's model."""
    weights, moments = get_state_dict(model, optimizer)
    with alone():
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)


def load(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Each process reads what it holds, however many wrote it."""
    weights, moments = get_state_dict(model, optimizer)
    with alone():
        dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)


def run(options: argparse.Namespace, device: torch.device) -> float:
    data = japanese_vowels().to(device)
    model = build(options.dropout, options.shard, device)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    if options.checkpoint and options.checkpoint.exists():
        load(model, optimizer, options.checkpoint)
    train(model, optimizer, data.train, options.epochs)
    if options.checkpoint and options.epochs:
        save(model, optimizer, options.checkpoint)
    found, (rank, world) = accuracy(model, data.test), place()
    if rank == 0:
        how = "" if world == 1 else ", sharded" if options.shard else ", data parallel"
        print(f"{world} process{'es' * (world > 1)}{how}: {100 * found:.1f} % of the speakers are known")
    return found


def main(given: Sequence[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description="Who speaks, learnt by one process or by many.")
    parser.add_argument("--shard", action="store_true", help="FSDP2 instead of DistributedDataParallel")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--dropout", type=float, default=0.1, help="of the recurrence (default: %(default)s)")
    parser.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="go on from there, if it exists, and save")
    options = parser.parse_args(given)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    begins = "RANK" in os.environ and not dist.is_initialized()  # torchrun says who this is
    if begins:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        return run(options, device)
    finally:
        if begins:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
