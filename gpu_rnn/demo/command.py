# SPDX-License-Identifier: Apache-2.0
"""``gpu-rnn demo``: what is here, training on real recordings beside torch.nn, the ratio table, one picture."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import cast

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

import gpu_rnn
from gpu_rnn.demo.datasets import Dataset, japanese_vowels, plaid
from gpu_rnn.demo.models import STANDARD, WITH_OPTIONS, PythonLoop, Variant
from gpu_rnn.demo.timing import Case, CaseTiming, measure, table
from gpu_rnn.demo.train import Epoch, Run, repeat
from gpu_rnn.diagnostics import doctor
from gpu_rnn.layers.base import LayerBase

__all__ = ["Settings", "bench", "run"]

EPOCHS = 30  # at 20 torch.nn's bidirectional LSTM is 0.4 % below what it reaches at 30
QUICK_EPOCHS = 3
LONG_EPOCHS = {"cpu": 3, "cuda": 15}  # PLAID: 12 reach 63 % with torch.nn, but one takes a CPU 11 to 17 s
TIMED_RECORDINGS = 64
MEASURE_SECONDS, QUICK_SECONDS = 1.5, 0.2  # for each line and direction of the ratio table


@dataclass(frozen=True)
class Settings:
    device: torch.device
    seeds: int = 3
    epochs: int | None = None  # None: EPOCHS on JapaneseVowels, LONG_EPOCHS on PLAID
    long: bool = False
    quick: bool = False
    out: Path = Path("gpu-rnn-demo.png")


def run(settings: Settings) -> None:
    """Runs the whole demo, printing as it goes.

    Raises:
        ModuleNotFoundError: an optional package is missing; the message names the extra to install.
    """
    _require_extras()
    start = time.perf_counter()
    print(doctor.report(settings.device))
    seeds, epochs = (
        (1, settings.epochs or QUICK_EPOCHS) if settings.quick else (settings.seeds, settings.epochs or EPOCHS)
    )

    with _one_thread():
        _learn_and_draw(settings, seeds, epochs)
    print(f"Done in {time.perf_counter() - start:.0f} s.")


def _learn_and_draw(settings: Settings, seeds: int, epochs: int) -> None:
    from gpu_rnn.demo.picture import draw

    vowels = japanese_vowels().to(settings.device)
    runs = _learn(vowels, STANDARD, WITH_OPTIONS, seeds, epochs)
    long = _long_data(settings)
    if long is not None:
        few = 1 if settings.device.type == "cpu" else seeds
        _learn(long, STANDARD[1:], (), few, settings.epochs or LONG_EPOCHS[settings.device.type])
    timed = long or vowels
    timings = _time_layers(timed, QUICK_SECONDS if settings.quick else MEASURE_SECONDS)
    draw(
        runs,
        timings,
        data=_heading(vowels, seeds),
        timed=_batch(timed),
        device=doctor.device_name(settings.device),
        path=settings.out,
    )
    print(f"\nPicture: {settings.out.resolve()}")


def bench(data: Dataset, seconds: float) -> None:
    """Only the timing, as the demo does it."""
    with _one_thread():
        _time_layers(data, seconds)


def _time_layers(data: Dataset, seconds: float) -> list[CaseTiming]:
    """Times every layer of the demo on recordings of the data set, printing the ratio table."""
    device = data.train.inputs.device
    dtypes = [torch.float32] if device.type == "cpu" else [torch.float32, torch.bfloat16]
    print(f"\nTime a call on {doctor.device_name(device)}, {_batch(data)}:", flush=True)
    timings = [measure(case, seconds=seconds) for dtype in dtypes for case in _cases(data, dtype)]
    print(table(timings))
    return timings


def _cases(data: Dataset, dtype: torch.dtype) -> list[Case]:
    rows = torch.arange(0, len(data.train), len(data.train) // TIMED_RECORDINGS)[:TIMED_RECORDINGS]
    precision = "" if dtype == torch.float32 else f", {str(dtype).removeprefix('torch.')}"
    cases = []
    for packed, count in ((data.train.packed(rows).to(dtype), ""), (data.train.packed(rows[:1]).to(dtype), ", alone")):
        for variant in STANDARD + WITH_OPTIONS:
            ours = variant.layer(gpu_rnn, data.channels).to(packed.data)
            theirs, name = _beside(variant, ours, data.channels)
            cases.append(Case(variant.label + count + precision, ours, theirs, name, packed, _backends(ours, packed)))
    return cases


def _backends(layer: nn.Module, packed: PackedSequence) -> tuple[str, str]:
    """What runs the layer forward, and forward with backward."""
    with torch.no_grad():
        forward = gpu_rnn.explain(cast(LayerBase, layer), packed).chosen
    return str(forward), str(gpu_rnn.explain(cast(LayerBase, layer), packed).chosen)


def _beside(variant: Variant, ours: nn.Module, channels: int) -> tuple[nn.Module, str]:
    """torch.nn's layer with the same weights or, where it has none, a Python loop over torch operations."""
    if variant.options:
        return PythonLoop(ours), "a Python loop"
    theirs = variant.layer(nn, channels).to(next(ours.parameters()))
    theirs.load_state_dict(ours.state_dict())
    return theirs, f"torch.nn.{variant.cell}"


def _learn(
    data: Dataset, standard: Sequence[Variant], ours_only: Sequence[Variant], seeds: int, epochs: int
) -> list[Run]:
    """Trains the standard variants with torch.nn and with gpu_rnn, the others with gpu_rnn; prints the accuracies."""
    print(f"\n{data}")
    plan = [(variant, library) for variant in standard for library in (nn, gpu_rnn)]
    plan += [(variant, gpu_rnn) for variant in ours_only]
    runs = [_learn_one(variant, library, data, seeds, epochs) for variant, library in plan]
    print(f"Test accuracy after {epochs} epochs, %, {_seeds(seeds)}:")
    theirs = {run.variant.label: run for run in runs if run.library != "gpu_rnn"}
    for run in runs:
        if run.library != "gpu_rnn":
            continue
        print(_accuracy_lines(run, theirs.get(run.variant.label), len(data.test)))
    return runs


def _learn_one(variant: Variant, library: ModuleType, data: Dataset, seeds: int, epochs: int) -> Run:
    from tqdm import tqdm

    name = f"{variant.label} ({library.__name__})"
    form = "{n_fmt:>3}/{total_fmt}|{bar:20}| {remaining} left{postfix}  {desc}"  # what a narrow window cuts comes last
    with tqdm(total=seeds * epochs, desc=name, bar_format=form, leave=False, dynamic_ncols=True, disable=None) as bar:

        def progress(epoch: Epoch) -> None:
            bar.set_postfix_str(f"loss {epoch.loss:.3f}, accuracy {100 * epoch.accuracy:.1f} %", refresh=False)
            bar.update()

        return repeat(variant, library, data, seeds=seeds, epochs=epochs, progress=progress)


def _accuracy_lines(ours: Run, theirs: Run | None, recordings: int) -> str:
    def cells(run: Run) -> str:
        return "  ".join(f"{100 * value:5.1f}" for value in run.final) + f"   mean {100 * run.mean:5.1f}"

    lines = [ours.variant.label]
    if theirs is None:
        lines += [f"  gpu_rnn   {cells(ours)}   (torch.nn has no such layer)"]
    else:
        # One recording decided the other way moves an accuracy by this much, and rounding alone can do that.
        margin = 1 / recordings
        inside = min(theirs.final) - margin <= ours.mean <= max(theirs.final) + margin
        verdict = "within" if inside else "OUTSIDE"
        lines += [f"  torch.nn  {cells(theirs)}", f"  gpu_rnn   {cells(ours)}   {verdict} torch.nn's range"]
    return "\n".join(lines)


def _long_data(settings: Settings) -> Dataset | None:
    """PLAID where it was asked for, and on a GPU where it is installed."""
    if settings.long:
        return plaid().to(settings.device)
    if settings.device.type == "cpu" or settings.quick:
        return None
    try:
        return plaid().to(settings.device)
    except ModuleNotFoundError as missing:
        print(f"\nThe long recordings are left out: {missing}")
        return None


@contextmanager
def _one_thread() -> Iterator[None]:
    """For layers this small a second CPU thread gains little, and on a busy machine costs a factor of ten and more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _require_extras() -> None:
    missing = [name for name in ("matplotlib", "tqdm") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"the demo needs {' and '.join(missing)}: pip install 'gpu-rnn[demo]'")


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def _heading(data: Dataset, seeds: int) -> str:
    return f"{data.name}: {len(data.test)} test recordings, {data.classes} classes, {_seeds(seeds)}"


def _batch(data: Dataset) -> str:
    lengths = data.train.lengths
    steps = f"{int(lengths.min())} to {int(lengths.max()):,} steps"
    return f"{TIMED_RECORDINGS} packed recordings of {data.name} ({steps}), or one alone"
