# SPDX-License-Identifier: Apache-2.0
"""Names that are misspelt, and which were perhaps meant."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])
UNKNOWN = re.compile(r"unexpected keyword argument '(\w+)'")


def meant(name: str, known: Iterable[str]) -> str:
    """Words that go on a message: the known name that is spelt alike, or none."""
    import difflib  # where one is misspelt, and not with the package

    near = difflib.get_close_matches(name, [*known], 1, cutoff=0.7)
    return f"; did you mean {near[0]}?" if near else ""


def among(name: str, known: Iterable[str]) -> str:
    """Likewise, and all that are known where none is spelt alike."""
    return meant(name, known := [*known]) or f"; it takes {', '.join(known)}"


def unexpected(who: str, unknown: Iterable[str], known: Iterable[str]) -> TypeError:
    """The error for keyword arguments that `who` does not take, as Python words it. For what is called often, and so
    takes `**unknown` itself instead of being decorated."""
    name = min(unknown)
    return TypeError(f"{who} got an unexpected keyword argument {name!r}{meant(name, known)}")


def names_meant(function: F) -> F:
    """A decorator: Python's error for an argument that a function does not take says which was perhaps meant.

    Not for what is called often: it is a call more.
    """
    known = [name for name in inspect.signature(function).parameters if name != "self"]

    @wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        try:
            return function(*args, **options)
        except TypeError as error:
            unknown = UNKNOWN.search(str(error))
            if unknown is None or error.__traceback__ is None or error.__traceback__.tb_next is not None:
                raise  # from inside
            raise TypeError(f"{error}{among(unknown[1], known)}") from None

    return call  # type: ignore[return-value]
