# SPDX-License-Identifier: Apache-2.0
"""What `gpu_rnn.tune` measured, kept in the cache folder for each device and version, where dispatch finds it."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

from gpu_rnn import cache, devices
from gpu_rnn._version import __version__
from gpu_rnn.backends.problem import Problem
from gpu_rnn.devices import Device, cpu_name
from gpu_rnn.memo import memoize

Question = tuple[Problem, tuple[str, ...]]  # what is to run, and the backends that may run it
Times = dict[str, float]  # µs per time step of the whole call, by backend, the one to take first

# What reading a file may raise that is none of ours, or broken.
FAULTS = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError)

log = logging.getLogger("gpu_rnn")


def find(problem: Problem, among: tuple[str, ...]) -> Mapping[str, float]:
    """The measured µs per step of backends for a question, the one to take first; empty where nothing was measured."""
    kept = _kept(problem.device)
    return kept.get(_key(problem, among), {}) if kept else {}


@memoize(64)
def any_on_cpu(threads: int) -> bool:
    """Whether anything was measured on the CPU at hand, with so many threads."""
    return bool(_kept(devices.of(torch.device("cpu"))))


def keep(device: Device, found: Mapping[Question, Times]) -> Path:
    """Adds what was measured on a device to what is kept, and returns the file that it lies in.

    Raises:
        OSError: no folder takes it.
    """
    setting = _setting(device)
    path = _path(setting)
    kept = _kept(device)
    with cache.alone(path.name):
        with suppress(*FAULTS):
            kept |= _parsed(path, setting)  # other processes may have added to it meanwhile
        kept |= {_key(*question): times for question, times in found.items()}
        any_on_cpu.cache_clear()
        return cache.write(path.name, written(setting, kept))


def forget() -> None:
    """Removes everything that is kept, for every device and version."""
    for path in _files():
        path.unlink(missing_ok=True)
    _kept.cache_clear()
    any_on_cpu.cache_clear()


class Held(NamedTuple):
    """What the cache holds."""

    here: int  # choices for a device and the versions that run
    others: int  # for other devices and versions
    broken: list[Path]


def held(device: Device) -> Held:
    """Reads every file, for `gpu-rnn doctor`."""
    own, here, others, broken = _path(_setting(device)).name, 0, 0, []
    for path in sorted(_files()):
        try:
            count = len(_parsed(path, _setting(device) if path.name == own else {}))
        except FAULTS:
            broken.append(path)
            continue
        here, others = (here + count, others) if path.name == own else (here, others + count)
    return Held(here, others, broken)


def _files() -> Iterator[Path]:
    for place in cache.places():
        yield from place.glob("tuned-*.json")


@memoize(16, stays="measured, which takes seconds; where nothing can be written, it is nowhere else")
def _kept(device: Device) -> dict[str, Times]:
    """Read once for each process and device, and added to by `keep`."""
    setting = _setting(device)
    path = _path(setting)
    try:
        return _parsed(path, setting)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        log.warning(
            "tuned choices in %s are not used, for it cannot be read (%s): make it readable, or tune again", path, error
        )
    except FAULTS:
        log.warning(
            "tuned choices in %s are not used, for it is damaged: tune again, which writes it anew, or delete it", path
        )
    return {}


def _setting(device: Device) -> dict[str, str]:
    """What measurements are good for. A driver is not in it: it compiles none of the kernels."""

    triton = next((found.version for found in metadata.distributions(name="triton")), "")
    name = device.name if device.is_gpu else cpu_name()
    return {"device": name, "gpu_rnn": __version__, "torch": torch.__version__, "triton": triton}


def _path(setting: dict[str, str]) -> Path:
    return cache.wanted() / f"tuned-{hashlib.sha256(json.dumps(setting).encode()).hexdigest()[:16]}.json"


def written(setting: Mapping[str, str], choices: Mapping[str, Times]) -> bytes:
    """A file's content; `digest` tells a file that a power cut or a worn disk changed from one that `keep` wrote."""
    content = {**setting, "ranked": True, "digest": _digest(choices), "choices": choices}
    return json.dumps(content, indent=1).encode()


def _digest(choices: Mapping[str, Times]) -> str:
    return hashlib.sha256(json.dumps(choices, sort_keys=True).encode()).hexdigest()


def _parsed(path: Path, setting: dict[str, str]) -> dict[str, Times]:
    """The choices in a file. Raises one of `FAULTS` where it is not what `keep` writes for this setting."""
    found = json.loads(cache.read(path))
    if found["digest"] != _digest(found["choices"]):
        raise ValueError("it is not as it was written")
    if any(found[name] != value for name, value in setting.items()):
        raise ValueError("it is of another device or version")
    choices = {key: {name: float(us) for name, us in times.items()} for key, times in found["choices"].items()}
    if not all(0 < us < math.inf for times in choices.values() for us in times.values()):
        raise ValueError("a time is no time")
    return choices if "ranked" in found else {key: ranked(times) for key, times in choices.items()}


def ranked(times: Times, preferred: str = "") -> Times:
    """The preferred backend first, then the fastest."""
    return dict(sorted(times.items(), key=lambda item: (item[0] != preferred, item[1])))


def _key(problem: Problem, among: tuple[str, ...]) -> str:
    """Alike for problems that one measurement stands for: T and B within the same power of two, all else equal."""
    values = {
        each.name: getattr(problem, each.name) for each in fields(problem) if each.name not in ("device", "recurrence")
    }
    values |= {size: 1 << (values[size] - 1).bit_length() for size in ("T", "B")}
    words = [f"{name}={value}" for name, value in values.items()]
    return " ".join([*words, f"among={','.join(among)}", f"cell={problem.recurrence.key}"])
