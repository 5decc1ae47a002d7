# SPDX-License-Identifier: Apache-2.0
"""The attributes of ONNX's LSTM, GRU and RNN nodes, and the options of a layer that they are. `gpu_rnn.interop` has
both functions, beside those for weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from gpu_rnn.layers.options import OF_THE_RECURRENCE

# ONNX's name for an activation, with its default alpha and beta, and this library's.
ONNX_ACTIVATIONS = {
    "Tanh": "tanh",
    "Sigmoid": "sigmoid",
    "Relu": "relu",
    "LeakyRelu": "leaky_relu",
    "Elu": "elu",
    "HardSigmoid": "keras2_hard_sigmoid",
    "Softsign": "softsign",
    "Softplus": "softplus",
}
# What each operator's activations are here, in its order. The last two of an LSTM are one option.
ONNX_ROLES = {
    "LSTM": ("recurrent_activation", "activation", "activation"),
    "GRU": ("recurrent_activation", "activation"),
    "RNN": ("activation",),
}


def onnx_attributes(layer: nn.RNNBase) -> dict[str, Any]:
    """The attributes of the ONNX nodes of an LSTM, GRU or RNN, as `onnx.helper.make_node` takes them; `to_onnx` has the
    inputs.

    Raises:
        ValueError: another layer; an activation that ONNX does not name.

    Example::

        >>> import gpu_rnn
        >>> from gpu_rnn import interop
        >>> interop.onnx_attributes(gpu_rnn.RNN(3, 8, clip=3.0))
        {'hidden_size': 8, 'direction': 'forward', 'activations': ['Tanh'], 'clip': 3.0}
    """
    operator, names = layer.mode.partition("_")[0], {ours: theirs for theirs, ours in ONNX_ACTIVATIONS.items()}
    if operator not in ONNX_ROLES:
        raise ValueError(f"ONNX has the operators {', '.join(ONNX_ROLES)}, and none for {layer.mode}")
    if getattr(layer, "heads", 1) > 1:
        raise ValueError("ONNX's operators have no block-diagonal recurrent weights (heads): take a layer with heads=1")
    nonlinearity = {"activation": getattr(layer, "nonlinearity", "tanh")}
    options = OF_THE_RECURRENCE | nonlinearity | getattr(layer, "_shown", {})  # torch.nn's layers have no options
    chosen = [options[role] for role in ONNX_ROLES[operator]]
    if unknown := [str(name) for name in chosen if name not in names]:
        raise ValueError(f"ONNX has the activations {', '.join(names)}, not {unknown[0]}")
    clip, after = options["clip"] and float(options["clip"]), options["reset_after"] if operator == "GRU" else None
    directions = "01" if layer.bidirectional else "0"
    return node_attributes(layer.hidden_size, directions, [names[name] for name in chosen], clip, after)


def node_attributes(
    hidden: int, directions: str, activations: Sequence[str], clip: float | None, reset_after: bool | None
) -> dict[str, Any]:
    """Of a node, without those that it lacks. `directions` has a character for each, "1" where time runs backwards;
    `activations` are one direction's; `reset_after` is a GRU's, None for the others."""
    attributes = {
        "hidden_size": hidden,
        "direction": {"0": "forward", "1": "reverse", "01": "bidirectional"}[directions],
        "activations": list(activations) * len(directions),
        "clip": clip,
        "linear_before_reset": None if reset_after is None else int(reset_after),
    }
    return {name: value for name, value in attributes.items() if value is not None}


def options_of_onnx(attributes: Mapping[str, Any], operator: str) -> dict[str, Any]:
    """What the constructor of a layer takes for the attributes of an ONNX node; `from_onnx` converts its inputs.

    Args:
        attributes: by name, values as `onnx.helper.get_attribute_value` gives them.
        operator: "LSTM", "GRU" or "RNN".

    Raises:
        ValueError: another operator; what the layers have not: an attribute such as input_forget or layout, or
            direction="reverse", activations of other names, or of several kinds where a layer has one.

    Example::

        >>> import gpu_rnn
        >>> from gpu_rnn import interop
        >>> options = interop.options_of_onnx({"hidden_size": 8, "clip": 3.0}, "LSTM")
        >>> gpu_rnn.LSTM(3, **options)
        LSTM(3, 8, clip=3.0)
    """
    if operator not in ONNX_ROLES:
        raise ValueError(f"the operator is one of {', '.join(ONNX_ROLES)}, not {operator!r}")
    given = {name: value.decode() if isinstance(value, bytes) else value for name, value in attributes.items()}
    options: dict[str, Any] = {"hidden_size": given.pop("hidden_size")}
    direction = given.pop("direction", "forward")
    options["bidirectional"] = direction == "bidirectional"
    options["clip"] = given.pop("clip", None) or None  # some writers say 0 where nothing is cut
    if operator == "GRU":
        options["reset_after"] = bool(given.pop("linear_before_reset", 0))
    roles = ONNX_ROLES[operator] * (2 if options["bidirectional"] else 1)
    names = [name.decode() if isinstance(name, bytes) else name for name in given.pop("activations", ())]
    if direction not in ("forward", "bidirectional") or given:
        raise ValueError(f"the layers have no {', '.join(given) or f'direction {direction!r}'}: convert it by hand")
    for role, name in zip(roles, names, strict=bool(names)):
        ours = ONNX_ACTIVATIONS.get(name)
        if ours is None or options.setdefault(role, ours) != ours:
            raise ValueError(
                f"{role} is one of {', '.join(ONNX_ACTIVATIONS)}, the same wherever it stands, not {names}"
            )
    return options
