# SPDX-License-Identifier: Apache-2.0
"""The options that every layer takes beyond torch.nn's: what they are, their defaults, and what they may be."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

from gpu_rnn import initializers, spelling
from gpu_rnn.call import arguments
from gpu_rnn.call.arguments import flag, probability
from gpu_rnn.dispatch import choice
from gpu_rnn.initializers import Initializer
from gpu_rnn.recurrence import Recurrence


class LayerOptions(TypedDict, total=False):
    """Keyword-only arguments of all layers; each defaults to what torch.nn does.

    Attributes:
        recurrent_dropout: probability of dropping a unit of h where it enters the recurrent product, in training: one
            mask for each sample, the same at all steps (Gal & Ghahramani, arXiv:1512.05287). Default: 0
        recurrent_dropout_per_gate: draw a mask for each gate, as Keras does, instead of one for all. Default: False
        zoneout: probability that a unit keeps its state for a step, in training; at evaluation states are the
            expectation (Krueger et al., arXiv:1606.01305). One for all states or a tuple with one for each, (h, c) of
            an LSTM. Default: 0
        weight_drop: probability of dropping a recurrent weight, in training, the same weights at all steps (Merity et
            al., arXiv:1708.02182). Default: 0
        layer_norm: layer-normalise the products, gate by gate, LN(W_ih x)·g_ih + b_ih and LN(W_hh h)·g_hh + b_hh (Ba
            et al., arXiv:1607.06450), with parameters norm_ih_l{k} and norm_hh_l{k} (G*H). Default: False
        rms_norm: the same by the root mean square alone, without the mean (Zhang & Sennrich, arXiv:1910.07467); not
            beside layer_norm. Default: False
        heads: blocks on the diagonal of W_hh, k of (H/k, H/k) a gate, and 0 elsewhere: each head of H/k units reads the
            whole input, and of h its own part. Every weight has k in front, as if the heads were layers side by
            side. Default: 1
        save: what a layer saves for its backward pass: "gates" of every step, or the "states" alone, from which it
            computes the gates again. Default: "gates"
        return_sequences: False: the output is that of each direction's last step, (B, D*H). Default: True
        kernel_initializer: initial values of weight_ih, a name or function as in `gpu_rnn.initializers`. Default:
            None, uniform in ±1/sqrt(H)
        recurrent_initializer: likewise of weight_hh
        bias_initializer: likewise of the biases
        unit_forget_bias: the forget gate's bias starts at 1. Default: False
    """

    recurrent_dropout: float
    recurrent_dropout_per_gate: bool
    zoneout: float | tuple[float, ...]
    weight_drop: float
    layer_norm: bool
    rms_norm: bool
    heads: int
    save: str
    return_sequences: bool
    kernel_initializer: str | Initializer | None
    recurrent_initializer: str | Initializer | None
    bias_initializer: str | Initializer | None
    unit_forget_bias: bool


DEFAULTS: dict[str, Any] = {
    "recurrent_dropout": 0.0,
    "recurrent_dropout_per_gate": False,
    "zoneout": 0.0,
    "weight_drop": 0.0,
    "layer_norm": False,
    "rms_norm": False,
    "heads": 1,
    "save": "gates",
    "return_sequences": True,
    "kernel_initializer": None,
    "recurrent_initializer": None,
    "bias_initializer": None,
    "unit_forget_bias": False,
}
assert DEFAULTS.keys() == LayerOptions.__annotations__.keys()


def checked(
    options: Mapping[str, Any],
    layer: str,
    others: Iterable[str],
    recurrence: Recurrence,
    hidden_size: int,
    proj_size: int,
) -> dict[str, Any]:
    """All options with their values; zoneout as a tuple. `others`: the layer's own, which an error names as well.

    Raises:
        TypeError: an option that does not exist, or a value of the wrong type.
        ValueError: a probability outside [0, 1], recurrent_dropout_per_gate without recurrent_dropout, zoneout for
            another number of states, of a projected h or of a state that begins at infinity; heads that do not divide
            hidden_size and proj_size; both normalisations.
    """
    unknown = options.keys() - DEFAULTS.keys()
    if unknown:
        name, known = min(unknown), ", ".join((*others, *DEFAULTS))
        near = spelling.meant(name, (*others, *DEFAULTS, *OF_TORCH))
        advice = f"{near}{'' if near else ';'} besides torch.nn's it takes {known}"
        if name in OF_THE_CALL:
            advice = f"; {name} is an argument of the call: layer(x, {name}=...)"
        raise TypeError(f"{layer} got an unexpected keyword argument {name!r}{advice}")
    if options.get("recurrent_dropout_per_gate") and "recurrent_dropout" not in options:
        raise ValueError(
            "recurrent_dropout_per_gate says how recurrent_dropout draws its masks: give recurrent_dropout=p, too"
        )
    if options.get("layer_norm") and options.get("rms_norm"):
        raise ValueError("layer_norm and rms_norm are two ways to normalise the same products: give one of them")
    found = {name: value(name, options.get(name, default)) for name, default in DEFAULTS.items()}
    arguments.heads(found["heads"], hidden_size, proj_size)
    found["zoneout"] = zoneout(found["zoneout"], recurrence, proj_size)
    return found


def value(name: str, given: Any) -> Any:
    """The value of an option, checked; errors as `checked`'s. Of zoneout, which depends on the recurrence, see
    there."""
    if name.endswith("_initializer"):
        if given is not None:
            initializers.resolve(given)
    elif isinstance(DEFAULTS.get(name), bool):
        flag(name, given)
    elif name in ("dropout", "recurrent_dropout", "weight_drop"):
        return probability(name, given)
    elif name == "backend":
        choice.check_name(given)
    elif name == "save":
        arguments.rebuilds(given)
    return given


def assigned(name: str, given: Any) -> Any:
    """The value for an attribute of a layer or cell that exists already.

    Raises:
        AttributeError: one that the parameters or the recurrence were made from.
        TypeError, ValueError: as `value`.
    """
    if name in ("layer_norm", "rms_norm", "heads"):
        raise AttributeError(f"the parameters were made for {name}: make another layer with it")
    if name in OF_THE_RECURRENCE or name == "nonlinearity":
        raise AttributeError(
            f"{name} is part of the recurrence, which this layer was made with: make another layer with it"
        )
    return value(name, given)


def defaults(recurrence: Recurrence) -> dict[str, Any]:
    """The options of a layer that was given none."""
    return DEFAULTS | {"zoneout": (0.0,) * len(recurrence.states)}


OF_THE_CALL = ("hx", "mask", "lengths", "resets", "reset_state", "return_all_states", "time_parallel")
OF_THE_RECURRENCE: dict[str, Any] = {  # the constructors' arguments that are, with their defaults
    "activation": "tanh",
    "recurrent_activation": "sigmoid",
    "reset_after": True,
    "peephole": False,
    "clip": None,
}
OF_TORCH = (
    "input_size",
    "hidden_size",
    "num_layers",
    "bias",
    "batch_first",
    "dropout",
    "bidirectional",
    "device",
    "dtype",
)
SIZES = ("input_size", "hidden_size", "num_layers", "bias", "bidirectional", "proj_size")
ASSIGNED = frozenset((*DEFAULTS, *OF_THE_RECURRENCE, "nonlinearity", "dropout", "backend"))


def zoneout(given: Any, recurrence: Recurrence, proj_size: int) -> tuple[float, ...]:
    """A probability for each state; errors as `checked`'s."""
    several = isinstance(given, (tuple, list))
    given = tuple(given) if several else (given,) * len(recurrence.states)
    if len(given) != len(recurrence.states):
        states = ", ".join(recurrence.states)
        raise ValueError(f"zoneout is one probability or one for each state ({states}), got {len(given)}")
    given = tuple(probability("zoneout", each) for each in given)
    if proj_size and given[0]:
        raise ValueError(
            "zoneout of h is not defined with proj_size: h is a projection; give zoneout=(0.0, p) for c alone"
        )
    for state, initial, chance in zip(recurrence.states, recurrence.initial, given, strict=True):
        if chance and not math.isfinite(initial):
            raise ValueError(
                f"zoneout of state {state} has no expectation: it begins at {initial}; give it probability 0"
            )
    return given
