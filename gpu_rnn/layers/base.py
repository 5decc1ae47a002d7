# SPDX-License-Identifier: Apache-2.0
"""What all layers share: weights under torch.nn's names, checks in its words, the way to `functional.rnn`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Never

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.utils.rnn import PackedSequence

from gpu_rnn import initializers
from gpu_rnn.call import arguments, onlookers, run
from gpu_rnn.call.controls import NONE, StackControls
from gpu_rnn.call.stack import Stack
from gpu_rnn.layers import jagged
from gpu_rnn.layers import options as layer_options
from gpu_rnn.layers.module import Option, RecurrenceHolder, States
from gpu_rnn.layers.regularization import Regularized
from gpu_rnn.recurrence import Recurrence
from gpu_rnn.spelling import unexpected


class LayerBase(Regularized, nn.RNNBase):
    """The whole of a layer but for its constructor's signature."""

    return_sequences: bool
    save: str
    kernel_initializer: str | initializers.Initializer | None
    recurrent_initializer: str | initializers.Initializer | None
    bias_initializer: str | initializers.Initializer | None
    unit_forget_bias: bool
    _heads, _rms_norm, save = 1, False, "gates"  # of a layer that was pickled before there were any

    # RNNBase keeps a second list of its weights for cuDNN's one flat buffer. Here they are read at each call,
    # so that whatever stands in for one (a parametrization, functional_call, pruning) is seen.
    __setstate__ = RecurrenceHolder.__setstate__
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
        options: Mapping[str, Option | None],
        further: Mapping[str, Any],
        unit_weight: str = "weight_unit",
    ) -> None:
        # RNNBase checks and keeps the arguments. Its parameters have the gates of its own modes, so they are
        # made on "meta", where they cost nothing, and replaced.
        flags = bias, batch_first, dropout, bidirectional
        super().__init__("RNN_TANH", input_size, hidden_size, num_layers, *flags, proj_size, "meta", dtype)
        arguments.flag("bidirectional", bidirectional)  # torch.nn's refuse it when they are called
        self.mode = mode
        self._hold(recurrence, backend, options)
        others = (*options, "backend")
        self._take(layer_options.checked(further, type(self).__name__, others, recurrence, hidden_size, proj_size))
        self._check_complex(dtype)
        self._make_parameters(unit_weight, device, dtype)
        self.reset_parameters()

    def _take(self, options: dict[str, Any]) -> None:
        """Keeps the options of `LayerOptions` as attributes."""
        self._layer_norm = options.pop("layer_norm")
        self._rms_norm = options.pop("rms_norm")
        self._heads = options.pop("heads")
        for name, value in options.items():
            setattr(self, name, value)

    @property
    def layer_norm(self) -> bool:
        """Whether products are layer-normalised; the parameters are made for it."""
        return self._layer_norm

    @property
    def rms_norm(self) -> bool:
        """Whether products are normalised by their root mean square; the parameters are made for it."""
        return self._rms_norm

    @property
    def heads(self) -> int:
        """Blocks on the diagonal of W_hh; the parameters are made for it."""
        return self._heads

    def extra_repr(self) -> str:
        plain = layer_options.defaults(self.recurrence)
        changed = {name: getattr(self, name) for name in plain if getattr(self, name) != plain[name]}
        return super().extra_repr() + "".join(f", {name}={getattr(v, '__name__', v)}" for name, v in changed.items())

    def _check_complex(self, dtype: torch.dtype | None) -> None:
        super()._check_complex(dtype)
        if (self.layer_norm or self.rms_norm) and dtype is not None and dtype.is_complex:
            kind = "RMS" if self.rms_norm else "layer"
            raise TypeError(f"{type(self).__name__}: {kind} normalisation takes real numbers, not dtype={dtype}")

    def _make_parameters(self, unit_weight: str, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        names = ["weight_ih", "weight_hh"]
        names += ["bias_ih", "bias_hh"] if self.bias else []
        names += ["weight_hr"] if self.proj_size else []
        names += [unit_weight] if self.recurrence.params else []
        names += ["norm_ih", "norm_hh"] if self.layer_norm or self.rms_norm else []
        directions = ("", "_reverse") if self.bidirectional else ("",)
        suffixes = [f"_l{layer}{direction}" for layer in range(self.num_layers) for direction in directions]
        self._all_weights = [[name + suffix for name in names] for suffix in suffixes]
        self._flat_weights_names = [name for names in self._all_weights for name in names]
        self._weight_shapes = self._expected_shapes()
        self._parameters.clear()
        for name, shape in zip(self._flat_weights_names, self._weight_shapes, strict=True):
            setattr(self, name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))

    def _expected_shapes(self) -> list[tuple[int, ...]]:
        return self._stack().weight_shapes(self.input_size, self.hidden_size)

    @property
    def _flat_weights(self) -> Sequence[Tensor]:
        """What RNNBase.check_input looks at."""
        return self._weights()

    @_flat_weights.setter
    def _flat_weights(self, weights: Sequence[Tensor | None]) -> None:
        """Code for torch.nn puts the layer's own tensors here again; others would never be read."""
        for name, weight in zip(self._flat_weights_names, weights, strict=True):
            if weight is not getattr(self, name):
                raise AttributeError(
                    f"weights are read by name at each call: set {name} of this layer, not _flat_weights"
                )

    def reset_parameters(self) -> None:
        """Uniform in ±1/sqrt(H) as torch.nn, blocks of W_hh in ±1/sqrt(H/k), but for what an initializer is given for;
        scales of norms are 1."""
        super().reset_parameters()
        if next(self.parameters()).is_meta:  # without values, such as those RNNBase's constructor makes
            return
        initializers.uniform_blocks(self.named_parameters(), self.heads)
        initializers.apply(
            self.named_parameters(),
            self.recurrence,
            kernel=self.kernel_initializer,
            recurrent=self.recurrent_initializer,
            bias=self.bias_initializer,
            unit_forget_bias=self.unit_forget_bias,
            heads=self.heads,
        )
        for name, parameter in self.named_parameters():
            if name.startswith("norm_"):
                nn.init.ones_(parameter)

    def _init_flat_weights(self) -> None:
        """RNNBase's constructor calls this; there is no list to make."""

    def flatten_parameters(self) -> None:
        """Does nothing: the weights never have to lie in one buffer. Here for code that calls torch.nn's."""

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *further: Any,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        reset_state: Any = None,
        return_all_states: bool = False,
        time_parallel: float | None = None,
        **unknown: Never,
    ) -> tuple[Any, ...]:
        """Run the layer over a whole sequence.

        Args:
            input: (T, B, input_size), (B, T, input_size) with batch_first, (T, input_size) unbatched, a
                PackedSequence, or a jagged nested tensor (B, j, input_size), whatever batch_first is, whose output
                is jagged alike.
            hx: initial states, (D * num_layers, B, hidden_size) each, without B for unbatched input; with
                projections h is proj_size wide. A tensor for a recurrence with one state, else a tuple in the
                order of its states. None: the recurrence's initial values (zeros for RNN, LSTM and GRU).
            further, unknown: nothing; what follows is given by one of these names.
            mask: bool, shaped like input without its features: True where a step counts. States carry over the
                other steps, whose output is 0. A NumPy array will do, as for resets.
            lengths: (B), integers on any device, a list or an array, 0 allowed: how many steps each row has, in any
                order. Gives what packing the input gives, without packing it.
            resets: bool, shaped like mask: True where a new episode begins. States are set before that step, so
                nothing passes between episodes in either direction.
            reset_state: what they are set to, like hx, or for each step, (T, D * num_layers, B, hidden_size).
                None: the recurrence's initial values.
            return_all_states: return every state of every step, too.
            time_parallel: a tolerance, such as 1e-6, for long sequences: chunks of steps run side by side from guessed
                states, again and again, until no state differs by more between the end of a chunk and the beginning
                of the next; backward likewise, as a part of the largest gradient of such a state. Steps run one after
                the other where that is predicted to be faster, or where the states do not settle, and with None.

        Returns:
            The h of every step, like input with D * hidden_size features, and the final states, like hx. With
            return_sequences=False the first is the h of each direction's last step, (B, D * hidden_size). With
            return_all_states a third: like hx, with T in front, (T, D * num_layers, B, hidden_size).

        Raises:
            ValueError: input of another rank, or of another dtype than the weights; a mask, lengths, resets or
                reset_state of another shape, or beside a PackedSequence or a jagged input; a time_parallel that is not
                positive.
            RuntimeError: another feature size, or states of another rank, shape or dtype; no time steps.
            TypeError: hx is a tuple where a tensor belongs, or the reverse, or with something else in it; a mask or
                return_all_states that is not bool; a mask that is not given by name; a nested input of another layout.

        Example::

            >>> import gpu_rnn, torch
            >>> layer = gpu_rnn.GRU(3, 8)
            >>> y, h = layer(torch.randn(5, 2, 3), lengths=torch.tensor([5, 3]))
            >>> y.shape, h.shape
            (torch.Size([5, 2, 8]), torch.Size([1, 2, 8]))
        """
        if isinstance(input, Proxy):
            steering = {"mask": mask, "lengths": lengths, "resets": resets, "reset_state": reset_state}
            asked = {"return_all_states": return_all_states, "time_parallel": time_parallel}
            more = unknown if isinstance(unknown, dict) else {}  # one more Proxy where the layer is all that is traced
            return onlookers.leaf(self, input, hx, **steering, **asked, **more)
        if further or unknown or not isinstance(return_all_states, bool):
            self._check_others(further, unknown, return_all_states)
        if not isinstance(input, PackedSequence):
            if getattr(input, "layout", None) is torch.jagged:
                asked = {"return_all_states": return_all_states, "time_parallel": time_parallel}
                return jagged.run(self, input, hx, (mask, lengths, resets, reset_state), asked)
            arguments.tensor("input", input)
        states = None if hx is None else self._as_tuple(hx)
        controls = NONE
        if not (mask is lengths is resets is reset_state is None):
            values = None if reset_state is None else self._as_tuple(reset_state, "reset_state")
            controls = StackControls.of(input, mask, lengths, resets, values)
        within = 0.0 if time_parallel is None else arguments.tolerance("time_parallel", time_parallel)
        output, states, every = self._of_any_rank(input, states, controls, return_all_states, within)
        if self._one_state:
            return (output, states[0], every[0]) if return_all_states else (output, states[0])
        return (output, states, every) if return_all_states else (output, states)

    def _of_any_rank(
        self,
        input: Tensor | PackedSequence,
        states: States | None,
        controls: StackControls,
        all_states: bool,
        within: float,
    ) -> tuple[Tensor | PackedSequence, States, States]:
        if isinstance(input, PackedSequence):
            return self._packed(input, states, controls, all_states, within)
        if input.dim() == 2:
            return self._unbatched(input, states, controls, all_states, within)
        if input.dim() != 3:
            raise ValueError(f"{type(self).__name__}: Expected input to be 2D or 3D, got {input.dim()}D instead")
        if states is not None:
            self._check_rank(states, 3, "batched")
        controls = controls.transposed() if self.batch_first else controls
        return self._run(input, states, None, controls, all_states, within)

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        """As torch.nn's, which has no words for a quantized tensor."""
        arguments.floating("input", input)
        super().check_input(input, batch_sizes)

    def _check_others(self, further: tuple[Any, ...], unknown: Collection[str], all_states: Any) -> None:
        if unknown:
            raise unexpected(f"{type(self).__name__}.forward()", unknown, layer_options.OF_THE_CALL)
        # torch's old ONNX exporter gives the defaults of all arguments by position, False as a tensor.
        if any(value is not None and (not isinstance(value, Tensor) or value.dim() or value) for value in further):
            raise TypeError(f"{type(self).__name__}: after hx, arguments are given by name: layer(x, hx, mask=mask)")
        if not isinstance(all_states, bool):
            raise TypeError(f"{type(self).__name__}: return_all_states should be True or False, got: {all_states!r}")

    def _unbatched(
        self, input: Tensor, states: States | None, controls: StackControls, all_states: bool, within: float
    ) -> tuple[Tensor, States, States]:
        batch_dim = 0 if self.batch_first else 1
        if states is not None:
            self._check_rank(states, 2, "unbatched")
            states = tuple(state.unsqueeze(1) for state in states)
        batched = controls.batched(input.shape[0])
        output, states, every = self._run(input.unsqueeze(batch_dim), states, None, batched, all_states, within)
        output = output.squeeze(batch_dim if self.return_sequences else 0)
        return output, tuple(state.squeeze(1) for state in states), tuple(state.squeeze(2) for state in every)

    def _packed(
        self, input: PackedSequence, states: States | None, controls: StackControls, all_states: bool, within: float
    ) -> tuple[PackedSequence | Tensor, States, States]:
        data, batch_sizes, to_sorted, to_given = input
        if controls is not NONE:
            controls.refuse_packed(batch_sizes)
        if states is not None and to_sorted is not None:
            self._check_states(data, states, batch_sizes)
            states = tuple(state.index_select(1, to_sorted) for state in states)
        if states is None and to_sorted is not None and torch.compiler.is_compiling():
            # So that B is a size, where the first of batch_sizes is a number that no graph knows.
            states = self._stack(packed=True).initial(data, self._weights(), len(to_sorted))
        output, states, every = self._run(data, states, batch_sizes, NONE, all_states, within)
        if to_given is not None:
            states = tuple(state.index_select(1, to_given) for state in states)
            every = tuple(state.index_select(2, to_given) for state in every)
        if not self.return_sequences:
            return (output if to_given is None else output[to_given]), states, every
        return PackedSequence(output, batch_sizes, to_sorted, to_given), states, every

    def _run(
        self,
        input: Tensor,
        states: States | None,
        batch_sizes: Tensor | None,
        controls: StackControls,
        all_states: bool,
        within: float,
    ) -> tuple[Tensor, States, States]:
        weights = self._weights()
        # RNNBase.check_input has the words but takes longer than this test, and a short call is all overhead.
        if input.shape[-1] != self.input_size or input.dtype != weights[0].dtype:
            self.check_input(input, batch_sizes)
        if states is not None:
            self._check_states(input, states, batch_sizes)
        stack = self._stack(batch_sizes is not None, all_states)
        if within:
            stack = replace(stack, time_parallel=within)
        if controls is not NONE or (self.training and self._draws()):
            steps, batch = stack.sizes(input, batch_sizes)
            controls = self._with_noise(controls, input, steps, batch)
            if controls is not NONE:
                controls = controls.checked(
                    steps, stack.state_shapes(weights, batch), len(self.recurrence.gates), input
                )
        if self.training and self.weight_drop:
            weights = self._with_dropped(self._flat_weights_names, weights)
        output, states, every = run.sequence(stack, input, states, weights, batch_sizes, controls)
        if not self.return_sequences:
            of_steps = output.transpose(0, 1) if stack.batch_first else output
            output = controls.last(of_steps, states[0], stack.directions)
        return output, states, every

    def _new_stack(self, packed: bool, all_states: bool) -> Stack:
        return Stack(
            recurrence=self.recurrence if self.training else self._at_evaluation,
            bias=self.bias,
            num_layers=self.num_layers,
            dropout=self.dropout if self.training else 0.0,
            bidirectional=self.bidirectional,
            batch_first=self.batch_first and not packed,
            proj_size=self.proj_size,
            backend=self.backend,
            norm=self._layer_norm or self._rms_norm,  # not the properties: Dynamo would guard each at every call
            rms=self._rms_norm,
            all_states=all_states,
            heads=self._heads,
            rebuilds=self.save == "states",
        )

    def check_forward_args(self, input: Tensor, hidden: Any, batch_sizes: Tensor | None) -> None:
        """What torch.nn's layers check of input (T, B, I), or packed, and states; errors as `forward`'s."""
        self.check_input(input, batch_sizes)
        self._check_states(input, self._as_tuple(hidden), batch_sizes)

    def permute_hidden(self, hx: Any, permutation: Tensor | None) -> Any:
        """The states with the rows of the batch in another order; None leaves them."""
        if permutation is None:
            return hx
        states = tuple(state.index_select(1, permutation) for state in self._as_tuple(hx))
        return states[0] if self._one_state else states

    def _check_states(self, input: Tensor, states: States, batch_sizes: Tensor | None) -> None:
        if batch_sizes is not None and torch.compiler.is_compiling():  # B is no size then: the call checks it
            (rows, batch, width), *_ = self._stack().state_shapes(self._weights(), states[0].shape[1])
            expected = rows, batch, width
        else:
            expected = self.get_expected_hidden_size(input, batch_sizes)
        for index, state in enumerate(states):
            which = "" if self._one_state else f"[{index}]"
            self.check_hidden_size(state, expected, f"Expected hidden{which} size {{}}, got {{}}")
            if state.dtype != input.dtype:
                arguments.check_alike(input, (), states)
            expected = (*expected[:2], self.hidden_size)  # a projection narrows the first state only
