# SPDX-License-Identifier: Apache-2.0
"""What all layers share: weights under torch.nn's names, checks in its words, the way to `functional.rnn`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from gpu_rnn import dispatch, functional
from gpu_rnn.activations import Activation, name_of
from gpu_rnn.recurrence import Recurrence
from gpu_rnn.stack import Stack

States = tuple[Tensor, ...]
Option = str | bool | Activation

OPTION_DEFAULTS = {
    "activation": "tanh",
    "recurrent_activation": "sigmoid",
    "reset_after": True,
    "peephole": False,
    "backend": "auto",
}


class RecurrenceHolder(nn.Module):
    """What layers and cells have in common: a recurrence, its options in repr, and the form of its states."""

    recurrence: Recurrence
    backend: str
    _flat_weights_names: list[str]

    def _hold(self, recurrence: Recurrence, backend: str, options: Mapping[str, Option]) -> None:
        dispatch.check_name(backend)
        for name, value in options.items():
            if isinstance(OPTION_DEFAULTS[name], bool) and not isinstance(value, bool):
                raise TypeError(f"{name} should be True or False, got: {value!r}")
        self.recurrence = recurrence
        self.backend = backend
        self._one_state = len(recurrence.states) == 1
        given = {
            name: value
            for name, value in {**options, "backend": backend}.items()
            if value != OPTION_DEFAULTS[name]
        }
        # Names, never the user's functions: those may not pickle.
        self._shown = {
            name: value if isinstance(value, bool) else name_of(value) for name, value in given.items()
        }

    def _weights(self) -> list[Tensor]:
        parameters: dict[str, Any] = self._parameters
        try:
            return [parameters[name] for name in self._flat_weights_names]
        except (
            KeyError
        ):  # something stands in for one of them. An attribute of a Module takes 0.7 µs to read.
            return [getattr(self, name) for name in self._flat_weights_names]

    def extra_repr(self) -> str:
        return super().extra_repr() + "".join(f", {name}={value}" for name, value in self._shown.items())

    def __prepare_scriptable__(self) -> NoReturn:
        name = type(self).__name__
        raise RuntimeError(
            f"torch.jit.script cannot compile gpu_rnn.{name}: export the model with torch.export.export"
        )

    def _as_tuple(self, hx: Tensor | Sequence[Tensor]) -> States:
        names = self.recurrence.states
        wanted = "a Tensor" if self._one_state else f"a tuple of {len(names)} Tensors ({', '.join(names)})"
        if self._one_state != isinstance(hx, Tensor):
            raise TypeError(f"{type(self).__name__}: hx should be {wanted}, got {type(hx).__name__}")
        states = (hx,) if self._one_state else tuple(hx)
        if len(states) != len(names):
            raise RuntimeError(f"{type(self).__name__}: hx should be {wanted}, got {len(states)}")
        return states

    def _check_rank(self, states: States, rank: int, kind: str) -> None:
        if all(state.dim() == rank for state in states):
            return
        names = " and ".join("hx" if name == "h" else f"{name}x" for name in self.recurrence.states)
        ranks = ", ".join(f"{state.dim()}-D" for state in states)
        got = f"{ranks} tensor" if self._one_state else f"({ranks}) tensors"
        raise RuntimeError(f"For {kind} {rank}-D input, {names} should also be {rank}-D but got {got}")


class LayerBase(RecurrenceHolder, nn.RNNBase):
    """The whole of a layer but for its constructor's signature."""

    # RNNBase keeps a second list of its weights for cuDNN's one flat buffer. Here they are read at each call,
    # so that whatever stands in for one (a parametrization, functional_call, pruning) is seen.
    __setattr__ = nn.Module.__setattr__  # type: ignore[assignment]
    __getstate__ = object.__getstate__
    __setstate__ = nn.Module.__setstate__
    _replicate_for_data_parallel = nn.Module._replicate_for_data_parallel

    def __init__(
        self,
        recurrence: Recurrence,
        mode: str,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        proj_size: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        *,
        backend: str,
        options: Mapping[str, Option],
        unit_weight: str = "weight_unit",
    ) -> None:
        # RNNBase checks and keeps the arguments. Its parameters have the gates of its own modes, so they are
        # made on "meta", where they cost nothing, and replaced.
        flags = bias, batch_first, dropout, bidirectional
        super().__init__("RNN_TANH", input_size, hidden_size, num_layers, *flags, proj_size, "meta", dtype)
        self.mode = mode
        self._hold(recurrence, backend, options)
        self._make_parameters(unit_weight, device, dtype)
        self.reset_parameters()

    def _make_parameters(
        self, unit_weight: str, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        rows = len(self.recurrence.gates) * self.hidden_size
        width = self.proj_size or self.hidden_size
        suffixes = ("", "_reverse") if self.bidirectional else ("",)
        self._parameters.clear()
        self._all_weights = []
        for layer in range(self.num_layers):
            shapes: dict[str, tuple[int, ...]] = {
                "weight_ih": (rows, len(suffixes) * width if layer else self.input_size),
                "weight_hh": (rows, width),
            }
            if self.bias:
                shapes |= {"bias_ih": (rows,), "bias_hh": (rows,)}
            if self.proj_size:
                shapes["weight_hr"] = (self.proj_size, self.hidden_size)
            if self.recurrence.params:
                shapes[unit_weight] = (len(self.recurrence.params), self.hidden_size)
            for suffix in suffixes:
                named = {f"{name}_l{layer}{suffix}": shape for name, shape in shapes.items()}
                self._all_weights.append(list(named))
                for name, shape in named.items():
                    setattr(self, name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self._flat_weights_names = [name for names in self._all_weights for name in names]

    @property
    def _flat_weights(self) -> list[Tensor]:
        """What RNNBase.check_input looks at."""
        return self._weights()

    def _init_flat_weights(self) -> None:
        """RNNBase's constructor calls this; there is no list to make."""

    def flatten_parameters(self) -> None:
        """Does nothing: the weights never have to lie in one buffer. Here for code that calls torch.nn's."""

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple[Any, Any]:
        """Run the layer over a whole sequence.

        Args:
            input: (T, B, input_size), (B, T, input_size) with batch_first, (T, input_size) unbatched, or a
                PackedSequence.
            hx: initial states, (D * num_layers, B, hidden_size) each, without B for unbatched input; with
                projections h is proj_size wide. A tensor for a recurrence with one state, else a tuple in the
                order of its states. None: the recurrence's initial values (zeros for RNN, LSTM and GRU).

        Returns:
            The h of every step, like input with D * hidden_size features, and the final states, like hx.

        Raises:
            ValueError: input of another rank, or of another dtype than the weights.
            RuntimeError: another feature size, or states of another rank or shape; no time steps.
            TypeError: hx is a tuple where a tensor belongs, or the reverse.
        """
        states = None if hx is None else self._as_tuple(hx)
        if isinstance(input, PackedSequence):
            output, states = self._packed(input, states)
        elif input.dim() == 3:
            if states is not None:
                self._check_rank(states, 3, "batched")
            output, states = self._run(input, states)
        elif input.dim() == 2:
            output, states = self._unbatched(input, states)
        else:
            raise ValueError(
                f"{type(self).__name__}: Expected input to be 2D or 3D, got {input.dim()}D instead"
            )
        return output, states[0] if self._one_state else states

    def _unbatched(self, input: Tensor, states: States | None) -> tuple[Tensor, States]:
        batch_dim = 0 if self.batch_first else 1
        if states is not None:
            self._check_rank(states, 2, "unbatched")
            states = tuple(state.unsqueeze(1) for state in states)
        output, states = self._run(input.unsqueeze(batch_dim), states)
        return output.squeeze(batch_dim), tuple(state.squeeze(1) for state in states)

    def _packed(self, input: PackedSequence, states: States | None) -> tuple[PackedSequence, States]:
        data, batch_sizes, to_sorted, to_given = input
        if states is not None and to_sorted is not None:
            self._check_states(data, states, batch_sizes)
            states = tuple(state.index_select(1, to_sorted) for state in states)
        output, states = self._run(data, states, batch_sizes)
        if to_given is not None:
            states = tuple(state.index_select(1, to_given) for state in states)
        return PackedSequence(output, batch_sizes, to_sorted, to_given), states

    def _run(
        self, input: Tensor, states: States | None, batch_sizes: Tensor | None = None
    ) -> tuple[Tensor, States]:
        weights = self._weights()
        # RNNBase.check_input has the words but takes longer than this test, and a short call is all overhead.
        if input.shape[-1] != self.input_size or input.dtype != weights[0].dtype:
            self.check_input(input, batch_sizes)
        if states is not None:
            self._check_states(input, states, batch_sizes)
        output, states, _ = functional.run(
            self._stack(packed=batch_sizes is not None), input, states, weights, batch_sizes
        )
        return output, states

    def _stack(self, packed: bool = False) -> Stack:
        return Stack(
            self.recurrence,
            self.bias,
            self.num_layers,
            self.dropout if self.training else 0.0,
            self.bidirectional,
            self.batch_first and not packed,
            self.proj_size,
            self.backend,
        )

    def _check_states(self, input: Tensor, states: States, batch_sizes: Tensor | None) -> None:
        expected = self.get_expected_hidden_size(input, batch_sizes)
        for index, state in enumerate(states):
            which = "" if self._one_state else f"[{index}]"
            self.check_hidden_size(state, expected, f"Expected hidden{which} size {{}}, got {{}}")
            expected = (*expected[:2], self.hidden_size)  # a projection narrows the first state only


def refuse_projection(proj_size: int | None) -> None:
    """RNN and GRU take the argument only to refuse it, as torch.nn's do."""
    if proj_size is not None:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")


def elman_activation(nonlinearity: str, activation: str | Activation | None) -> str | Activation:
    """RNN's activation from torch.nn's argument and ours; both, or a bad nonlinearity, is a ValueError."""
    if nonlinearity not in ("tanh", "relu"):
        known = "Select from 'tanh' or 'relu'. Others are given as activation."
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. {known}")
    if activation is not None and nonlinearity != "tanh":
        raise ValueError(f"give nonlinearity='{nonlinearity}' or activation, not both")
    return nonlinearity if activation is None else activation
