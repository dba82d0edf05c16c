"""What is made when it is first asked for: properties, as `functools.cached_property` without the lock that Python 3.11
takes each time, and modules that many programs never use."""

from __future__ import annotations

import importlib
from functools import cached_property
from typing import Any, TypeVar

T = TypeVar("T")


class lazy(cached_property[T]):  # noqa: N801 - a decorator
    """A property whose value stays with its object."""

    def __get__(self, it: Any, owner: Any = None) -> T:  # type: ignore[override]
        found = it.__dict__[self.attrname] = self.func(it)
        return found


class Deferred:
    """A module that is imported at its first use: SciPy's take longer than all of minifuse, and not every compile is
    explained."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)
