# SPDX-License-Identifier: Apache-2.0
"""Keras's recurrent layers with another loop over time: `TimeLoop.inner_loop`, the method that their `call` leaves for
it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import keras
import torch
from keras.src.backend import AutocastScope  # in which a layer's variables have its compute dtype
from torch import Tensor

from gpu_rnn import functional, interop
from gpu_rnn.call import arguments
from gpu_rnn.keras import recurrences
from gpu_rnn.keras.misspelt import Advising
from gpu_rnn.once import once
from gpu_rnn.recurrence import Recurrence


class TimeLoop(Advising):
    """What makes a Keras layer run here, and, being a mixin, everything else stay Keras's."""

    _save = "gates"

    # Keras's layer, of which this is a part, has the following.
    cell: Any
    variable_dtype: str
    states: list[Any]
    return_sequences: bool
    go_backwards: bool
    zero_output_for_mask: bool

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.recurrence: Recurrence = recurrences.of(self.cell)
        self.check_cudnn(masked=False)

    @property
    def save(self) -> str:
        """What is saved for the backward pass: "gates" of every step, or the "states" alone, from which the gates are
        made again. May be set; no value depends on it, so neither configurations nor files have it."""
        return self._save

    @save.setter
    def save(self, save: str) -> None:
        arguments.rebuilds(save)
        self._save = save

    @once
    def loops_only(self) -> Recurrence:
        """The recurrence for use_cudnn=False."""
        return recurrences.without_aten(self.recurrence)

    @property
    def kind(self) -> str:
        """The cell's name in `gpu_rnn.interop`."""
        return self.recurrence.name

    @property
    def cudnn(self) -> bool | str:
        """use_cudnn, which a SimpleRNN does not have."""
        return getattr(self, "use_cudnn", "auto")

    def call(self, sequences: Tensor, initial_state: Any = None, mask: Any = None, training: bool = False) -> Any:
        check_steps(sequences)
        try:
            return super().call(
                sequences, initial_state=initial_state, mask=mask_of(sequences, mask), training=training
            )
        finally:  # after an error, too: the next call may have another shape
            forget_masks(self)

    def compute_mask(self, inputs: Any, mask: Any) -> Any:
        """The mask of each output, None for states: in the order of the outputs, which is that of processing."""
        mask = keras.tree.flatten(mask)[0]
        if mask is not None and self.go_backwards:
            mask = keras.ops.flip(mask, axis=1)
        return super().compute_mask(inputs, mask)  # type: ignore[misc]

    def _create_state_variables(self, batch_size: int) -> None:
        """Keras's name for it. What is assigned to a variable that mixed precision casts goes into the cast copy."""
        super()._create_state_variables(batch_size)  # type: ignore[misc]
        options = {"dtype": self.variable_dtype, "trainable": False, "autocast": False, "name": "rnn_state"}
        self.states[:] = [keras.Variable(state, **options) for state in self.states]  # in the list that is not tracked

    def inner_loop(
        self, sequences: Tensor, initial_state: Sequence[Tensor], mask: Any, training: bool = False
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """All time steps.

        Args:
            sequences: (B, T, F).
            initial_state: for each state a tensor (B, units), or (1, units) for all samples.
            mask: (B, T), (1, T), the same with a last axis of 1, or a list of one of these, or None. True: the step
                counts.

        Returns:
            The last output (B, units), the outputs (B, T, units) in the order of processing, the final states.

        Raises:
            ValueError: another shape, or use_cudnn=True, and cuDNN cannot run this call.
        """
        mask = step_mask(mask, sequences)
        if self.go_backwards:
            sequences, mask = sequences.flip(1), None if mask is None else mask.flip(1)
        y, final = run([self], sequences, [initial_state], mask, bool(training))
        states = [state[0] for state in final]
        # zero_output_for_mask is about sequences: the last output is the last valid step's.
        last = states[0] if mask is None else last_valid(states[0], mask)
        return last, self._outputs(y, mask), states

    def _outputs(self, y: Tensor, mask: Tensor | None) -> Tensor:
        """From outputs that are 0 at masked steps those that Keras gives: the last valid step's, before it 0."""
        if mask is None or self.zero_output_for_mask or not self.return_sequences:
            return y
        return y.gather(1, last_valid_steps(mask)[..., None].expand_as(y))

    def check_cudnn(self, masked: bool) -> None:
        """Raises ValueError where use_cudnn=True cannot be had."""
        if self.cudnn is not True:
            return
        lacking = recurrences.unknown_to_aten(self.cell)
        lacking += ["recurrent_dropout"] * bool(self.cell.recurrent_dropout) + ["mask"] * masked
        if lacking:
            raise ValueError(
                f"use_cudnn=True, and cuDNN has no {', no '.join(lacking)}. Use use_cudnn='auto', which runs this "
                "elsewhere."
            )


class LSTM(TimeLoop, keras.layers.LSTM):
    """Long short-term memory with the constructor, weights and files of `keras.layers.LSTM`.

    c' = σ(f)⊙c + σ(i)⊙φ(g), h' = σ(o)⊙φ(c'), with i, f, g, o = x·kernel + h·recurrent_kernel + bias.

    Args:
        all: as Keras documents them. use_cudnn=False keeps cuDNN (on a CPU oneDNN) out; use_cudnn=True asks for it.

    Inputs: sequences (B, T, F), initial_state a list of two (B, units), mask (B, T) bool, training.

    Returns:
        (B, units), or (B, T, units) with return_sequences; with return_state a tuple of that and the final h and c.

    Raises:
        ValueError: use_cudnn=True with options that cuDNN lacks, or an activation that mixes units.

    Example::

        >>> import gpu_rnn.keras, keras, numpy as np
        >>> layer = gpu_rnn.keras.LSTM(4, recurrent_dropout=0.5, return_sequences=True)
        >>> tuple(layer(np.ones((2, 5, 3), "float32")).shape)
        (2, 5, 4)
    """

    __signature__ = inspect.signature(keras.layers.LSTM)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"use_cudnn": self.use_cudnn, "implementation": self.cell.implementation}


class GRU(TimeLoop, keras.layers.GRU):
    """Gated recurrent unit with the constructor, weights and files of `keras.layers.GRU`.

    h' = (1 − z)⊙n + z⊙h with z, r = σ(x·kernel + h·recurrent_kernel + bias) and, with reset_after=True,
    n = φ(x·kernel_n + bias_n + r⊙(h·recurrent_kernel_n + recurrent_bias_n)), otherwise
    n = φ(x·kernel_n + bias_n + (r⊙h)·recurrent_kernel_n).

    Args, inputs, returns and raises: as for `LSTM`, with one state.

    Example::

        >>> import gpu_rnn.keras, keras, numpy as np
        >>> layer = gpu_rnn.keras.GRU(4, reset_after=False, return_state=True)
        >>> [tuple(part.shape) for part in layer(np.ones((2, 5, 3), "float32"))]
        [(2, 4), (2, 4)]
    """

    __signature__ = inspect.signature(keras.layers.GRU)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"use_cudnn": self.use_cudnn, "implementation": self.cell.implementation}


class SimpleRNN(TimeLoop, keras.layers.SimpleRNN):
    """Elman's network, h' = φ(x·kernel + bias + h·recurrent_kernel), as `keras.layers.SimpleRNN` but for two things.

    Keras's takes activity_regularizer and drops it, and leaves seed out of its configuration; this one keeps both.

    Args, inputs, returns and raises: as for `LSTM`, with one state and without use_cudnn.

    Example::

        >>> import gpu_rnn.keras, keras, numpy as np
        >>> tuple(gpu_rnn.keras.SimpleRNN(4, activation="relu")(np.ones((2, 5, 3), "float32")).shape)
        (2, 4)
    """

    __signature__ = inspect.signature(keras.layers.SimpleRNN)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        arguments = self.__signature__.bind(*args, **options).arguments
        self.activity_regularizer = keras.regularizers.get(arguments.get("activity_regularizer"))

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"seed": self.cell.seed}


def run(
    layers: Sequence[Any], x: Tensor, initial: Sequence[Sequence[Tensor]], mask: Tensor | None, training: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A layer, or a forward and a backward layer of the same kind and size, in one loop.

    Args:
        layers: one layer or two.
        x: (B, T, F).
        initial: for each layer its states, (B, units) or (1, units) each.
        mask: (B, T) bool or None.

    Returns:
        The outputs (B, T, D·units) in the order of time, 0 at masked steps, and the final states (D, B, units).

    Raises:
        ValueError: features or states of another shape than the layers', or use_cudnn=True and cuDNN cannot run this
            call.
        NotImplementedError: a call that an ONNX file is made of, and that has no node there.
    """
    first = layers[0]
    for layer in layers:
        layer.check_cudnn(masked=mask is not None)
        check_features(layer, x)
    initial = [states_of(layer, states, x.shape[0]) for layer, states in zip(layers, initial, strict=True)]
    weights = [weight for layer in layers for weight in weights_of(layer)]
    dtype = weights[0].dtype
    x = x.to(dtype)
    if training and first.cell.dropout:
        x, weights[0] = drop_inputs(x, weights[0], gatewise(first, first.cell.get_dropout_mask(x[:, 0])))
    drop = None
    if training and first.cell.recurrent_dropout:
        masks = [
            layer.cell.get_recurrent_dropout_mask(states[0]) for layer, states in zip(layers, initial, strict=True)
        ]
        drop = torch.stack([torch.stack(gatewise(layer, m), 1) for layer, m in zip(layers, masks, strict=True)])
        drop = drop.to(dtype).expand(
            -1, x.shape[0], -1, -1
        )  # Keras draws one for all samples where a state is one for all
    recurrence, backend = what_runs(first, masked=mask is not None, dropped=drop is not None)
    y, final, *_ = functional.rnn(
        x,
        tuple(torch.stack(each) for each in zip(*initial, strict=True)),  # a copy: stateful layers write theirs
        weights,
        recurrence,
        bias=first.cell.use_bias,
        bidirectional=len(layers) == 2,
        batch_first=True,
        backend=backend,
        mask=mask,
        recurrent_mask=drop,
        save=first.save,
    )
    return y, final


def what_runs(layer: Any, masked: bool, dropped: bool) -> tuple[Recurrence, str]:
    """A layer's recurrence and backend: ATen's, whatever use_cudnn says, where the ONNX exporter of old traces, which
    writes ATen's call as a node."""
    if not (torch.jit.is_tracing() and torch.onnx.is_in_onnx_export()):
        return layer.recurrence if layer.cudnn else layer.loops_only, "aten" if layer.cudnn is True else "auto"
    other = layer.recurrence.aten is None
    reasons = {
        "activations other than Keras's defaults, or reset_after=False": other,
        "a mask": masked,
        "dropout": dropped,
    }
    lacking = [reason for reason, used in reasons.items() if used]
    if lacking:
        raise NotImplementedError(
            f"the exporter of old, which Keras asks where a size is None, cannot write what {layer.name} uses: "
            f"{', '.join(lacking)}. `import gpu_rnn.onnx`, and either give all sizes, as with "
            'model.export(path, format="onnx", input_signature=[keras.InputSpec((1, 20, 8))]), or keep them open with '
            "torch.onnx.export(model.eval(), (x,), path, dynamic_shapes=(({0: Dim('batch'), 1: Dim('steps')},),)), "
            "where Dim is torch.export.Dim"
        )
    return layer.recurrence, "aten"


def forget_masks(layer: Any) -> None:
    """Lets the next call draw its own dropout masks."""
    layer.cell.reset_dropout_mask()
    layer.cell.reset_recurrent_dropout_mask()


def weights_of(layer: Any) -> list[Tensor]:
    """A layer's weights as functional.rnn takes them, in the compute dtype of its cell, whose policy may be its own."""
    cell = layer.cell
    scope = nullcontext() if cell.compute_dtype == layer.compute_dtype else AutocastScope(cell.compute_dtype)
    with scope:
        weights = (cell.kernel, cell.recurrent_kernel, *((cell.bias,) if cell.use_bias else ()))
        # On the meta device, where Keras infers shapes, its variables are not cast.
        kernel, recurrent_kernel, *biases = (keras.ops.convert_to_tensor(w, cell.compute_dtype) for w in weights)
    bias = biases[0] if biases else None
    direction = interop.direction_of_keras(kernel, recurrent_kernel, bias, layer.kind)
    return [direction.weight_ih, direction.weight_hh, *(() if direction.bias is None else direction.bias)]


def gatewise(layer: Any, masks: Tensor | list[Tensor]) -> list[Tensor]:
    """Keras's dropout masks, (B, features) each: one for all gates, or one for each in the order of torch's gates."""
    if isinstance(masks, Tensor):
        return [masks]
    orders = interop.ORDERS[layer.kind]
    named = dict(zip(orders["keras"], masks, strict=True))
    return [named[gate] for gate in orders["torch"]]


def drop_inputs(x: Tensor, w_ih: Tensor, masks: list[Tensor]) -> tuple[Tensor, Tensor]:
    """x and w_ih whose product is that of the dropped inputs, each gate with its own mask if there are several."""
    dropped = torch.cat([x * mask[:, None].to(x.dtype) for mask in masks], -1)
    return dropped, w_ih if len(masks) == 1 else torch.block_diag(*w_ih.chunk(len(masks)))


def check_steps(sequences: Any) -> None:
    """Raises ValueError where there is nothing to run; Keras would look for a first step."""
    if len(sequences.shape) > 1 and sequences.shape[1] == 0:
        raise ValueError(f"sequences have at least one step, got shape {tuple(sequences.shape)}")


def check_features(layer: Any, x: Tensor) -> None:
    features = layer.cell.kernel.shape[0]
    if x.shape[-1] != features:
        raise ValueError(
            f"{layer.name} was built for inputs (B, T, {features}), got {tuple(x.shape)}: expected {features} "
            f"features, got {x.shape[-1]}"
        )


def states_of(layer: Any, states: Sequence[Tensor], batch: int) -> list[Tensor]:
    """A layer's initial states as (B, units)."""
    units = layer.cell.units
    shapes = [tuple(state.shape) for state in states]
    # Compared, not hashed: sizes are symbols under torch.export, and tensors under torch.jit.trace.
    if len(states) != len(layer.state_size) or not all(shape in ((batch, units), (1, units)) for shape in shapes):
        raise ValueError(
            f"initial_state of {layer.name} is {len(layer.state_size)} of shape (B, units) = ({batch}, {units}), or "
            f"(1, {units}) for all samples; got {len(states)}: {', '.join(map(str, shapes)) or 'none'}"
        )
    return [state.expand(batch, -1) for state in states]


def mask_of(sequences: Any, mask: Any) -> Any:
    """The mask given, or the one that the sequences carry, which Keras forgets where initial_state is given, too."""
    return getattr(sequences, "_keras_mask", None) if mask is None else mask


def step_mask(mask: Any, sequences: Tensor) -> Tensor | None:
    """The mask of the sequences (B, T, F) as bool (B, T); Keras may pass one for each input."""
    if isinstance(mask, (list, tuple)):
        mask = mask[0]
    if mask is None:
        return None
    counts = keras.ops.convert_to_tensor(mask).bool()
    batch, steps = sequences.shape[:2]
    flat = counts.squeeze(-1) if counts.dim() == 3 else counts
    if tuple(flat.shape) not in ((batch, steps), (1, steps)):
        raise ValueError(
            f"a mask has shape (B, T) = ({batch}, {steps}), or (1, {steps}) for all samples, and may have a last "
            f"axis of 1; got {tuple(counts.shape)}"
        )
    return flat.expand(batch, -1)


def last_valid(h: Tensor, mask: Tensor) -> Tensor:
    """The output after the last step: the final h, but 0 (not the initial h) in a row whose every step is masked."""
    return torch.where(mask.any(1, keepdim=True), h, 0)


def last_valid_steps(mask: Tensor) -> Tensor:
    """(B, T): of each step the last valid one until then; before the first, a masked one. By operations that ONNX
    has."""
    steps = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    number = mask.cumsum(1)  # of valid steps until then: 0 before the first
    places = torch.zeros_like(number[:, :1]).repeat(1, mask.shape[1] + 1)  # of the valid step with each number
    return places.scatter(1, torch.where(mask, number, 0), steps).gather(1, number)


for _layer in (LSTM, GRU, SimpleRNN):
    keras.saving.register_keras_serializable(package="gpu_rnn")(_layer)
