# SPDX-License-Identifier: Apache-2.0
"""Keras's Bidirectional, with both directions in one loop wherever they are alike."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import keras
from torch import Tensor

from gpu_rnn.keras.layers import TimeLoop, check_steps, forget_masks, last_valid, mask_of, run, step_mask
from gpu_rnn.keras.misspelt import Advising

MERGES = {
    "sum": keras.ops.add,
    "mul": keras.ops.multiply,
    "ave": lambda y, backward: (y + backward) / 2,
    "concat": lambda y, backward: keras.ops.concatenate([y, backward], axis=-1),
    None: lambda y, backward: (y, backward),
}


@keras.saving.register_keras_serializable(package="gpu_rnn")
class Bidirectional(Advising, keras.layers.Bidirectional):
    """A layer forwards and one backwards in time, with the constructor, weights and files of
    `keras.layers.Bidirectional`.

    Layers of this module that are alike run in one loop; what the two do not share, stateful layers and dropout of the
    inputs in training make it two.

    Args:
        layer, merge_mode, weights, backward_layer: as Keras documents them.

    Example::

        >>> import gpu_rnn.keras, keras, numpy as np
        >>> layer = gpu_rnn.keras.Bidirectional(gpu_rnn.keras.GRU(4, return_sequences=True), merge_mode="sum")
        >>> tuple(layer(np.ones((2, 5, 3), "float32")).shape)
        (2, 5, 4)
    """

    __signature__ = inspect.signature(keras.layers.Bidirectional)

    def __init__(self, layer: Any, *args: Any, **options: Any) -> None:
        super().__init__(layer, *args, **options)
        other = self.__signature__.bind(layer, *args, **options).arguments.get("backward_layer") or layer
        for own, given in ((self.forward_layer, layer), (self.backward_layer, other)):
            if isinstance(given, TimeLoop):
                own.save = given.save  # which the configuration that Keras copies lacks

    def call(
        self,
        sequences: Tensor,
        initial_state: Sequence[Tensor] | None = None,
        mask: Any = None,
        training: bool | None = None,
    ) -> Any:
        layers = self.forward_layer, self.backward_layer
        mask = mask_of(sequences, mask)
        if not all(isinstance(layer, TimeLoop) for layer in layers):
            return super().call(sequences, initial_state=initial_state, mask=mask, training=training)
        initial = self._halves(initial_state)
        together = self._one_loop() and not (training and any(layer.cell.dropout for layer in layers))
        run_both = self._together if together else self._apart
        try:
            y, backward, states = run_both(sequences, initial, mask, bool(training))
        finally:
            for layer in layers:
                forget_masks(layer)
        output = MERGES[self.merge_mode](*(keras.ops.cast(part, self.compute_dtype) for part in (y, backward)))
        if not self.return_state:
            return output
        return (*output, *states) if self.merge_mode is None else (output, *states)

    @property
    def save(self) -> str:
        """What the forward layer saves for its backward pass; what is set is both layers'."""
        return self.forward_layer.save

    @save.setter
    def save(self, save: str) -> None:
        self.forward_layer.save = self.backward_layer.save = save

    def _halves(self, initial_state: Any) -> tuple[Any, Any]:
        """The states of each direction."""
        if initial_state is None:
            return None, None
        forward, backward = (len(layer.state_size) for layer in (self.forward_layer, self.backward_layer))
        actual = len(initial_state) if isinstance(initial_state, (list, tuple)) else "no list"
        if actual != forward + backward:
            raise ValueError(
                f"initial_state of {self.name} is a list of {forward + backward} states, the forward layer's and then "
                f"the backward layer's; got {actual}"
            )
        return initial_state[:forward], initial_state[forward:]

    def _one_loop(self) -> bool:
        """Whether the layers are so alike that one loop can run both."""
        forward, backward = self.forward_layer, self.backward_layer
        same = ("kind", "units", "use_bias", "cudnn", "compute_dtype", "recurrence", "save")
        return (
            all(getattr(forward, name) == getattr(backward, name) for name in same)
            and bool(forward.cell.recurrent_dropout) == bool(backward.cell.recurrent_dropout)
            and {forward.cell.compute_dtype, backward.cell.compute_dtype, forward.compute_dtype} == {self.compute_dtype}
            and not (forward.go_backwards or forward.stateful)
            # A layer adds its activity's loss when it is called, and here it is not.
            and forward.activity_regularizer is backward.activity_regularizer is None
        )

    def _together(
        self, sequences: Tensor, initial: Sequence[Any], mask: Any, training: bool
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        layers = self.forward_layer, self.backward_layer
        check_steps(sequences)
        mask = step_mask(mask, sequences)
        states = [
            [keras.ops.convert_to_tensor(state, self.compute_dtype) for state in layer_states]
            if (layer_states := initial[place]) is not None
            else layer.get_initial_state(sequences.shape[0])
            for place, layer in enumerate(layers)
        ]
        for layer, layer_states in zip(layers, states, strict=True):  # as a layer's call does, in training or not
            layer.cell.get_dropout_mask(sequences[:, 0])
            layer.cell.get_recurrent_dropout_mask(layer_states[0])
        y, final = run(layers, sequences, states, mask, training)
        forward, backward = y.chunk(2, -1)  # in the order of time, 0 at masked steps
        if not self.return_sequences:
            forward, backward = (h if mask is None else last_valid(h, mask) for h in final[0].unbind())
        return forward, backward, [state[place] for place in range(2) for state in final]

    def _apart(
        self, sequences: Tensor, initial: Sequence[Any], mask: Any, training: bool
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        outputs: list[Tensor] = []
        states: list[Tensor] = []
        for layer, layer_states in zip((self.forward_layer, self.backward_layer), initial, strict=True):
            result = layer(sequences, initial_state=layer_states, mask=mask, training=training)
            output, *final = result if self.return_state else (result,)
            outputs.append(output)
            states += final
        y, backward = outputs
        return y, keras.ops.flip(backward, axis=1) if self.return_sequences else backward, states

    def compute_mask(self, inputs: Any, mask: Any) -> Any:
        """The mask of each output, None for states."""
        mask = keras.tree.flatten(mask)[0] if self.return_sequences else None
        if mask is not None and self.forward_layer.go_backwards:  # in the order of the outputs
            mask = keras.ops.flip(mask, axis=1)
        outputs = (mask,) if self.merge_mode else (mask, mask)
        if self.return_state:
            outputs += (None,) * 2 * len(self.forward_layer.state_size)
        return outputs if len(outputs) > 1 else outputs[0]
