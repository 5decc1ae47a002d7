# SPDX-License-Identifier: Apache-2.0
"""RNNCell, LSTMCell and GRUCell: one step, as drop-ins for torch.nn's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Never

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.rnn import RNNCellBase

from gpu_rnn import cells, initializers
from gpu_rnn.activations import Activation
from gpu_rnn.call import arguments, onlookers, run
from gpu_rnn.call.stack import Stack
from gpu_rnn.layers import sequence
from gpu_rnn.layers.documented import in_full
from gpu_rnn.layers.module import Option, RecurrenceHolder, States, elman_activation
from gpu_rnn.recurrence import Recurrence
from gpu_rnn.spelling import names_meant, unexpected

if TYPE_CHECKING:
    from gpu_rnn.layers.calls import CellCall


class CellBase(RecurrenceHolder, RNNCellBase):
    """The whole of a cell but for its constructor's signature."""

    _heads = 1  # of a cell that was pickled before there were any

    def __init__(
        self,
        recurrence: Recurrence,
        input_size: int,
        hidden_size: int,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        *,
        heads: int,
        backend: str,
        options: Mapping[str, Option | None],
    ) -> None:
        super().__init__(input_size, hidden_size, bias, len(recurrence.gates), device, dtype)
        arguments.heads(heads, hidden_size, 0)
        self._heads = heads
        self._hold(recurrence, backend, {**options, "heads": heads})
        self._check_complex(dtype)
        self._flat_weights_names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"][: 4 if bias else 2]
        self._weight_shapes = self._expected_shapes()
        if heads > 1:
            for name, shape in zip(self._flat_weights_names, self._weight_shapes, strict=False):
                setattr(self, name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
            self.reset_parameters()
        if recurrence.params:
            self._flat_weights_names.append("weight_peephole")
            self.weight_peephole = nn.Parameter(torch.empty(self._weight_shapes[-1], device=device, dtype=dtype))
            bound = hidden_size**-0.5
            nn.init.uniform_(self.weight_peephole, -bound, bound)

    @property
    def heads(self) -> int:
        """Blocks on the diagonal of W_hh; the parameters are made for it."""
        return self._heads

    def reset_parameters(self) -> None:
        """Uniform in ±1/sqrt(H) as torch.nn, blocks of W_hh in ±1/sqrt(H/k)."""
        super().reset_parameters()
        initializers.uniform_blocks(self.named_parameters(), self.heads)

    def _expected_shapes(self) -> list[tuple[int, ...]]:
        return self._stack().weight_shapes(self.input_size, self.hidden_size)

    def _new_stack(self, packed: bool, all_states: bool) -> Stack:
        return Stack(recurrence=self.recurrence, bias=bool(self.bias), backend=self.backend, heads=self.heads)

    def forward(self, input: Tensor, hx: Any = None, **unknown: Never) -> Any:
        """Take one step.

        Args:
            input: (B, input_size), or (input_size) for one sample.
            hx: the states, (B, hidden_size) each, or (hidden_size) for one sample: a tensor for RNNCell and
                GRUCell, (h, c) for LSTMCell. None: zeros.
            unknown: nothing.

        Returns:
            The new states, in the form of hx.

        Raises:
            ValueError: input or a state of rank 0 or above 2.
            RuntimeError: another feature size, hidden size, batch size or rank of a state; tensors of several dtypes.
            TypeError: hx is a tuple where a tensor belongs, or the reverse.
        """
        if isinstance(input, Proxy):
            return onlookers.leaf(self, input, hx)
        if unknown:
            raise unexpected(f"{type(self).__name__}.forward()", unknown, ("input", "hx"))
        arguments.tensor("input", input)
        states = None if hx is None else self._as_tuple(hx)
        batched = input.dim() == 2
        # What nearly always is right is compared at once: a short call is all overhead.
        known = batched and input.shape[1] == self.input_size
        if known and states is not None:
            known = [state.shape for state in states] == [(input.shape[0], self.hidden_size)] * len(states)
        if not known:
            self._check_ranks(input, states)
            if not batched:
                input = input.unsqueeze(0)
                states = None if states is None else tuple(state.unsqueeze(0) for state in states)
            self._check_sizes(input, states)
        weights = self._weights()
        dtype = input.dtype
        if states is not None and [state.dtype for state in states] != [dtype] * len(states):
            arguments.check_alike(input, (), states)
        if weights[0].dtype != dtype:  # ATen's steps have poor words for it; autocast may bring both to one
            arguments.check_alike(input, weights, ())
        states = run.one_step(self._stack(), input, states, weights)
        if not batched:
            states = tuple(state.squeeze(0) for state in states)
        return states[0] if self._one_state else states

    def _check_ranks(self, input: Tensor, states: States | None) -> None:
        name = type(self).__name__
        if input.dim() not in (1, 2):
            raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
        for index, state in enumerate(states or ()):
            if state.dim() not in (1, 2):
                which = "hidden" if self._one_state else f"hx[{index}]"
                raise ValueError(f"{name}: Expected {which} to be 1D or 2D, got {state.dim()}D instead")
        if states is not None:
            self._check_rank(states, input.dim(), "batched" if input.dim() == 2 else "unbatched")

    def _check_sizes(self, input: Tensor, states: States | None) -> None:
        batch, features = input.shape
        if features != self.input_size:
            raise RuntimeError(f"input has inconsistent input_size: got {features} expected {self.input_size}")
        for index, state in enumerate(states or ()):
            rows, width = state.shape
            if rows != batch:
                raise RuntimeError(f"Input batch size {batch} doesn't match hidden{index} batch size {rows}")
            if width != self.hidden_size:
                raise RuntimeError(
                    f"hidden{index} has inconsistent hidden_size: got {width}, expected {self.hidden_size}"
                )


@in_full(sequence.RNN)
class RNNCell(CellBase):
    """One step of `gpu_rnn.RNN`, a drop-in for torch.nn.RNNCell.

    Args:
        input_size, hidden_size: features of the input and of the state.
        bias: whether there are biases. Default: True
        nonlinearity, activation, clip, backend: as for `gpu_rnn.RNN`.
        heads: blocks on the diagonal of W_hh, each weight with heads in front, as in the layers. Default: 1
        device, dtype: of the parameters. Default: torch's

    Inputs, outputs and Raises: see `forward`. Weights: those of torch.nn.RNNCell.

    Example::

        >>> import gpu_rnn, torch
        >>> gpu_rnn.RNNCell(4, 8)(torch.randn(3, 4)).shape
        torch.Size([3, 8])
    """

    if TYPE_CHECKING:
        __call__: CellCall[Tensor]

    @names_meant
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | Activation | None = None,
        clip: float | None = None,
        heads: int = 1,
        backend: str = "auto",
    ) -> None:
        function = elman_activation(nonlinearity, activation)
        sizes = input_size, hidden_size, bias, device, dtype
        super().__init__(
            cells.rnn(activation=function, clip=clip),
            *sizes,
            heads=heads,
            backend=backend,
            options={"activation": activation, "clip": clip},
        )
        self.nonlinearity = nonlinearity


@in_full(sequence.LSTM)
class LSTMCell(CellBase):
    """One step of `gpu_rnn.LSTM`, a drop-in for torch.nn.LSTMCell.

    Args:
        input_size, hidden_size: features of the input and of the states.
        bias: whether the gates have biases. Default: True
        device, dtype: of the parameters. Default: torch's
        activation, recurrent_activation, clip, backend: as for `gpu_rnn.LSTM`.
        peephole: add weight_peephole of shape (3, hidden_size), in the order i, f, o. Default: False
        heads: blocks on the diagonal of W_hh, each weight with heads in front, as in the layers. Default: 1

    Inputs, outputs and Raises: see `forward`. Weights: those of torch.nn.LSTMCell.

    Example::

        >>> import gpu_rnn, torch
        >>> h, c = gpu_rnn.LSTMCell(4, 8)(torch.randn(3, 4))
        >>> h.shape
        torch.Size([3, 8])
    """

    if TYPE_CHECKING:
        __call__: CellCall[tuple[Tensor, Tensor]]

    @names_meant
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | Activation = "tanh",
        recurrent_activation: str | Activation = "sigmoid",
        peephole: bool = False,
        clip: float | None = None,
        heads: int = 1,
        backend: str = "auto",
    ) -> None:
        options = {
            "activation": activation,
            "recurrent_activation": recurrent_activation,
            "peephole": peephole,
            "clip": clip,
        }
        sizes = input_size, hidden_size, bias, device, dtype
        super().__init__(cells.lstm(**options), *sizes, heads=heads, backend=backend, options=options)


@in_full(sequence.GRU)
class GRUCell(CellBase):
    """One step of `gpu_rnn.GRU`, a drop-in for torch.nn.GRUCell.

    Args:
        input_size, hidden_size: features of the input and of the state.
        bias: whether the gates have biases. Default: True
        device, dtype: of the parameters. Default: torch's
        activation, recurrent_activation, reset_after, clip, backend: as for `gpu_rnn.GRU`.
        heads: blocks on the diagonal of W_hh, each weight with heads in front, as in the layers. Default: 1

    Inputs, outputs and Raises: see `forward`. Weights: those of torch.nn.GRUCell.

    Example::

        >>> import gpu_rnn, torch
        >>> gpu_rnn.GRUCell(4, 8)(torch.randn(3, 4)).shape
        torch.Size([3, 8])
    """

    if TYPE_CHECKING:
        __call__: CellCall[Tensor]

    @names_meant
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | Activation = "tanh",
        recurrent_activation: str | Activation = "sigmoid",
        reset_after: bool = True,
        clip: float | None = None,
        heads: int = 1,
        backend: str = "auto",
    ) -> None:
        options = {
            "activation": activation,
            "recurrent_activation": recurrent_activation,
            "reset_after": reset_after,
            "clip": clip,
        }
        sizes = input_size, hidden_size, bias, device, dtype
        super().__init__(cells.gru(**options), *sizes, heads=heads, backend=backend, options=options)
