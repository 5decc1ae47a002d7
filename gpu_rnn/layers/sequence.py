# SPDX-License-Identifier: Apache-2.0
"""RNN, LSTM and GRU as drop-ins for torch.nn's, and Recurrent, the layer for any other recurrence.

Each is a recurrence and torch.nn's constructor; what they do is `base.LayerBase`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack

import torch

from gpu_rnn import cells
from gpu_rnn.activations import Activation
from gpu_rnn.call import arguments
from gpu_rnn.layers.base import LayerBase
from gpu_rnn.layers.documented import in_full
from gpu_rnn.layers.module import elman_activation, refuse_projection
from gpu_rnn.layers.options import LayerOptions
from gpu_rnn.recurrence import Recurrence

if TYPE_CHECKING:
    from torch import Tensor

    from gpu_rnn.layers.calls import LayerCall


@in_full()
class Recurrent(LayerBase):
    """The layer for any recurrence: stacks, both directions, packed input, dropout, all as in torch.nn.GRU.

    Weights, for G gates, U per-unit parameters, H = hidden_size, I = input_size (above the first layer D*H):
    weight_ih_l{k} (G*H, I), weight_hh_l{k} (G*H, H), bias_ih_l{k} and bias_hh_l{k} (G*H), in the order of
    recurrence.gates, and weight_unit_l{k} (U, H), in the order of recurrence.params; each also with _reverse.
    Initial values are uniform in ±1/sqrt(H), as torch.nn's are.

    Args:
        recurrence: what one step computes, a `gpu_rnn.Recurrence`.
        input_size: features of the input.
        hidden_size: units, H.
        num_layers: layers on top of each other. Default: 1
        bias: whether the gates have biases. Default: True
        batch_first: input and output are (B, T, features), not (T, B, features); not hx. Default: False
        dropout: probability of dropout between layers. Default: 0
        bidirectional: a second recurrence runs from the end. Default: False
        device, dtype: of the parameters. Default: torch's
        backend: "auto", or the name of the one backend to use (see `gpu_rnn.explain`). Default: "auto"
        options: those of `gpu_rnn.layers.LayerOptions`.

    Inputs and outputs: see `forward`; hx is a tensor if the recurrence has one state, else a tuple in the
    order of recurrence.states.

    Raises:
        TypeError: recurrence is not a `gpu_rnn.Recurrence`; a size or flag of the wrong type.
        ValueError: a size, num_layers or dropout out of range.

    Example::

        >>> import gpu_rnn, torch
        >>> layer = gpu_rnn.Recurrent(gpu_rnn.cells.lstm(activation="softsign"), 4, 8, bidirectional=True)
        >>> output, (h, c) = layer(torch.randn(5, 3, 4))
        >>> output.shape, h.shape
        (torch.Size([5, 3, 16]), torch.Size([2, 3, 8]))
    """

    if TYPE_CHECKING:
        __call__: LayerCall[Any]

    def __init__(
        self,
        recurrence: Recurrence,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
        **options: Unpack[LayerOptions],
    ) -> None:
        arguments.a_recurrence(recurrence)
        sizes = input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional
        super().__init__(
            recurrence, recurrence.name, *sizes, 0, device, dtype, backend=backend, options={}, further=options
        )

    def extra_repr(self) -> str:
        return f"{self.recurrence.name}, {super().extra_repr()}"


@in_full(Recurrent)
class RNN(LayerBase):
    """Elman's network, h' = φ(W_ih x + b_ih + W_hh h + b_hh), a drop-in for torch.nn.RNN.

    Args:
        nonlinearity: "tanh" or "relu", as torch.nn has it. Default: "tanh"
        activation: φ in the place of nonlinearity: a name of `gpu_rnn.activations` or any plain torch
            function. Default: None
        clip: cut what enters φ to [-clip, clip], as ONNX's attribute of that name; a positive number, or None.
            Default: None
        proj_size: None or 0; another is refused as torch.nn refuses it: only an LSTM has a projection. Default: None
        backend, options and the arguments not named here: as for `Recurrent`.

    Inputs, outputs and Raises: as for `Recurrent`; hx is one tensor. Weights: those of torch.nn.RNN.

    Example::

        >>> import gpu_rnn, torch
        >>> output, h = gpu_rnn.RNN(4, 8, activation="softsign")(torch.randn(5, 3, 4))
        >>> output.shape, h.shape
        (torch.Size([5, 3, 8]), torch.Size([1, 3, 8]))
    """

    if TYPE_CHECKING:
        __call__: LayerCall[Tensor]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | Activation | None = None,
        clip: float | None = None,
        backend: str = "auto",
        proj_size: int | None = None,
        **options: Unpack[LayerOptions],
    ) -> None:
        refuse_projection(proj_size)
        function = elman_activation(nonlinearity, activation)
        cell = {"activation": activation, "clip": clip}
        mode = f"RNN_{nonlinearity.upper()}"
        sizes = input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional
        recurrence = cells.rnn(activation=function, clip=clip)
        super().__init__(recurrence, mode, *sizes, 0, device, dtype, backend=backend, options=cell, further=options)
        self.nonlinearity = nonlinearity


@in_full(Recurrent)
class LSTM(LayerBase):
    """Long short-term memory, a drop-in for torch.nn.LSTM.

    With gates i, f, g, o = W_ih x + b_ih + W_hh h + b_hh, φ = activation and σ = recurrent_activation,
    c' = σ(f)⊙c + σ(i)⊙φ(g) and h' = σ(o)⊙φ(c'): the activation also replaces the output's tanh.
    With proj_size, h' = W_hr (σ(o)⊙φ(c')) (Sak et al., arXiv:1402.1128). With peephole, p_i⊙c is added to i,
    p_f⊙c to f and p_o⊙c' to o (Gers & Schmidhuber, IJCNN 2000).

    Args:
        proj_size: width of h if not hidden_size, less than it. Default: 0
        activation: φ, a name of `gpu_rnn.activations` or any plain torch function. Default: "tanh"
        recurrent_activation: σ, likewise. Default: "sigmoid"
        peephole: add weight_peephole_l{k}{_reverse}, (3, hidden_size), in the order i, f, o. Default: False
        clip: cut what enters φ and σ to [-clip, clip], as ONNX's attribute of that name; a positive number, or None.
            Default: None
        backend, options and the arguments not named here: as for `Recurrent`.

    Inputs, outputs and Raises: as for `Recurrent`; hx is (h, c). Weights: those of torch.nn.LSTM.

    Example::

        >>> import gpu_rnn, torch
        >>> output, (h, c) = gpu_rnn.LSTM(4, 8, recurrent_activation="hard_sigmoid")(torch.randn(5, 3, 4))
        >>> output.shape, c.shape
        (torch.Size([5, 3, 8]), torch.Size([1, 3, 8]))
    """

    if TYPE_CHECKING:
        __call__: LayerCall[tuple[Tensor, Tensor]]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | Activation = "tanh",
        recurrent_activation: str | Activation = "sigmoid",
        peephole: bool = False,
        clip: float | None = None,
        backend: str = "auto",
        **options: Unpack[LayerOptions],
    ) -> None:
        cell = {
            "activation": activation,
            "recurrent_activation": recurrent_activation,
            "peephole": peephole,
            "clip": clip,
        }
        sizes = input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional
        super().__init__(
            cells.lstm(**cell),
            "LSTM",
            *sizes,
            proj_size,
            device,
            dtype,
            backend=backend,
            options=cell,
            further=options,
            unit_weight="weight_peephole",
        )


@in_full(Recurrent)
class GRU(LayerBase):
    """Gated recurrent unit, a drop-in for torch.nn.GRU.

    r, z = σ(W_ih x + b_ih + W_hh h + b_hh), n = φ(W_in x + b_in + r⊙(W_hn h + b_hn)), h' = (1-z)⊙n + z⊙h,
    with φ = activation, σ = recurrent_activation. With reset_after=False, n = φ(W_in x + b_in + W_hn (r⊙h) +
    b_hn) (Cho et al., arXiv:1406.1078).

    Args:
        activation: φ, a name of `gpu_rnn.activations` or any plain torch function. Default: "tanh"
        recurrent_activation: σ, likewise. Default: "sigmoid"
        reset_after: apply r after the product with W_hn (torch, cuDNN), not before it. Default: True
        clip: cut what enters φ and σ to [-clip, clip], as ONNX's attribute of that name; a positive number, or None.
            Default: None
        proj_size: None or 0; another is refused as torch.nn refuses it: only an LSTM has a projection. Default: None
        backend, options and the arguments not named here: as for `Recurrent`.

    Inputs, outputs and Raises: as for `Recurrent`; hx is one tensor. Weights: those of torch.nn.GRU.

    Example::

        >>> import gpu_rnn, torch
        >>> output, h = gpu_rnn.GRU(4, 8, reset_after=False)(torch.randn(5, 3, 4))
        >>> output.shape, h.shape
        (torch.Size([5, 3, 8]), torch.Size([1, 3, 8]))
    """

    if TYPE_CHECKING:
        __call__: LayerCall[Tensor]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | Activation = "tanh",
        recurrent_activation: str | Activation = "sigmoid",
        reset_after: bool = True,
        clip: float | None = None,
        backend: str = "auto",
        proj_size: int | None = None,
        **options: Unpack[LayerOptions],
    ) -> None:
        refuse_projection(proj_size)
        cell = {
            "activation": activation,
            "recurrent_activation": recurrent_activation,
            "reset_after": reset_after,
            "clip": clip,
        }
        sizes = input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional
        super().__init__(
            cells.gru(**cell), "GRU", *sizes, 0, device, dtype, backend=backend, options=cell, further=options
        )
