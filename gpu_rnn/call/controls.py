# SPDX-License-Identifier: Apache-2.0
"""What steers a call of a whole stack (masks, lengths, resets, dropouts), checked, and brought to each layer's layout.

Sizes as in `gpu_rnn.backends.tensors`, with D directions and L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from gpu_rnn.backends.tensors import RESET, SKIP, LayerControls, within_lengths
from gpu_rnn.call import autocast, heads, onlookers, transforms
from gpu_rnn.call.transfer import to_device


class StackControls(NamedTuple):
    """The options of a call that are tensors, time first. See `functional.rnn`, which documents them."""

    mask: Tensor | None = None  # (T, B) bool, True: the step counts
    lengths: Tensor | None = None  # (B,)
    resets: Tensor | None = None  # (T, B) bool, True: an episode begins
    reset_state: tuple[Tensor, ...] | None = None  # of each state, (L·D, B, ·) or (T, L·D, B, ·)
    recurrent_mask: Tensor | None = None  # (L·D, B, 1 or G, P)
    zone: Tensor | None = None  # (S, T, L·D, B, H) bool

    @staticmethod
    def of(
        x: Tensor | PackedSequence,
        mask: Any = None,
        lengths: Any = None,
        resets: Any = None,
        reset_state: Any = None,
        recurrent_mask: Any = None,
        zone: Any = None,
    ) -> StackControls:
        """From what a caller gives, arrays for tensors too; those go to the device of x.

        Raises:
            TypeError: anything else.
        """
        if mask is lengths is resets is reset_state is recurrent_mask is zone is None:
            return NONE
        if lengths is not None:
            lengths = _lengths(lengths)
        return StackControls(
            _tensor("mask", mask, x),
            lengths,
            _tensor("resets", resets, x),
            None if reset_state is None else tuple(reset_state),
            _tensor("recurrent_mask", recurrent_mask, x),
            _tensor("zone", zone, x),
        )

    def refuse_packed(self, batch_sizes: Tensor | None) -> None:
        """Raises ValueError where the call is packed."""
        if batch_sizes is None:
            return
        given = ", ".join(name for name, value in self._asdict().items() if value is not None)
        raise ValueError(
            f"{given} cannot come with a PackedSequence, whose rows have lengths already: give the padded tensor, "
            "with lengths=, instead (torch.nn.utils.rnn.pad_packed_sequence returns both)"
        )

    @property
    def of_steps(self) -> tuple[Tensor | None, ...]:
        """All but the values to reset to, which have derivatives."""
        return self.mask, self.lengths, self.resets, self.recurrent_mask, self.zone

    @property
    def given(self) -> bool:
        for value in self:  # no generator: it is entered for each, and a short call asks
            if value is not None:
                return True
        return False

    def checked(self, steps: int, shapes: Sequence[tuple[int, ...]], gates: int, x: Tensor) -> StackControls:
        """The same with lengths on the input's device; `shapes` are those of the states, (L·D, B, ·).

        Raises:
            TypeError: a mask or resets that are not bool, lengths that are not integers.
            ValueError: a wrong shape, a zone that is not bool, lengths out of range, reset_state without resets.
            RuntimeError: a tensor on another device, reset_state of another dtype.
        """
        for name, value in (("mask", self.mask), ("resets", self.resets)):
            _check_steps(name, value, (steps, shapes[0][1]), x)
        lengths = self.lengths
        if lengths is not None:
            lengths = to_device(_checked_lengths(lengths, steps, shapes[0][1]), x.device, "lengths")
        if self.reset_state is not None and self.resets is None:
            raise ValueError("reset_state is what resets set the states to: give resets too")
        for value, shape in zip(self.reset_state or (), shapes, strict=self.reset_state is not None):
            each = (steps, *shape)
            # By its rank: to compare T with a number of layers would forbid an exported program to have as many steps.
            if value.shape != (each if value.dim() == len(each) else shape):
                raise ValueError(f"reset_state is {shape}, or for each step {each}, got {tuple(value.shape)}")
            if autocast.dtype_of(value) != autocast.dtype_of(x):
                raise RuntimeError(
                    f"reset_state is {value.dtype} and the input {x.dtype}: convert it with .to(input.dtype)"
                )
        rows, batch, width = shapes[0]
        drop, zone = self.recurrent_mask, self.zone
        if drop is not None and drop.shape != (rows, batch, 1, width) and drop.shape != (rows, batch, gates, width):
            raise ValueError(f"recurrent_mask is ({rows}, {batch}, 1 or {gates}, {width}), got {tuple(drop.shape)}")
        units = (len(shapes), steps, *shapes[-1])
        if zone is not None and (zone.dtype != torch.bool or zone.shape != units):
            raise ValueError(f"zone is bool, {units}, got {zone.dtype}, {tuple(zone.shape)}")
        for name, value in zip(self._fields, self, strict=True):
            if value is None or name == "lengths":
                continue
            for tensor in value if isinstance(value, tuple) else (value,):
                if tensor.device != x.device:
                    raise RuntimeError(
                        f"{name} is on {tensor.device} and the input on {x.device}: use .to(input.device)"
                    )
        return self if lengths is self.lengths else self._replace(lengths=lengths)

    def transposed(self) -> StackControls:
        """The same of a call with the batch first; states never have it first."""
        mask, resets = (
            t.transpose(0, 1) if isinstance(t, Tensor) and t.dim() == 2 else t for t in (self.mask, self.resets)
        )
        return self if mask is self.mask and resets is self.resets else self._replace(mask=mask, resets=resets)

    def batched(self, steps: int) -> StackControls:
        """The same of a call without a batch, with a batch of one; errors as `checked`'s of mask and resets."""
        if not self.given:
            return self
        for name, value in (("mask", self.mask), ("resets", self.resets)):
            _check_steps(name, value, (steps,))
        mask, resets = (t if t is None else t.unsqueeze(1) for t in (self.mask, self.resets))
        lengths = self.lengths
        if lengths is not None and lengths.numel() == 1:
            lengths = lengths.reshape(1)
        values = self.reset_state and tuple(value.unsqueeze(-2) for value in self.reset_state)
        return self._replace(mask=mask, resets=resets, lengths=lengths, reset_state=values)

    def to(self, dtype: torch.dtype) -> StackControls:
        """The same with what enters products, and states, in a dtype."""
        if self.recurrent_mask is self.reset_state is None:
            return self
        drop = None if self.recurrent_mask is None else self.recurrent_mask.to(dtype)
        values = self.reset_state and tuple(value.to(dtype) for value in self.reset_state)
        return self._replace(recurrent_mask=drop, reset_state=values)

    def valid(self, steps: int) -> Tensor | None:
        """(T, B): the steps that count, None if all do."""
        if self.lengths is None:
            return self.mask
        within = within_lengths(self.lengths, steps)
        return within if self.mask is None else within & self.mask

    def last(self, output: Tensor, h: Tensor, directions: int) -> Tensor:
        """(B, D·P): the output (T, B, D·P) of the last step that counts, as each direction meets them; 0 where there is
        none.

        Without a mask that is the last layer's final h. With one, a reset may come later.
        """
        if self.mask is None:
            last = h[-directions:].transpose(0, 1).flatten(1)
            return last if self.lengths is None else torch.where(self.lengths.unsqueeze(1) > 0, last, 0)
        valid = self.valid(output.shape[0])
        assert valid is not None
        steps = torch.arange(output.shape[0], device=output.device).unsqueeze(1)
        ends = [(steps * valid).amax(0), output.shape[0] - 1 - ((output.shape[0] - 1 - steps) * valid).amax(0)]
        rows = torch.arange(output.shape[1], device=output.device)
        parts = zip(ends[:directions], output.chunk(directions, 2), strict=True)
        return torch.cat([part[end, rows] for end, part in parts], 1)  # the output of a step that does not count is 0

    def flagged(self, all_states: bool) -> bool:
        """Whether the loops get flags: lengths by themselves stay lengths, unless the states beyond them are wanted."""
        return self.mask is not None or self.resets is not None or (self.lengths is not None and all_states)

    def silenced(self, y: Tensor, valid: Tensor | None, all_states: bool) -> Tensor:
        """The loops' y (T, B, ·) with 0 at the steps that do not count, where they were given flags: h stands there."""
        if valid is None or not self.flagged(all_states):
            return y
        return torch.where(valid.unsqueeze(-1), y, 0)

    def described(self, packed: bool, all_states: bool) -> dict[str, Any]:
        """As `LayerControls.described`, of every layer's, with whether there are values to reset to."""
        flags = self.flagged(all_states)
        return {
            "lengths": packed or (self.lengths is not None and not flags),
            "flags": flags,
            "reset_values": self.reset_state is not None,
            "drop": 0 if self.recurrent_mask is None else self.recurrent_mask.shape[2],
            "zone": self.zone is not None,
        }

    def flags(self, reverse: str, steps: int, all_states: bool) -> Tensor | None:
        """`LayerControls.flags`, which are those of every layer."""
        return _flags(self.valid(steps), self.resets, self.lengths, reverse) if self.flagged(all_states) else None

    def of_layer(
        self, rows: slice, reverse: str, steps: int, flags: Tensor | None, k: int = 1
    ) -> tuple[LayerControls, list[Tensor]]:
        """The part of one layer, whose directions of `k` heads stand in `rows` of the states, and its reset values.

        `reverse` has a character for each direction.
        """
        drop, zone = self.recurrent_mask, self.zone
        if drop is not None:
            drop = heads.masks_apart(drop[rows].transpose(0, 1), k)
        if zone is not None:
            zone = heads.apart(zone[:, :, rows].transpose(2, 3), k)
        if flags is None:
            return LayerControls(self.lengths, None, drop, zone), []
        values = self.reset_state or ()
        if any(value.dim() == 4 for value in values):
            values = tuple(value if value.dim() == 4 else value.expand(steps, *value.shape) for value in values)
        return LayerControls(None, flags, drop, zone), [
            heads.apart(_reset_values(value, rows, reverse), k) for value in values
        ]


NONE = StackControls()


def _tensor(name: str, value: Any, like: Tensor | PackedSequence) -> Tensor | None:
    """None and a tensor as they are; an array as a tensor, on the device of `like`."""
    if value is None or isinstance(value, Tensor):
        return value
    if not hasattr(value, "__array__"):
        kind = f"a bool tensor, {MEANING[name]}" if name in MEANING else "a tensor"
        raise TypeError(f"{name} is {kind}, or such an array, got {type(value).__name__}")
    return to_device(_from_array(name, value), like.data.device, name)


def _from_array(name: str, values: Any) -> Tensor:
    """Of anything with __array__, whatever the order of its bytes."""
    array = values.__array__()
    if array.dtype.kind not in "biufc":
        raise TypeError(f"{name} holds numbers or truth values, got an array of {array.dtype}")
    return torch.as_tensor(array.astype(array.dtype.newbyteorder("="), copy=False))


MEANING = {"mask": "True where a step counts", "resets": "True where an episode begins"}


def _check_steps(name: str, value: Tensor | None, shape: tuple[int, ...], x: Tensor | None = None) -> None:
    """Time first; an error has the order of x, which may have the batch first."""
    if value is None:
        return
    if value.dtype != torch.bool:
        raise TypeError(f"{name} is a bool tensor, {MEANING[name]}, got {value.dtype}")
    if value.shape != shape:
        found = tuple(value.shape)
        if x is not None and x.shape[:2] != shape:
            shape, found = shape[::-1], found[::-1] if value.dim() == 2 else found
        raise ValueError(f"{name} is shaped like the input without its features, {shape}, got {found}")


def _lengths(lengths: Any) -> Tensor:
    """As int64, so that nothing that is done to them overflows: T may be more than a uint8 holds."""
    words = "lengths are a list or tensor of (B) integers, the number of steps of each row, got"
    if isinstance(lengths, Tensor):
        if lengths.dtype == torch.int64:
            return lengths
    elif hasattr(lengths, "__array__"):
        lengths = _from_array("lengths", lengths)
    elif isinstance(lengths, (list, tuple, range)):
        if not all(map(_is_integer, lengths)):
            raise TypeError(f"{words} {lengths!r}")
        return torch.as_tensor(lengths, dtype=torch.int64)
    else:
        raise TypeError(f"{words} {lengths!r}")
    if lengths.dtype.is_floating_point or lengths.dtype == torch.bool or lengths.is_complex():
        raise TypeError(f"{words} {lengths.dtype}")
    return lengths.to(torch.int64)


def _is_integer(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 0 and not value.is_floating_point() and not value.is_complex() and not value.is_meta
    return hasattr(value, "__index__") and not isinstance(value, bool)


def _checked_lengths(lengths: Tensor, steps: int, batch: int) -> Tensor:
    """Lengths on a GPU are clamped instead of looked at: the host would have to wait for them."""
    if lengths.shape != (batch,):
        raise ValueError(
            f"lengths has one number for each of the {batch} rows of the batch, got shape {tuple(lengths.shape)}"
        )
    known = lengths.is_cpu and not onlookers.recorded(lengths) and not transforms.active()
    if known and batch and not _within(lengths, steps):
        raise ValueError(f"lengths are between 0 and {steps}, the steps of the input, got {lengths.tolist()}")
    return lengths if known else lengths.clamp(0, steps)


def _within(lengths: Tensor, steps: int) -> bool:
    """Of few numbers a list is looked at sooner than a tensor."""
    if len(lengths) <= 64:
        each = lengths.tolist()
        return 0 <= min(each) <= max(each) <= steps
    return 0 <= int(lengths.min()) <= int(lengths.max()) <= steps


def _flags(valid: Tensor | None, resets: Tensor | None, lengths: Tensor | None, reverse: str) -> Tensor:
    """(T, B, N) uint8. A reset cuts between two steps: the reversed direction meets it before the earlier one."""
    assert SKIP == 1  # as True is
    skip = None if valid is None else (~valid).to(torch.uint8)
    if resets is None:
        assert skip is not None
        return _of_each(skip, len(reverse))
    if lengths is not None:  # what begins after a row's end is none of its episodes
        resets = resets & within_lengths(lengths, resets.shape[0])
    assert RESET == 2  # a sum takes less than a product with a number, and a short call is all overhead
    forward = resets.to(torch.uint8)
    forward = forward + forward
    if "1" in reverse:
        steps = torch.arange(resets.shape[0], device=resets.device)[:, None]
        backward = _earlier(forward) * (steps < resets.shape[0] - 1)  # nothing comes before the last step
        flags = torch.stack([forward if flag == "0" else backward for flag in reverse], -1)
    else:
        flags = _of_each(forward, len(reverse))
    return flags if skip is None else flags | skip.unsqueeze(-1)


def _of_each(flags: Tensor, recurrences: int) -> Tensor:
    """(T, B) -> (T, B, N)"""
    flags = flags.unsqueeze(-1)
    return (flags if recurrences == 1 else flags.expand(-1, -1, recurrences)).contiguous()


def _earlier(values: Tensor) -> Tensor:
    """Values (T, ...) one step earlier. What comes to the last step is of no use there."""
    return values.roll(-1, 0)


def _reset_values(value: Tensor, rows: slice, reverse: str) -> Tensor:
    """(L·D, B, ·) or (T, L·D, B, ·) -> (1 or T, B, N, ·), each as its direction meets it."""
    own = value[..., rows, :, :].transpose(-3, -2)
    if own.dim() == 3:
        return own[None]
    parts: Sequence[Tensor] = own.unbind(2)
    return torch.stack([part if flag == "0" else _earlier(part) for part, flag in zip(parts, reverse, strict=True)], 2)
