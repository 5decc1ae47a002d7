# SPDX-License-Identifier: Apache-2.0
"""A property that is computed at its first use, without a lock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

T = TypeVar("T")


class once(Generic[T]):
    """`functools.cached_property` without the lock that Python 3.11 holds meanwhile: a process forked by another thread
    would find it held for ever. Two threads may both compute the value, so it must be the same for both.
    """

    def __init__(self, function: Callable[[Any], T]) -> None:
        self.function, self.__doc__ = function, function.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> once[T]: ...

    @overload
    def __get__(self, instance: Any, owner: type) -> T: ...

    def __get__(self, instance: Any, owner: type) -> T | once[T]:
        if instance is None:
            return self
        value: T = self.function(instance)
        return instance.__dict__.setdefault(self.name, value)
