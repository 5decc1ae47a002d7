# SPDX-License-Identifier: Apache-2.0
"""Initial values of a layer's weights: names as Keras has them, names and functions as torch.nn.init has them.

A layer's ``kernel_initializer``, ``recurrent_initializer`` and ``bias_initializer`` take a name of `INITIALIZERS` or a
function that fills the tensor it is given, as those of torch.nn.init do::

    >>> import gpu_rnn, torch
    >>> weight = torch.empty(4 * 8, 8)  # (G * H, H), of an LSTM
    >>> gpu_rnn.initializers.fill_(weight, "orthogonal")
    >>> torch.allclose(weight.T @ weight, torch.eye(8), atol=1e-5)
    True

An initializer sees the whole matrix (G * H, X) of one layer and direction, never one gate, as in Keras, whose
(X, G * H) is its transpose: so fan_in is X and fan_out is G * H in both. A function may split it: one orthogonal
matrix a gate is ``def each(w): [torch.nn.init.orthogonal_(gate) for gate in w.chunk(4)]``.

`resolve` checks a name or function, `fill_` fills one tensor, `apply` those of a layer. Random values come from
torch's generator of the tensor's device.

Every value is written by a function of torch.nn.init, looked up there when it is called. So libraries that replace
these functions while they load a checkpoint, to keep what is loaded, are heeded. Of a sharded tensor (DTensor) the
whole is drawn, and each process keeps its part of what the first one drew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import init

from gpu_rnn.recurrence import Recurrence

Initializer = Callable[[Tensor], object]

CUT_STD = 0.87962566103423978  # standard deviation of a standard normal cut at ±2 (tests compare it with SciPy's)


def random_uniform(weight: Tensor) -> Tensor:
    """U(±0.05), Keras's. torch.nn.init.uniform_ is U(0, 1): give the function for that."""
    return init.uniform_(weight, -0.05, 0.05)


def random_normal(weight: Tensor) -> Tensor:
    """N(0, 0.05²), Keras's. torch.nn.init.normal_ is N(0, 1): give the function for that."""
    return init.normal_(weight, std=0.05)


def truncated_normal(weight: Tensor, std: float = 0.05) -> Tensor:
    """N(0, std²), what lies beyond ±2 std drawn again."""
    return init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def glorot_normal(weight: Tensor) -> Tensor:
    """Variance 2 / (fan_in + fan_out), normal, cut at two standard deviations; `xavier_normal` is not cut."""
    fan_out, fan_in = weight.shape
    return truncated_normal(weight, (2 / (fan_in + fan_out)) ** 0.5 / CUT_STD)


def he_normal(weight: Tensor) -> Tensor:
    """Variance 2 / fan_in, normal, cut at two standard deviations; `kaiming_normal` is not cut."""
    return truncated_normal(weight, (2 / weight.shape[1]) ** 0.5 / CUT_STD)


def lecun_normal(weight: Tensor) -> Tensor:
    """Variance 1 / fan_in, normal, cut at two standard deviations."""
    return truncated_normal(weight, (1 / weight.shape[1]) ** 0.5 / CUT_STD)


def orthogonal(weight: Tensor) -> Tensor:
    """Wᵀ W = 1, uniformly drawn: the factor Q of a normal matrix. In 16 bits it is computed in float32, as QR has to
    be."""
    if weight.dtype.itemsize > 2:
        return init.orthogonal_(weight)
    return _write(weight, init.orthogonal_(torch.empty_like(weight, dtype=torch.float32)))


def _of_torch(name: str, **options: Any) -> Initializer:
    """A function of torch.nn.init, whatever stands there under its name by then."""

    def fill(weight: Tensor) -> object:
        return getattr(init, name)(weight, **options)

    return fill


FOR_BIASES: dict[str, Initializer] = {
    "zeros": _of_torch("zeros_"),
    "ones": _of_torch("ones_"),
    "uniform": random_uniform,
    "random_uniform": random_uniform,
    "normal": random_normal,
    "random_normal": random_normal,
    "truncated_normal": truncated_normal,
}
"""Names of what needs neither fan_in nor fan_out."""

INITIALIZERS: dict[str, Initializer] = {
    **FOR_BIASES,
    # U(± sqrt(6 / (fan_in + fan_out))), sqrt(6 / fan_in), sqrt(3 / fan_in): the same in Keras and in torch.nn.init.
    "glorot_uniform": _of_torch("xavier_uniform_"),
    "xavier_uniform": _of_torch("xavier_uniform_"),
    "he_uniform": _of_torch("kaiming_uniform_"),
    "kaiming_uniform": _of_torch("kaiming_uniform_"),
    "lecun_uniform": _of_torch("kaiming_uniform_", nonlinearity="linear"),
    # Keras cuts its normals, torch.nn.init does not.
    "glorot_normal": glorot_normal,
    "he_normal": he_normal,
    "lecun_normal": lecun_normal,
    "xavier_normal": _of_torch("xavier_normal_"),
    "kaiming_normal": _of_torch("kaiming_normal_"),
    "orthogonal": orthogonal,
}
"""Every name."""


def resolve(initializer: str | Initializer) -> Initializer:
    """The function behind a name; a function is returned as it is.

    Raises:
        ValueError: an unknown name (the known ones are listed).
        TypeError: neither a name nor a function.
    """
    if isinstance(initializer, str):
        if initializer not in INITIALIZERS:
            known = ", ".join(INITIALIZERS)
            raise ValueError(f"unknown initializer {initializer!r}; use one of {known}, or a function of torch.nn.init")
        return INITIALIZERS[initializer]
    if not callable(initializer):
        raise TypeError(
            "an initializer is a name or a function such as torch.nn.init.orthogonal_, "
            f"not {type(initializer).__name__}"
        )
    return initializer


def fill_(weight: Tensor, initializer: str | Initializer) -> None:
    """Fill a tensor in place: a matrix (G * H, X) as a whole, or a bias (G * H).

    Raises:
        ValueError: an unknown name, or one whose formula needs a matrix, for a bias.
        TypeError: neither a name nor a function; a function that returns new values instead of filling its argument.
    """
    function = resolve(initializer)
    if isinstance(initializer, str) and weight.dim() < 2 and initializer not in FOR_BIASES:
        raise ValueError(
            f"{initializer!r} needs a matrix, and a bias is none: use {', '.join(FOR_BIASES)}, or a function"
        )
    of_torch = getattr(function, "__module__", "") == init.__name__
    if of_torch:
        function = getattr(init, function.__name__)
    with torch.no_grad():
        if (of_torch or isinstance(initializer, str)) and not _sharded(weight):
            function(weight)
            return
        # A function may go through parts of the tensor, which nobody who guards the whole one knows.
        whole = _whole(weight)
        result = function(whole)
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
            raise TypeError(
                "an initializer fills the tensor it is given, as torch.nn.init.orthogonal_ does; this one made another"
            )
        _write(weight, whole)


def _sharded(weight: Tensor) -> bool:
    """Whether a tensor is a DTensor; to import that class takes longer than this package."""
    return hasattr(weight, "device_mesh") and hasattr(weight, "placements")


def _whole(weight: Tensor) -> Tensor:
    """A copy, of all that other processes have, too."""
    weight = weight.detach()
    return weight.full_tensor().clone() if _sharded(weight) else weight.clone()  # type: ignore[attr-defined]


@torch.no_grad()
def _write(weight: Tensor, values: Tensor) -> Tensor:
    """Puts values in the place of those of a weight, unless torch.nn.init's functions leave that alone just now."""
    before = None if weight.is_inference() else weight._version
    init.zeros_(weight)
    if before is not None and weight._version == before:
        return weight
    if _sharded(weight):
        from torch.distributed.tensor import distribute_tensor

        values = distribute_tensor(values, weight.device_mesh, weight.placements)  # type: ignore[attr-defined]
    return weight.copy_(values)


def apply(
    parameters: Iterable[tuple[str, Tensor]],
    recurrence: Recurrence,
    *,
    kernel: str | Initializer | None = None,
    recurrent: str | Initializer | None = None,
    bias: str | Initializer | None = None,
    unit_forget_bias: bool = False,
    heads: int = 1,
) -> None:
    """Fill the weights of a layer or cell that an initializer is given for; the others keep the values they have.

    Args:
        parameters: names and tensors, as ``layer.named_parameters()`` gives them: weight_ih* (G*H, I), weight_hh*
            (G*H, H), bias_ih* and bias_hh* (G*H). Others (weight_hr, peepholes) are left alone. Those of a layer with
            heads have k in front.
        recurrence: the layer's, for its gates.
        kernel, recurrent: for weight_ih and weight_hh.
        bias: for bias_ih. bias_hh is filled with it where Keras has a second row of biases too, in a cell of which
            a gate does not merely add its two parts (GRU with reset_after); else bias_hh is 0, and the sum is
            what the initializer gives.
        unit_forget_bias: make the sum of the forget gate's biases 1, whatever `bias` says (Jozefowicz et al., ICML
            2015).
        heads: the layer's. An initializer sees each block of weight_hh by itself, (G*H/k, H/k), and of the others the
            whole, (G*H, I) and (G*H), head after head.

    Raises:
        ValueError: an unknown name, one that needs a matrix as `bias`, or unit_forget_bias without a gate f.
        TypeError: neither a name nor a function.
    """
    if unit_forget_bias and "f" not in recurrence.gates:
        raise ValueError(f"unit_forget_bias needs a forget gate f; {recurrence.name} has {', '.join(recurrence.gates)}")
    second_bias = bias if bias is None or recurrence.program.split else "zeros"
    chosen = {"weight_ih": kernel, "weight_hh": recurrent, "bias_ih": bias, "bias_hh": second_bias}
    for name, tensor in parameters:
        initializer = chosen.get(name.split("_l")[0])
        if initializer is not None and heads == 1:
            fill_(tensor, initializer)
        elif initializer is not None:
            _fill_heads(tensor, initializer, each=name.startswith("weight_hh"))
        if unit_forget_bias and name.startswith("bias_"):
            _fill_gate(tensor, recurrence, "f", float(name.startswith("bias_ih")))


@torch.no_grad()
def _fill_gate(bias: Tensor, recurrence: Recurrence, gate: str, value: float) -> None:
    whole = _whole(bias)
    whole.chunk(len(recurrence.gates), -1)[recurrence.gates.index(gate)].fill_(value)
    _write(bias, whole)


@torch.no_grad()
def _fill_heads(weight: Tensor, initializer: str | Initializer, each: bool) -> None:
    """(k, ·, ·): each head's part by itself, or all of them as one matrix."""
    whole = _whole(weight)
    for part in whole if each else [whole.flatten(0, 1)]:
        fill_(part, initializer)
    _write(weight, whole)


def uniform_blocks(parameters: Iterable[tuple[str, Tensor]], heads: int) -> None:
    """The blocks (k, G·H/k, H/k) of W_hh uniform in ±1/sqrt(H/k): as many units enter a product."""
    for name, weight in parameters:
        if heads > 1 and name.startswith("weight_hh"):
            bound = weight.shape[-1] ** -0.5
            init.uniform_(weight, -bound, bound)
