# SPDX-License-Identifier: Apache-2.0
"""Times calls in turns, so that a change of clock or load meets all of them alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

Timed = Callable[[], object]

TRIALS = 15  # rounds; the median of 15 is steady to a few percent on a busy desk machine
FEWEST = 3  # rounds, for a call too slow for more
WARM_UP = 3  # calls before the first sample: the first compiles, the next fill caches and graph pools
# Calls are queued until a sample lasts this long: a thousand times the resolution of CUDA's events (0.5 µs, by their
# documentation) and of the host's clock under a busy scheduler.
SAMPLE_SECONDS = {"cuda": 5e-3, "cpu": 2e-2}


@dataclass
class Timing:
    """Seconds a call: one value a round."""

    how: str  # "events", "graph" or "clock"
    calls: int  # in one sample
    samples: list[float]

    @property
    def median(self) -> float:
        from statistics import median  # brings fractions and decimals: not with the package

        return median(self.samples)

    @property
    def spread(self) -> tuple[float, float]:
        """The 20th and the 80th percentile."""
        from statistics import quantiles

        if len(self.samples) == 1:
            return self.samples[0], self.samples[0]
        cuts = quantiles(self.samples, n=5, method="inclusive")
        return cuts[0], cuts[-1]


def interleave(
    calls: Mapping[str, Timed],
    device: torch.device,
    *,
    trials: int,
    seconds: float,
    deadline: float = math.inf,
    progress: Callable[[range], Iterable[int]] = iter,
    fewest: int = FEWEST,
) -> dict[str, Timing]:
    """Times every call in turn, who is first changing from round to round.

    Args:
        calls: at least one.
        trials: rounds at most. A call whose samples exceed its share of `seconds` gets fewer, but `fewest`.
        seconds: for all the calls together, about.
        deadline: of time.monotonic(); after it no round begins but the first.
        progress: goes through the first calls, and then through the rounds, such as a bar.
        fewest: rounds of a call that is too slow for more.
    """
    names, share = list(calls), seconds / len(calls)
    counts = {names[place]: _count(calls[names[place]], device, share) for place in progress(range(len(names)))}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    for trial in progress(range(trials)):
        if trial and time.monotonic() > deadline:
            break
        turn = trial % len(names)
        going_on = [name for name in names[turn:] + names[:turn] if trial < fewest or spent[name] <= share]
        for name in going_on:
            took = sample(calls[name], counts[name], device)
            spent[name] += took
            samples[name].append(took / counts[name])
    how = "events" if device.type == "cuda" else "clock"
    return {name: Timing(how, counts[name], samples[name]) for name in names}


def sample(call: Timed, count: int, device: torch.device) -> float:
    """Seconds that `count` calls take, queued without waiting in between."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(count):
            call()
        return time.perf_counter() - start
    with torch.cuda.device(device):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        before.record()
        for _ in range(count):
            call()
        after.record()
        after.synchronize()
    return before.elapsed_time(after) / 1e3


def _count(call: Timed, device: torch.device, share: float) -> int:
    """How many calls make a sample; warms up, unless the first call took all of the share."""
    if (took := sample(call, 1, device)) <= share:
        took = sample(call, WARM_UP - 1, device) / (WARM_UP - 1)
    return max(1, round(SAMPLE_SECONDS[device.type] / took))
