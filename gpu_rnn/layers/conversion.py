# SPDX-License-Identifier: Apache-2.0
"""torch.nn's recurrent layers of a model become this library's, in place, and back.

A module changes its class and keeps everything else that it is: its Parameter objects, which optimizers hold, its
hooks, and its place in the model, however many places that are.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.rnn import RNNCellBase
from torch.nn.utils import parametrize

from gpu_rnn.layers import cell, sequence
from gpu_rnn.layers import options as layer_options
from gpu_rnn.layers.module import RecurrenceHolder
from gpu_rnn.spelling import meant

TWINS: dict[type[nn.Module], type[nn.Module]] = {
    nn.RNN: sequence.RNN,
    nn.LSTM: sequence.LSTM,
    nn.GRU: sequence.GRU,
    nn.RNNCell: cell.RNNCell,
    nn.LSTMCell: cell.LSTMCell,
    nn.GRUCell: cell.GRUCell,
}
BACK = {ours: theirs for theirs, ours in TWINS.items()}
# What torch.nn's constructors take, as their modules keep it. `dropout` is set afterwards: a warning has been given.
SHARED = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "bidirectional", "proj_size")
ONLY_IN_TRAINING = {"recurrent_dropout", "recurrent_dropout_per_gate", "weight_drop"}
MADE_FOR = ("layer_norm", "rms_norm", "peephole")  # options with parameters of their own


@dataclass(frozen=True)
class Replaced:
    """A module that was converted.

    Attributes:
        names: all its names in the model; "" is the model itself.
        module: the module, as it is now.
        note: what it lost on the way, or "".
    """

    names: tuple[str, ...]
    module: nn.Module
    note: str = ""


@dataclass(frozen=True)
class LeftAlone:
    """A recurrent module that stays what it was.

    Attributes:
        names: all its names in the model.
        kind: its class.
        reason: why.
    """

    names: tuple[str, ...]
    kind: str
    reason: str


@dataclass(frozen=True)
class Conversion:
    """What `gpu_rnn.convert` did; its `repr` is a table.

    Attributes:
        to: "gpu_rnn" or "torch".
        replaced: the modules that were converted.
        left: the recurrent modules that were not, and why.
    """

    to: str
    replaced: tuple[Replaced, ...]
    left: tuple[LeftAlone, ...]

    def __repr__(self) -> str:
        if not self.replaced and not self.left:
            return "no recurrent layers"
        lines = [f"{len(self.replaced)} of {len(self.replaced) + len(self.left)} recurrent modules are {self.to}'s now"]
        for each in self.replaced:
            lines.append(f"  {_shown(each.names)}: {each.module!r}{f' {each.note}' if each.note else ''}")
        lines += ["left:"] if self.left else []
        lines += [f"  {_shown(each.names)}: {each.kind}, {each.reason}" for each in self.left]
        return "\n".join(lines)


def convert(model: nn.Module, to: str = "gpu_rnn", **options: Any) -> Conversion:
    """Make torch.nn's recurrent layers and cells in a model this library's, in place, or the reverse.

    A module keeps its Parameter objects, so that optimizers, averages and tied weights go on with them, its hooks,
    flags and attributes, and its place: also the model itself, where that is a layer. What is no plain layer of
    torch.nn stays as it is and is reported: a subclass, a parametrized or compiled module.

    Args:
        model: a module with torch.nn's RNN, LSTM, GRU, RNNCell, LSTMCell or GRUCell somewhere in it.
        to: "gpu_rnn", or "torch" for the way back.
        options: further arguments of the new layers' constructors, such as recurrent_dropout=0.1, the same for all. A
            module whose class does not take one of them is left. Weights stay: an initializer acts at the next
            `reset_parameters`.

    Returns:
        What was replaced, and what was left and why.

    Raises:
        TypeError: model is no module; an option that no layer has.
        ValueError: another `to`; an option's value is not allowed; for the way back, all that torch.nn lacks, by name:
            then nothing was changed. recurrent_dropout and weight_drop act in training alone: on a module in
            evaluation they are dropped, and the report says so.

    Example::

        >>> import gpu_rnn, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LSTM(8, 16))
        >>> gpu_rnn.convert(model, recurrent_dropout=0.1)
        1 of 1 recurrent modules are gpu_rnn's now
          1: LSTM(8, 16, recurrent_dropout=0.1)
        >>> gpu_rnn.convert(model.eval(), to="torch")
        1 of 1 recurrent modules are torch's now
          1: LSTM(8, 16) without recurrent_dropout=0.1
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert takes a torch.nn.Module, not {type(model).__name__}")
    if to not in ("gpu_rnn", "torch"):
        raise ValueError(f"to is 'gpu_rnn' or 'torch', not {to!r}")
    _check_options(to, options)
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    left: list[LeftAlone] = []
    donors: dict[nn.Module, nn.Module] = {}
    for module, places in names.items():
        if not _concerns(module, to, options):
            continue
        reason = _obstacle(module) or (_beyond_torch(module) if to == "torch" else _not_taken(module, options))
        if reason:
            left.append(LeftAlone(tuple(places), f"{type(module).__module__}.{type(module).__qualname__}", reason))
        else:
            donors[module] = _donor(module, to, options)
    if to == "torch" and left:
        lines = (f"  {_shown(each.names)}: {each.kind}, {each.reason}" for each in left)
        raise ValueError("\n".join(("torch.nn has not what these modules are; nothing was changed:", *lines)))
    notes = {module: _lost(module) if to == "torch" else "" for module in donors}
    for module, donor in donors.items():
        _become(module, donor)
    return Conversion(to, tuple(Replaced(tuple(names[m]), m, notes[m]) for m in donors), tuple(left))


def _shown(names: tuple[str, ...]) -> str:
    return ", ".join(name or "the model" for name in names)


def _check_options(to: str, options: dict[str, Any]) -> None:
    """Raises TypeError for what is an option of no class."""
    if to == "torch" and options:
        raise TypeError(f"torch.nn's layers take none of {', '.join(options)}: convert to 'torch' without options")
    known = {name for ours in BACK for name in _taken(ours)}
    if unknown := options.keys() - known:
        near = meant(min(unknown), (*known, "to")) or ";"
        raise TypeError(
            f"convert got an unexpected option {min(unknown)!r}{near} the layers take {', '.join(sorted(known))}"
        )


def _taken(ours: type[nn.Module]) -> set[str]:
    """The options of a class beyond the arguments of torch.nn's."""
    return inspect.signature(ours).parameters.keys() - {*layer_options.OF_TORCH, "nonlinearity", "proj_size"}


def _concerns(module: nn.Module, to: str, options: dict[str, Any]) -> bool:
    """Whether a report has to name a module: it is a recurrent layer, or was one when somebody quantized or compiled
    it, and not what it shall be. What was never this library's stays on the way back, whatever it is."""
    if isinstance(module, RecurrenceHolder):
        return to == "torch" or bool(options)
    if to == "torch" or isinstance(module, (nn.RNNBase, RNNCellBase)):
        return to != "torch"
    name = getattr(module, "original_name", type(module).__name__)  # of what torch.jit.script made
    return _is_foreign(module) and name in {theirs.__name__ for theirs in TWINS}


def _is_foreign(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule) or type(module).__module__.startswith("torch.ao.")


def _obstacle(module: nn.Module) -> str | None:
    """Why a module is none that can be converted, in either direction."""
    if _is_foreign(module):
        return "compiled or quantized: convert the model before"
    if parametrize.is_parametrized(module):
        return "parametrized: convert before parametrizing, or remove the parametrizations"
    if isinstance(module, sequence.Recurrent):
        return f"the recurrence {module.recurrence.name}"
    if type(module) not in TWINS and type(module) not in BACK:
        base = next((base for base in type(module).__mro__ if base in TWINS or base in BACK), nn.RNNBase)
        return f"a subclass of {'gpu_rnn' if base in BACK else 'torch.nn'}.{base.__name__}: change its base class"
    if "forward" in vars(module):
        return "whose forward somebody replaced: undo that, convert, and do it again"
    return None


def _not_taken(module: nn.Module, options: dict[str, Any]) -> str | None:
    """The options that the new class has not, or not for what the module is."""
    if isinstance(module, RecurrenceHolder):
        return "gpu_rnn's already: set its attributes"
    ours = TWINS[type(module)]
    if unknown := sorted(options.keys() - _taken(ours)):
        return f"{ours.__name__} has no {', '.join(unknown)}"
    if options.get("heads", 1) != 1:
        return "whose weights have other shapes than those of heads"
    if options.get("activation") is not None and getattr(module, "nonlinearity", "tanh") != "tanh":
        return "made with nonlinearity='relu', which activation would replace"
    return None


def _beyond_torch(module: Any) -> str | None:
    """What a layer of this library is that torch.nn's are not."""
    before = {name for name in layer_options.DEFAULTS if name.endswith("_initializer")} | {"unit_forget_bias"}
    dropped = before if module.training else before | ONLY_IN_TRAINING
    extra = [f"{name}={value!r}" for name, value in _changed(module).items() if name not in dropped]
    if not extra and module.recurrence.aten is None:
        extra = [f"the recurrence {module.recurrence.name}"]
    return ", ".join(extra) or None


def _changed(module: Any) -> dict[str, Any]:
    """The options that are not torch.nn's, with their values."""
    changed = {name: value for name, value in module._shown.items() if name != "backend"}
    if module.recurrence.aten is not None:
        changed.pop("activation", None)  # "relu" of an RNN
    if isinstance(module, sequence.LayerBase):
        plain = layer_options.defaults(module.recurrence)
        changed |= {name: getattr(module, name) for name in plain if getattr(module, name) != plain[name]}
    return changed


def _lost(module: nn.Module) -> str:
    changed = [f"{name}={getattr(value, '__name__', value)}" for name, value in _changed(module).items()]
    return f"without {', '.join(changed)}" if changed else ""


def _donor(module: Any, to: str, options: dict[str, Any]) -> nn.Module:
    """A module of the new class with the sizes of the old, without weights but for those that it alone has."""
    new = (TWINS if to == "gpu_rnn" else BACK)[type(module)]
    weight = next(module.parameters(recurse=False), torch.empty(()))
    real = any(options.get(name) for name in MADE_FOR)
    donor: Any = new(**_arguments(module, new), **options, device=weight.device if real else "meta", dtype=weight.dtype)
    if hasattr(module, "dropout"):
        donor.dropout = module.dropout
    return donor


def _arguments(module: Any, kind: type[nn.Module]) -> dict[str, Any]:
    """What a constructor takes for the sizes of a module."""
    arguments = {name: getattr(module, name) for name in SHARED if hasattr(module, name)}
    if kind not in (nn.LSTM, sequence.LSTM):
        arguments.pop("proj_size", None)
    if kind.__name__ in ("RNN", "RNNCell"):
        relu = getattr(module, "recurrence", None) is not None and module.recurrence.aten == "RNN_RELU"
        arguments["nonlinearity"] = "relu" if relu else module.nonlinearity
    return arguments


def _become(module: nn.Module, donor: nn.Module) -> None:
    """Gives a module the class of the donor, and what that class's constructor sets; all else is the module's own."""
    machinery = vars(nn.Module())
    set_by_class = vars(type(module)(**_arguments(module, type(module)), device="meta"))
    replaced = (set_by_class.keys() - machinery.keys()) | {"_stacks"}
    own = {name: value for name, value in vars(module).items() if name not in replaced}
    of_donor = {name: value for name, value in vars(donor).items() if name not in machinery}
    module.__class__ = type(donor)
    vars(module).clear()
    vars(module).update(own | of_donor)
    added = {n: p for n, p in donor.named_parameters(recurse=False) if not hasattr(module, n) and not p.is_meta}
    for name, parameter in (added | dict(module.named_parameters(recurse=False, remove_duplicate=False))).items():
        setattr(module, name, parameter)  # torch.nn's layers keep a list of their weights, too
