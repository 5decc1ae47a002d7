# SPDX-License-Identifier: Apache-2.0
"""help() of a class says what every argument is, of its constructor and of a call."""

from __future__ import annotations

import inspect
import pydoc

import pytest
from torch import nn

import gpu_rnn
from gpu_rnn.layers.base import LayerBase
from gpu_rnn.layers.options import DEFAULTS

CLASSES = {name: cls for name in gpu_rnn.__all__ if inspect.isclass(cls := getattr(gpu_rnn, name))}


@pytest.mark.parametrize("name", [name for name, cls in CLASSES.items() if not issubclass(cls, Exception)])
def test_every_class_says_what_its_arguments_are(name: str) -> None:
    """A line for each option and each argument of a call, which help() shows."""
    cls = CLASSES[name]
    constructor = inspect.signature(cls).parameters
    assert not [each for each in constructor.values() if each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
    if issubclass(cls, LayerBase):
        assert constructor.keys() >= DEFAULTS.keys()
    shown = pydoc.plain(pydoc.render_doc(cls)).split("Method resolution order")[0]
    assert all(f"{option}: " in shown.split(cls.__doc__.strip()[:20])[0] for option in constructor)
    call = inspect.signature(cls.forward).parameters if issubclass(cls, nn.Module) else {}
    wanted = {*constructor, *call} - {"self", "further", "unknown"}
    starts = [
        line.split(":")[0] for line in inspect.getdoc(cls).splitlines() if line.startswith("    ") and ":" in line
    ]
    said = {word.strip() for start in starts for word in start.split(",")}
    if name in ("RNN", "GRU"):
        wanted.discard("proj_size")  # it is there to be refused
    assert wanted <= said, wanted - said
    assert "as for" not in inspect.getdoc(cls).split("Args of a call")[0]
