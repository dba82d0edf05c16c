"""Properties that are computed once: `functools.cached_property` without the lock that Python 3.11 takes each time."""

from __future__ import annotations

from functools import cached_property
from typing import Any, TypeVar

T = TypeVar("T")


class lazy(cached_property[T]):  # noqa: N801 - a decorator
    """A property whose value stays with its object."""

    def __get__(self, it: Any, owner: Any = None) -> T:  # type: ignore[override]
        found = it.__dict__[self.attrname] = self.func(it)
        return found
