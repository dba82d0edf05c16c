"""Locks that a forked child finds free: another thread may have held them at the fork."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import Any


def renewed(owner: Any, name: str, make: Callable[[], Any] = threading.Lock) -> Any:
    """A lock that an object, or a module, has under this name; in a forked child it gets another one."""
    if hasattr(os, "register_at_fork"):
        this = weakref.ref(owner)
        os.register_at_fork(after_in_child=lambda: _renew(this(), name, make))
    return make()


def _renew(owner: Any, name: str, make: Callable[[], Any]) -> None:
    if owner is not None:
        setattr(owner, name, make())
