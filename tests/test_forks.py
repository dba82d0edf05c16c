"""A lock that another thread holds at a fork is free in the child."""

from __future__ import annotations

import os
import weakref

import pytest

from minifuse import backend
from minifuse.forks import renewed
from minifuse.runtime import loading, triton_launch


class Owner:
    def __init__(self) -> None:
        self.lock = renewed(self, "lock")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_held_lock_is_free_in_a_child() -> None:
    owner = Owner()
    held = [owner.lock, loading._lock, triton_launch._making]
    for lock in held:
        lock.acquire()
    try:
        child = os.fork()
        if child == 0:
            locks = (owner.lock, loading._lock, triton_launch._making, backend._compiling)
            os._exit(sum(not lock.acquire(blocking=False) for lock in locks))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        for lock in held:
            lock.release()


def test_an_owner_that_is_gone_is_not_kept() -> None:
    owner = weakref.ref(Owner())
    assert owner() is None
