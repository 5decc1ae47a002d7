# SPDX-License-Identifier: Apache-2.0
"""What layers and cells have in common: a recurrence, its options, the form of its states, and torch.nn's own words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from gpu_rnn.activations import Activation, name_of
from gpu_rnn.call import arguments
from gpu_rnn.call.stack import Stack, States
from gpu_rnn.compiler.operations import REAL_ONLY
from gpu_rnn.dispatch import choice
from gpu_rnn.layers import options as layer_options
from gpu_rnn.recurrence import Recurrence

Option = str | bool | float | Activation

GO_BY = layer_options.ASSIGNED | {
    *layer_options.SIZES,
    "recurrence",
    "training",
    "batch_first",
}  # what a stack is made of
OPTION_DEFAULTS: dict[str, Any] = layer_options.OF_THE_RECURRENCE | {"backend": "auto", "heads": 1}


class RecurrenceHolder(nn.Module):
    """What layers and cells have in common: a recurrence, its options in repr, and the form of its states."""

    recurrence: Recurrence
    backend: str
    _flat_weights_names: list[str]
    _weight_shapes: list[tuple[int, ...]] | None = None  # the weights' shapes when they were last found right
    _keeps_stacks = True

    def _hold(self, recurrence: Recurrence, backend: str, options: Mapping[str, Option | None]) -> None:
        """Options that are None were not given."""
        choice.check_name(backend)
        for name, value in options.items():
            if isinstance(OPTION_DEFAULTS[name], bool):
                arguments.flag(name, value)
        self.recurrence = recurrence
        self.backend = backend
        self._one_state = len(recurrence.states) == 1
        shown = {
            name: value
            for name, value in {**options, "backend": backend}.items()
            if value is not None and value != OPTION_DEFAULTS[name]
        }
        # Names, never the user's functions: those may not pickle.
        self._shown = {name: name_of(value) if callable(value) else value for name, value in shown.items()}

    def _check_complex(self, dtype: torch.dtype | None) -> None:
        """Raises TypeError if weights would be complex, and the recurrence takes real numbers only."""
        if dtype is None or not dtype.is_complex:
            return
        ops = [op for stage in self.recurrence.program.stages for op in stage.ops if op.name in REAL_ONLY]
        if ops:
            line = f" ({ops[0].line})" if ops[0].line else ""
            raise TypeError(
                f"{type(self).__name__}: dtype={dtype} does not go with {self.recurrence.name}'s {ops[0].name}{line}, "
                "which complex numbers have not: take a real dtype, or an activation such as tanh, sigmoid or softsign"
            )

    def __setattr__(self, name: str, value: Any) -> None:
        """What steers a call is checked when it is set. A subclass may have attributes of its own by any name."""
        if name in layer_options.ASSIGNED and "recurrence" in self.__dict__:
            is_ours = type(self).__module__.startswith("gpu_rnn.")
            if is_ours and (name != "nonlinearity" or name in self.__dict__):
                value = layer_options.assigned(name, value)
        elif isinstance(value, Tensor) and name in self.__dict__.get("_flat_weights_names", ()):
            arguments.tensor(f"{type(self).__name__}: {name}", value)
            arguments.floating(f"{type(self).__name__}: {name}", value)
        elif name in layer_options.SIZES:
            self.__dict__["_weight_shapes"] = None  # the weights' shapes are looked at again
        nn.Module.__setattr__(self, name, value)
        self.__dict__.pop("_stacks", None)  # afterwards: a call of another thread may have made one of the old value

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles hold: no stack, which is made again."""
        return {name: value for name, value in self.__dict__.items() if name != "_stacks"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)
        self.__dict__.pop("_stacks", None)

    def __init_subclass__(cls, **options: Any) -> None:
        """A subclass may compute what a call goes by: then it is asked for at each."""
        super().__init_subclass__(**options)
        is_ours = cls.__module__.startswith("gpu_rnn.")
        if not is_ours and any(isinstance(vars(cls).get(name), property) for name in GO_BY):
            cls._keeps_stacks = False

    def _stack(self, packed: bool = False, all_states: bool = False) -> Stack:
        """What does not change between calls, made anew after an attribute was set."""
        # Dynamo would take what is kept here for a change of the module.
        if torch.compiler.is_compiling() or not self._keeps_stacks:
            return self._new_stack(packed, all_states)
        stacks = self.__dict__.get("_stacks")
        if stacks is None:
            stacks = self.__dict__["_stacks"] = {}
        if (packed, all_states) not in stacks:
            stacks[packed, all_states] = self._new_stack(packed, all_states)
        stack: Stack = stacks[packed, all_states]
        return stack

    def _new_stack(self, packed: bool, all_states: bool) -> Stack:
        raise NotImplementedError

    def _weights(self) -> Sequence[Tensor]:
        """In the order of `functional.rnn`. Whatever took a parameter's place has its shape: kernels do not look.

        Raises:
            RuntimeError: it has another.
            TypeError: it is no tensor.
        """
        parameters: dict[str, Any] = self._parameters
        try:
            weights = [parameters[name] for name in self._flat_weights_names]
            if [weight.shape for weight in weights] == self._weight_shapes:
                return weights
        except (
            KeyError,
            AttributeError,
        ):  # something stands in for one. An attribute of a Module takes 0.7 µs to read.
            weights = [getattr(self, name) for name in self._flat_weights_names]
        self._check_weights(weights)
        return weights

    def _check_weights(self, weights: Sequence[Any]) -> None:
        if [getattr(weight, "shape", None) for weight in weights] == self._weight_shapes:
            return
        expected = self._expected_shapes()
        if len(weights) != len(expected):
            raise RuntimeError(
                f"{type(self).__name__} has {len(weights)} weights, and {len(expected)} for what its attributes are "
                "set to now: "
                "make another layer with other num_layers, bias, bidirectional or proj_size"
            )
        for name, weight, shape in zip(self._flat_weights_names, weights, expected, strict=True):
            if not isinstance(weight, Tensor):
                raise TypeError(
                    f"{type(self).__name__}: {name} should be a Tensor {shape}, got {type(weight).__name__}"
                )
            if weight.shape != shape:
                raise RuntimeError(f"{type(self).__name__}: {name} should be {shape}, got {tuple(weight.shape)}")
        self._weight_shapes = expected

    def _expected_shapes(self) -> list[tuple[int, ...]]:
        """Of each weight, by the sizes that the module has now."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return super().extra_repr() + "".join(f", {name}={value}" for name, value in self._shown.items())

    def __prepare_scriptable__(self) -> NoReturn:
        name = type(self).__name__
        raise RuntimeError(f"torch.jit.script cannot compile gpu_rnn.{name}: export the model with torch.export.export")

    def _as_tuple(self, hx: Tensor | Sequence[Tensor], argument: str = "hx") -> States:
        names = self.recurrence.states
        wanted = "a Tensor" if self._one_state else f"a tuple of {len(names)} Tensors ({', '.join(names)})"
        if not isinstance(hx, Tensor if self._one_state else (tuple, list)):
            raise TypeError(f"{type(self).__name__}: {argument} should be {wanted}, got {type(hx).__name__}")
        states = (hx,) if self._one_state else tuple(hx)
        if len(states) != len(names):
            raise RuntimeError(f"{type(self).__name__}: {argument} should be {wanted}, got {len(states)}")
        for name, state in zip(names, states, strict=True):
            if not isinstance(state, Tensor):
                raise TypeError(
                    f"{type(self).__name__}: {argument} should be {wanted}, got {type(state).__name__} for {name}"
                )
        return states

    def _check_rank(self, states: States, rank: int, kind: str) -> None:
        if [state.dim() for state in states] == [rank] * len(states):
            return
        names = " and ".join("hx" if name == "h" else f"{name}x" for name in self.recurrence.states)
        ranks = ", ".join(f"{state.dim()}-D" for state in states)
        got = f"{ranks} tensor" if self._one_state else f"({ranks}) tensors"
        raise RuntimeError(f"For {kind} {rank}-D input, {names} should also be {rank}-D but got {got}")


def refuse_projection(proj_size: int | None) -> None:
    """RNN and GRU take the argument only to refuse it, as torch.nn's do."""
    if proj_size is not None:
        raise ValueError(arguments.PROJECTED)


def elman_activation(nonlinearity: str, activation: str | Activation | None) -> str | Activation:
    """RNN's activation from torch.nn's argument and ours; both, or a bad nonlinearity, is a ValueError."""
    if nonlinearity not in ("tanh", "relu"):
        known = "Select from 'tanh' or 'relu'. Others are given as activation."
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. {known}")
    if activation is not None and nonlinearity != "tanh":
        raise ValueError(f"give nonlinearity='{nonlinearity}' or activation, not both")
    return nonlinearity if activation is None else activation
