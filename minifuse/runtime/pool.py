"""Memory that stays warm: arenas leased for a call, and tensors whose block comes back when they die.

Fresh pages cost more than the arithmetic on them (`clone` of 64 MB takes 18.8 ms, `copy_` into warm memory 2.8),
so blocks are kept and handed out again. CPU only; on CUDA, PyTorch's caching allocator does the same.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any

import numpy as np
import torch

# Below this many bytes torch's allocator is used: malloc keeps such pieces warm itself once it has grown, and wrapping
# a block costs 4 us against 1.2. Writing one of four tensors in turn, fresh against pooled (us): 64 KiB 4 and 7,
# 1 MiB 64 and 71, 4 MiB 384 and 352, 64 MiB 31,000 and 11,900.
SMALL = 1 << 20
# Blocks unused for this many seconds go back to the system when the pool next asks it for memory.
MAX_AGE = 30.0
_STEPS = 8
# A free block of one of the next sizes serves a request that has none of its own.
NEAR_CLASSES = 4
# Beyond what was in use at most, one part in so many may be held.
SLACK = 32


def size_class(nbytes: int) -> int:
    """The bytes of the block that serves a request: eight sizes an octave, so that at most 1/8 is waste; 32 for
    large ones, whose waste would show."""
    if nbytes <= 512:
        return -(-max(nbytes, 1) // 64) * 64
    steps = _STEPS if nbytes < SMALL else 4 * _STEPS
    step = 1 << ((nbytes - 1).bit_length() - steps.bit_length())
    return -(-nbytes // step) * step


class _Tenant(np.ndarray):
    """The bytes that one tensor has of a block. torch's storage owns it alone, so it dies with the storage."""

    def __del__(self) -> None:
        block = getattr(self, "block", None)
        if block is not None:
            block.give_back()


class _Block:
    """A 64-byte aligned piece of memory, in use or in its pool's free list of its size.

    `memo` is for what a user of the block wants to find again with it, by user; it dies with either.
    """

    __slots__ = ("array", "free", "memo", "since", "tensor", "usage")

    def __init__(self, size: int, free: list[_Block], usage: _Usage) -> None:
        self.tensor = torch.empty(size, dtype=torch.uint8)
        self.array = self.tensor.numpy()
        self.free = free
        self.usage = usage
        self.since = 0.0
        self.memo: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    def give_back(self) -> None:
        # Runs in finalisers, on any thread, perhaps inside the pool's own code: the lock is reentrant.
        self.since = time.monotonic()
        self.usage.change(-self.tensor.nbytes)
        self.free.append(self)


class _Usage:
    """Bytes in use, now and at most."""

    __slots__ = ("lock", "most", "now")

    def __init__(self) -> None:
        self.now = self.most = 0
        self.lock = threading.RLock()

    def change(self, nbytes: int) -> None:
        with self.lock:
            self.now += nbytes
            self.most = max(self.most, self.now)


class Lease:
    """An arena for one call: `tensor`, uint8, aligned to 64 bytes, at least as long as asked.

    `release()` gives it back, once; so does leaving a `with` block, or the death of the lease.
    """

    __slots__ = ("_block", "nbytes")

    def __init__(self, block: _Block, nbytes: int) -> None:
        self._block: _Block | None = block
        self.nbytes = nbytes

    @property
    def tensor(self) -> torch.Tensor:
        """The memory. Raises RuntimeError after the release."""
        if self._block is None:
            raise RuntimeError("this lease has been released; its memory may serve another call")
        return self._block.tensor

    @property
    def memo(self) -> weakref.WeakKeyDictionary[Any, Any]:
        """What users of this memory left to be found with it."""
        if self._block is None:
            raise RuntimeError("this lease has been released; its memory may serve another call")
        return self._block.memo

    def release(self) -> None:
        block, self._block = self._block, None
        if block is not None:
            block.give_back()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()

    def __del__(self) -> None:
        if getattr(self, "_block", None) is not None:
            self.release()


class Pool:
    """Blocks of CPU memory by size class. Safe between threads; a forked child has its own copy.

    `limit_bytes`: how much may lie unused; beyond it the blocks unused longest go back to the system.
    """

    def __init__(self, limit_bytes: int = 4 << 30) -> None:
        self.limit_bytes = limit_bytes
        self._free: dict[int, list[_Block]] = {}
        self._held = 0
        self._usage = _Usage()
        self._lock = threading.Lock()
        if hasattr(os, "register_at_fork"):
            this = weakref.ref(self)
            os.register_at_fork(after_in_child=lambda: _renew_lock(this))

    @property
    def held_bytes(self) -> int:
        """Bytes that the pool has from the system, in use or not."""
        return self._held

    @property
    def free_bytes(self) -> int:
        """Bytes of blocks that wait for their next use."""
        return sum(size * len(blocks) for size, blocks in list(self._free.items()))

    @property
    def used_bytes(self) -> int:
        """Bytes of blocks under leases and living tensors."""
        return self._usage.now

    def lease(self, nbytes: int) -> Lease:
        """An arena of at least `nbytes` bytes, contents undefined."""
        return Lease(self._take(nbytes), nbytes)

    def tensor(self, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor, like `torch.empty_strided`, over a block that returns when its storage dies.

        Whatever holds the storage (views, detached aliases, saved tensors, numpy arrays of it) holds the block.
        The storage cannot grow: `resize_` to more bytes raises, as for any tensor over foreign memory.
        """
        count = 1
        for n, s in zip(shape, stride, strict=True):
            if n == 0:
                return torch.empty_strided(shape, stride, dtype=dtype)
            count += (n - 1) * s
        nbytes = count * dtype.itemsize
        if nbytes < SMALL:
            return torch.empty_strided(shape, stride, dtype=dtype)
        block = self._take(nbytes)
        tenant = np.ndarray.__new__(_Tenant, (nbytes,), np.uint8, block.array)
        tenant.block = block
        flat = torch.frombuffer(tenant, dtype=dtype)
        return flat.set_(flat.untyped_storage(), 0, shape, stride)

    def trim(self, max_age: float = 0.0, limit_bytes: int = 0) -> int:
        """Give blocks back to the system: those unused for `max_age` seconds, and the oldest of the others
        while more than `limit_bytes` lie unused. Returns the bytes given back."""
        now, given = time.monotonic(), 0
        with self._lock:
            waiting = sorted((b for blocks in self._free.values() for b in list(blocks)), key=lambda b: b.since)
            unused = sum(b.tensor.nbytes for b in waiting)
            for block in waiting:
                if now - block.since < max_age and unused - given <= limit_bytes:
                    break
                try:
                    block.free.remove(block)
                except ValueError:
                    continue  # another thread took it meanwhile
                given += block.tensor.nbytes
            self._held -= given
        return given

    def _take(self, nbytes: int) -> _Block:
        size = size_class(nbytes)
        block = self._reuse(size) or self._new(size)
        self._usage.change(block.tensor.nbytes)
        return block

    def _reuse(self, size: int) -> _Block | None:
        """A free block of this size, the warmest, or of one of the next sizes."""
        for _ in range(1 + NEAR_CLASSES):
            free = self._free.get(size)
            with suppress(IndexError):  # another thread may take it first
                if free:
                    return free.pop()
            size = size_class(size + 1)
        return None

    def _new(self, size: int) -> _Block:
        """A block from the system. What is held stays near what was once in use together: unused blocks of
        other sizes go first."""
        with self._lock:
            free = self._free.setdefault(size, [])
        if self._held:
            used = self._usage.now + size
            most = max(self._usage.most, used)
            self.trim(MAX_AGE, min(self.limit_bytes, most + most // SLACK - used))
        block = _Block(size, free, self._usage)
        with self._lock:
            self._held += size
        return block


def _renew_lock(pool: weakref.ref[Pool]) -> None:
    """In a forked child: another thread may have held the lock at the fork."""
    found = pool()
    if found is not None:
        found._lock = threading.Lock()
        found._usage.lock = threading.RLock()
