# SPDX-License-Identifier: Apache-2.0
"""Each class says in its own docstring what all of its arguments are: what several share stands in one place, and is
written into the others for help(). Python's own errors name the class, too.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any, TypeVar

from gpu_rnn.layers.options import DEFAULTS, LayerOptions

C = TypeVar("C", bound=type)
ENTRY = re.compile(r"    ([a-z][\w, ]*): ")  # of one argument, or of several
ELSEWHERE = re.compile(r": as for `|    options: ")  # an entry that stands for those of another class


def _section(doc: str, title: str) -> list[str]:
    """The lines of a section, indented as they are."""
    lines = doc.splitlines()
    start = lines.index(f"{title}:") + 1
    end = next((n for n in range(start, len(lines)) if not lines[n].startswith(" ")), len(lines))
    return lines[start:end]


def _entries(documented: Any, title: str) -> Iterator[tuple[set[str], list[str]]]:
    """Of each entry of a section the arguments, and its lines."""
    names: set[str] = set()
    text: list[str] = []
    for line in _section(inspect.getdoc(documented) or "", title):
        entry = ENTRY.match(line)
        if entry and text:
            yield names, text
            text = []
        if entry:
            names = {word for word in re.split(r", | and ", entry.group(1)) if " " not in word}
        text.append(line)
    yield names, text


def _elsewhere(cls: type, shared: type, names: set[str]) -> Iterator[str]:
    """The lines that an entry stands for: those of another class, of the options, or of all arguments not named."""
    taken = set(inspect.signature(cls.__init__).parameters)  # type: ignore[misc]
    described = {name for each, text in _entries(cls, "Args") for name in each if not ELSEWHERE.search(text[0])}
    for each, text in _entries(shared, "Args"):
        wanted = names if "options" not in names else taken - described
        if each & wanted and "options" not in each and shared is not cls:
            yield from text
    if "options" in names:
        for _, text in _entries(LayerOptions, "Attributes"):
            yield from text


def _own_forward(cls: type) -> FunctionType:
    """The inherited `forward` under the class's name, which Python's errors show: of a misspelt argument it says
    "LSTM.forward() got an unexpected keyword argument"."""
    inherited: FunctionType = cls.forward  # type: ignore[attr-defined]
    own = FunctionType(
        inherited.__code__, inherited.__globals__, "forward", inherited.__defaults__, inherited.__closure__
    )
    own.__kwdefaults__, own.__annotations__ = inherited.__kwdefaults__, inherited.__annotations__
    own.__doc__, own.__module__ = inherited.__doc__, inherited.__module__
    own.__qualname__ = f"{cls.__qualname__}.forward"
    return own


def _spelt_out(cls: type) -> inspect.Signature:
    """Of a constructor, with each of `LayerOptions` by its name where it takes them."""
    parameters = [*inspect.signature(cls.__init__).parameters.values()]  # type: ignore[misc]
    if parameters[-1].name == "options":
        named = inspect.Parameter("option", inspect.Parameter.KEYWORD_ONLY)
        types = {name: hint.__forward_arg__ for name, hint in LayerOptions.__annotations__.items()}
        parameters.pop()
        parameters += [named.replace(name=name, default=DEFAULTS[name], annotation=types[name]) for name in DEFAULTS]
    return inspect.Signature(parameters, return_annotation="None")


def in_full(shared: type | None = None) -> Callable[[C], C]:
    """A class decorator: what the docstring says to be "as for" `shared` is written out, and the arguments of a
    call; its `forward` has its name, and its constructor's signature every option."""

    def decorate(cls: C) -> C:
        cls.forward = _own_forward(cls)  # type: ignore[attr-defined]
        if doc := inspect.cleandoc(cls.__doc__ or ""):  # none under python -OO
            cls.__doc__ = _written_out(cls, shared or cls, doc)
        cls.__init__.__signature__ = _spelt_out(cls)  # type: ignore[misc]
        cls.__init__.__doc__ = f"Its arguments are in the docstring of {cls.__name__}."  # type: ignore[misc]
        return cls

    return decorate


def _written_out(cls: type, shared: type, doc: str) -> str:
    lines: list[str] = []
    for names, text in _entries(cls, "Args"):
        lines += _elsewhere(cls, shared, names) if ELSEWHERE.search(text[0]) else text
    lines += ["", "Args of a call:"]
    arguments = _entries(cls.forward, "Args")  # type: ignore[attr-defined]
    lines += [line for names, text in arguments if "further" not in names for line in text]
    return doc.replace("\n".join(_section(doc, "Args")), "\n".join(lines))
