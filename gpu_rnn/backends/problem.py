# SPDX-License-Identifier: Apache-2.0
"""`Problem`: everything that dispatch and launchers decide by, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any

import torch

from gpu_rnn.compiler.program import Program
from gpu_rnn.devices import CPU, Device
from gpu_rnn.recurrence import Recurrence

# The fields of `Problem` that a call's controls set.
CONTROL_FIELDS = ("lengths", "flags", "reset_values", "drop", "zone")
# Options that every time loop takes; `rebuilds` is done around them. A new one is not among them: each loop that takes
# it names it besides.
OF_ALL_LOOPS = ("lengths", "flags", "reset_values", "drop", "zone", "all_states", "rebuilds")
DIRECTIONS = ("inference", "training", "backward")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One call: a layer's time loop, or a stack of them.

    Attributes:
        recurrence: the cell.
        T, B, N, I, H: steps, batch, independent recurrences (directions, heads, members), input features, hidden units
            of each recurrence.
        dtype: of input, weights and output.
        device_type: "cuda", "cpu", "mps", ...
        device: the device's rates and limits.
        direction: "inference" (forward, nothing saved), "training" (forward, saves for the backward pass), or
            "backward".
        precision: of fp32 products on a GPU, "ieee" or "tf32", as torch's setting for recurrent layers says.
        lengths: rows have lengths of their own.
        packed: the input is packed, as PackedSequence.
        reverse: a character for each of N, "1" where time runs backwards.
        proj_size: width of a projected h, 0 without projection.
        layers: number of layers in the stack.
        flags: steps are masked, or states are reset to the recurrence's initial values.
        reset_values: states are reset to given values.
        drop: recurrent dropout with one mask for all gates (1), with one for each gate (their number), or none (0).
        zone: units keep their states at random (zoneout).
        all_states: every state of every step is wanted.
        norm: the products are normalised, gate by gate and recurrence by recurrence.
        rms: that is by the root mean square alone.
        rebuilds: the forward pass saves states alone, and the backward pass computes the gates again.
        bias: there are biases.
        transforms: the call is under a functorch transform or forward-mode differentiation.
    """

    recurrence: Recurrence
    T: int
    B: int
    N: int
    I: int  # noqa: E741
    H: int
    dtype: torch.dtype = torch.float32
    device_type: str = "cpu"
    device: Device = CPU
    direction: str = "inference"
    precision: str = "ieee"
    lengths: bool = False
    packed: bool = False
    reverse: str = "0"
    proj_size: int = 0
    layers: int = 1
    transforms: bool = False
    flags: bool = False
    reset_values: bool = False
    drop: int = 0
    zone: bool = False
    all_states: bool = False
    norm: bool = False
    rms: bool = False
    rebuilds: bool = False
    bias: bool = True

    def but(self, **changed: Any) -> Problem:
        """The same with other values: `dataclasses.replace` in a tenth of its time, which is much of a call's.

        Raises:
            TypeError: there is no such field.
        """
        if not changed.keys() <= self.__dict__.keys():
            raise TypeError(f"a problem has no {', '.join(changed.keys() - self.__dict__.keys())}")
        new = object.__new__(Problem)
        new.__dict__.update(self.__dict__, **changed)
        new.__dict__.pop("_hash", None)
        return new

    def __hash__(self) -> int:
        """Kept: a call looks up some answers by one problem, and a dataclass asks all of its fields each time."""
        kept = self.__dict__
        if "_hash" not in kept:
            kept["_hash"] = hash(_every_field(self))  # not of `kept`: another thread may just have put its hash there
        return kept["_hash"]

    def __getstate__(self) -> dict[str, Any]:
        """Another process has other hashes."""
        return {name: value for name, value in self.__dict__.items() if name != "_hash"}

    @property
    def program(self) -> Program:
        return self.recurrence.program

    @property
    def G(self) -> int:
        """Gates."""
        return len(self.recurrence.gates)

    @property
    def heads(self) -> int:
        """Recurrences of each direction, side by side: the blocks of a block-diagonal W_hh; under vmap the members."""
        return self.N // (1 + ("1" in self.reverse))

    @property
    def flops(self) -> float:
        """Floating-point operations of the products of one pass, projection included; backward has twice as many."""
        width = self.proj_size or self.H
        once = 2.0 * self.G * self.H * (self.I + width) * self.B * self.N * self.T * self.layers
        return once * (2 if self.direction == "backward" else 1)

    @property
    def options(self) -> dict[str, str]:
        """What a backend may refuse: each option of the call that is not torch.nn's, in a word."""
        named = {
            "lengths": "lengths of rows" if self.lengths and not self.packed else "",
            "flags": "masks and resets" if self.flags else "",
            "reset_values": "resets to given values" if self.reset_values else "",
            "drop": "recurrent dropout"
            if self.drop == 1
            else "recurrent dropout with a mask for each gate"
            if self.drop
            else "",
            "zone": "zoneout" if self.zone else "",
            "all_states": "the states of all steps" if self.all_states else "",
            "norm": "layer normalisation" if self.norm and not self.rms else "",
            "rms": "RMS normalisation" if self.norm and self.rms else "",
            "rebuilds": "saving states alone" if self.rebuilds and self.direction != "backward" else "",
        }
        return {name: words for name, words in named.items() if words}

    @property
    def controls(self) -> dict[str, int]:
        """What steers the steps, as `LayerControls.described` has it."""
        return {name: getattr(self, name) for name in CONTROL_FIELDS}

    @property
    def control_bytes(self) -> int:
        """What is loaded in a step to steer each state of a unit."""
        return self.dtype.itemsize * self.reset_values + self.zone

    def without(self, *supported: str) -> list[str]:
        """A reason for each option of the call other than those named."""
        return [f"does not take {words}" for name, words in self.options.items() if name not in supported]

    @property
    def training(self) -> bool:
        return self.direction != "inference"

    @property
    def saves_gates(self) -> bool:
        """Whether it is a forward pass that keeps the pre-activations for the backward pass."""
        return self.direction == "training" and not self.rebuilds


_every_field = attrgetter(*(field.name for field in fields(Problem)))
