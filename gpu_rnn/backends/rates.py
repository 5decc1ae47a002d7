# SPDX-License-Identifier: Apache-2.0
"""The constants of the backends' cost models: those that a fit may change, for each GPU, and those of arithmetic.

Steps are simulated (`chains.py`). What a fit may change stands here as predicted or published. `benchmarks/fit.py
--write` puts constants fitted to a results file into `rates.json` beside this file, under the name in `gpu_rnn.devices`
of the GPU that was measured, or that of a CPU. A GPU that is not in there has those of one with the same compute
capability or, where none was measured, the predicted ones; a CPU those of the first one that was measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from gpu_rnn.devices import CPU, DEVICES, Device, cpu_model, known_as
from gpu_rnn.memo import memoize


@dataclass(frozen=True)
class LoopRates:
    """Of a kernel that holds the time loop: `backends/resident.py`, `backends/group/choice.py`."""

    start: float  # seconds: launches of projection and kernel, and of what clears an exchange
    step: float = 1.0  # times what a step takes by simulation (`backends/chains.py`)
    projection: float = 1.0  # times what the projection takes at the peak rate, which is the least


@dataclass(frozen=True)
class AtenRates:
    """Of `backends/aten.py`, which has the sources of what is published."""

    step: float = 6e-6  # seconds: two launches a step outside cuDNN's persistent kernels
    persistent_step: float = 1.96e-6  # published, forward
    persistent_backward: float = 3.11e-6  # published, of 5.07 for both passes
    products: float = 1.0  # times what all products take at the peak rate


@dataclass(frozen=True)
class StepRates:
    """Of `backends/step/launch.py`."""

    # Seconds of two launches and a product's latency, as ATen's. What the pointwise kernel takes comes on top, so while
    # nothing is measured, what cuDNN can run stays there.
    step: float = 6e-6
    products: float = 1.0  # as ATen's


@dataclass(frozen=True)
class ReferenceRates:
    """Of `backends/reference.py`."""

    operation: float = 8e-6  # seconds for a small torch operation: a call on a CPU, a launch on a GPU


@dataclass(frozen=True)
class CpuRates:
    """Of a backend on a CPU, in seconds, forward and then backward; see `backends/cpu_cost.py`."""

    start: float  # of a call
    step: float  # of a step, whatever it computes
    weight: float  # of a weight that enters a step's product, however many rows there are
    product: float  # of a multiplication
    element: float  # of an operation of the program, a unit and row
    back_start: float
    back_step: float
    back_weight: float
    back_product: float
    back_element: float
    together: float = 0.5  # the share of what is no start that a second thread takes half of
    join: float = 5e-6  # of a step that threads share: to wake them, and to wait for the last
    back_join: float = 1e-5
    back_together: float = 0.5
    pack: float = 1e-11  # of a weight, once a call: to lay it out as the products read it
    back_pack: float = 1e-11


@dataclass(frozen=True)
class Rates:
    """The constants of all models on one device. `source` says where from, in words for a user."""

    source: str = "predicted"
    resident: LoopRates = field(default_factory=partial(LoopRates, 1e-5))
    group: LoopRates = field(default_factory=partial(LoopRates, 1.2e-5))
    aten: AtenRates = field(default_factory=AtenRates)
    step: StepRates = field(default_factory=StepRates)
    reference: ReferenceRates = field(default_factory=ReferenceRates)
    # An AMD EPYC with AVX-512, one thread, rounded: what a fit starts from.
    cpu_lstm: CpuRates = CpuRates(5e-5, 5e-7, 5e-11, 2e-11, 3e-10, 5e-5, 3e-6, 6e-11, 4e-11, 8e-10)  # ATen's
    cpu_gru: CpuRates = CpuRates(3e-5, 9e-6, 9e-11, 2e-11, 7e-10, 1e-4, 9e-5, 4e-10, 4e-11, 2e-9)
    cpu_rnn: CpuRates = CpuRates(2e-5, 4e-6, 5e-11, 2e-11, 2e-9, 5e-5, 3e-5, 4e-10, 4e-11, 2e-9, join=2e-5)
    cpu_step: CpuRates = CpuRates(3e-4, 1.5e-6, 2e-10, 2e-11, 1.6e-9, 1e-3, 2.5e-6, 3e-10, 4e-11, 4e-9)
    cpu_native: CpuRates = CpuRates(3e-4, 1e-7, 1e-11, 2e-11, 3e-10, 1e-3, 2e-7, 4e-11, 3e-11, 5e-10)
    # native's short ways: plain layers, one step
    cpu_plain: CpuRates = CpuRates(4e-5, 1e-7, 1e-11, 2e-11, 3e-10, 1e-4, 2e-7, 4e-11, 3e-11, 5e-10)
    cpu_one: CpuRates = CpuRates(2e-5, 1e-6, 3e-11, 3e-11, 1e-9, 4e-5, 1e-6, 2e-10, 6e-11, 2e-9)

    @property
    def fitted(self) -> bool:
        return self != PREDICTED

    def having(self, constants: Mapping[str, Mapping[str, float]], source: str) -> Rates:
        """The same with other constants of some backends.

        Raises:
            TypeError: a backend or a constant that no model has.
        """
        changed: dict[str, Any] = {name: replace(getattr(self, name), **given) for name, given in constants.items()}
        return replace(self, source=source, **changed)


@dataclass(frozen=True)
class ResidentModel:
    """What bounds a step of `backends/resident.py`."""

    instructions: float = (
        10.0  # for a unit and operation: the 90 a unit of an LSTM's time loop, built for sm_90, over 9
    )
    backward: float = 1.4  # times as many in the backward loop; likewise
    latency: float = 700.0  # cycles that nothing hides: product, two barriers, exchange of h, activations in a row
    projected: float = 0.5  # of it once more for a projection of h, which no activations follow
    tensor_share: float = 0.6  # of the tensor cores' peak rate that 16-row instructions reach; by others, on an H100


@dataclass(frozen=True)
class GroupModel:
    """What bounds a step of `backends/group/choice.py`, by which layouts are ranked."""

    # By others, on an H100; see kernels/README.md.
    tensor_latency: float = 33.0  # cycles from one such instruction to the next that needs its sum
    tensor_share: float = 0.6  # as the resident kernel's
    l2_bytes: float = 37.0  # per cycle that reach one multiprocessor while all read
    hop: float = 6e-7  # seconds from a store to its sight in another block, beside the words' own way
    remote: float = 213.0  # cycles from a store into another block's shared memory to its sight there
    remote_bytes: float = 21.0  # of such stores that leave a multiprocessor in a cycle
    latency: float = 490.0  # cycles in a row that nothing hides: barrier, activations of a pair of units, rounding
    instructions: float = 3.0  # for a unit and operation of the program
    shuffled: float = 1.5  # full fp32: times the multiplications alone, for the shuffles beside them


RESIDENT, GROUP = ResidentModel(), GroupModel()
PREDICTED = Rates()
MODELS = tuple(each.name for each in fields(Rates) if each.name != "source")
FILE = Path(__file__).with_name("rates.json")


def of(device: Device) -> Rates:
    """The constants on a device: those fitted on it, else on one of its capability, or the predicted ones."""
    fitted = _fitted()
    if not device.is_gpu:  # one that nobody measured counts as the first that somebody did
        first = next((known for key, known in fitted.items() if key not in DEVICES), PREDICTED)
        return fitted.get(cpu_model() if device.name == CPU.name else device.name, first)
    alike = [key for key, each in DEVICES.items() if each.capability == device.capability]
    return next((fitted[key] for key in (known_as(device.name), *alike) if key in fitted), PREDICTED)


@memoize(1)
def _fitted() -> dict[str, Rates]:
    entries = json.loads(FILE.read_text())
    return {key: PREDICTED.having(entry["constants"], source_of(entry)) for key, entry in entries.items()}


def source_of(entry: Mapping[str, Any]) -> str:
    """Where an entry of the file comes from, in words."""
    commits = ", ".join(commit[:7] for commit in entry["commits"])
    files = entry["results"]
    places = files if len(files) == 1 else sorted({str(Path(file).parent) for file in files})
    return f"fitted to {', '.join(places)} ({entry['device']}, measured of {commits})"
