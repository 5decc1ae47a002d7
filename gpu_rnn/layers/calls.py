# SPDX-License-Identifier: Apache-2.0
"""What a call of a layer takes and returns, for type checkers; see `LayerBase.forward` for what it means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol, TypeVar, overload

from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

Array = Tensor | NDArray[Any]
S = TypeVar("S")  # the states: a tensor, or a tuple of tensors


class LayerCall(Protocol[S]):
    """With return_sequences=False a PackedSequence, too, gives a tensor."""

    @overload
    def __call__(
        self,
        input: Tensor,
        hx: S | None = None,
        *,
        mask: Array | None = None,
        lengths: Array | Sequence[int] | None = None,
        resets: Array | None = None,
        reset_state: S | None = None,
        return_all_states: Literal[False] = False,
        time_parallel: float | None = None,
    ) -> tuple[Tensor, S]: ...

    @overload
    def __call__(
        self,
        input: Tensor,
        hx: S | None = None,
        *,
        mask: Array | None = None,
        lengths: Array | Sequence[int] | None = None,
        resets: Array | None = None,
        reset_state: S | None = None,
        return_all_states: Literal[True],
        time_parallel: float | None = None,
    ) -> tuple[Tensor, S, S]: ...

    @overload
    def __call__(
        self,
        input: PackedSequence,
        hx: S | None = None,
        *,
        return_all_states: Literal[False] = False,
        time_parallel: float | None = None,
    ) -> tuple[PackedSequence, S]: ...

    @overload
    def __call__(
        self,
        input: PackedSequence,
        hx: S | None = None,
        *,
        return_all_states: Literal[True],
        time_parallel: float | None = None,
    ) -> tuple[PackedSequence, S, S]: ...

    @overload
    def __call__(
        self,
        input: Tensor,
        hx: S | None = None,
        *,
        mask: Array | None = None,
        lengths: Array | Sequence[int] | None = None,
        resets: Array | None = None,
        reset_state: S | None = None,
        return_all_states: bool,
        time_parallel: float | None = None,
    ) -> tuple[Tensor, S] | tuple[Tensor, S, S]: ...


class CellCall(Protocol[S]):
    """One step."""

    def __call__(self, input: Tensor, hx: S | None = None) -> S: ...
