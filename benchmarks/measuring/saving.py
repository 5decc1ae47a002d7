# SPDX-License-Identifier: Apache-2.0
"""What a layer saves for its backward pass, counted, and what memory and time that takes, on a CPU:

python -m benchmarks.measuring.saving --layers 4
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

import gpu_rnn
from gpu_rnn.devices import cpu_name

WAYS = (("aten", "gates"), ("native", "gates"), ("native", "states"), ("step", "gates"), ("step", "states"))


def saved(call: Callable[[], object], given: Iterable[Tensor] = ()) -> int:
    """Bytes of the memory that a call saves for its backward pass, each once, without that of what it was `given`."""
    own = {tensor.untyped_storage().data_ptr() for tensor in given}
    sizes: dict[int, int] = {}
    held = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        held.append(call())
    return sum(size for address, size in sizes.items() if address not in own)


def peak(call: Callable[[], object]) -> int:
    """The most bytes of torch's that a call on a CPU holds at once, beyond those that it found."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    events: Any = seen.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    most = now = 0
    for _, size in changes:
        now += size
        most = max(most, now)
    return most


def took(call: Callable[[], object], rounds: int) -> float:
    """Seconds, the least of some rounds."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def row(backend: str, save: str, sizes: argparse.Namespace) -> str:
    """A row of the table, of an LSTM on that backend."""
    layer = gpu_rnn.LSTM(sizes.units, sizes.units, sizes.layers, backend=backend, save=save)
    x = torch.randn(sizes.steps, sizes.batch, sizes.units)

    def train() -> None:
        layer(x)[0].sum().backward()

    train()  # which makes the gradients of the weights
    kept = saved(lambda: layer(x), [x, *layer.parameters()]) / 1e6
    most = peak(train) / 1e6
    seconds = f"{took(train, sizes.rounds):.2f}" if sizes.rounds else ""
    return f"| `{backend}` | `{save}` | {sizes.layers} | {kept:,.0f} | {most:,.0f} | {seconds} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("steps", 1000), ("batch", 64), ("units", 512), ("layers", 1), ("rounds", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    sizes = parser.parse_args()
    print(f"{cpu_name()}, torch {torch.__version__}, {torch.get_num_threads()} threads, fp32: {vars(sizes)}")
    print("| backend | save | layers | saved, MB | peak, MB | seconds |\n|---|---|--:|--:|--:|--:|")
    for backend, save in WAYS:
        print(row(backend, save, sizes), flush=True)


if __name__ == "__main__":
    main()
