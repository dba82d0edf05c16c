"""Memory that stays warm: arenas leased for a call, and tensors whose piece comes back when they die.

Fresh pages cost more than the arithmetic on them (`clone` of 64 MB takes 18.8 ms, `copy_` into warm memory 2.8),
so memory is kept and handed out again. It comes from the system in segments of the size asked; a segment is split
into pieces when less is wanted of it, and free neighbours coalesce. What lies idle beyond what was once in use goes
back: a segment whole, of one in use the pages of its free pieces. CPU only; on CUDA, PyTorch's caching allocator does
the same.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import sys
import time
import weakref
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import numpy as np
import torch

from minifuse import compat
from minifuse.forks import renewed
from minifuse.passes.memory import POOLED_BYTES

# Below this many bytes torch's allocator is used: malloc keeps such pieces warm itself once it has grown, and wrapping
# a piece costs 4 us against 1.2. Writing one of four tensors in turn, fresh against pooled (us): 64 KiB 4 and 7,
# 1 MiB 64 and 71, 4 MiB 384 and 352, 64 MiB 31,000 and 11,900.
SMALL = POOLED_BYTES
# Segments unused for this many seconds go back to the system when the pool next asks it for memory.
MAX_AGE = 30.0
# Beyond what was in use at most, here and beside the pool, one part in so many may be held: fewer bytes where a step is
# asked to keep within a limit. Pages that went back and came again took 3 to 9% of a step of GPT-2 and Llama at 1/32.
SLACK, EASY = 128, 8
# The bytes of a piece are a multiple of this, so that nearly equal requests find each other's pieces.
PAGE = 4096
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
# A rest of so many bytes is worth a piece of its own. Tensors have 16 times as much, so that a smaller rest serves
# arenas alone and is waste of 1/16 at most; arenas smaller than this do not split what a tensor may want.
KEEP = SMALL // 16


class _Tenant(np.ndarray):
    """The bytes that one tensor has of a piece. torch's storage owns it alone, so it dies with the storage."""

    def __del__(self) -> None:
        piece = getattr(self, "piece", None)
        if piece is not None:
            piece.give_back()


class _Piece:
    """A 64-byte aligned part of a segment, `offset` bytes into it, between its neighbours `below` and `above`.

    Of one that is free the first `warm` bytes have memory behind them. `memo` is for what a user of the memory wants
    to find again with it, by user; it goes when the piece changes.
    """

    __slots__ = (
        "_memo", "_tensor", "above", "address", "array", "below", "free", "offset", "returned", "segment", "since",
        "size", "warm",
    )  # fmt: skip

    def __init__(self, segment: torch.Tensor, array: np.ndarray, returned: deque[_Piece]) -> None:
        self.segment = segment
        self.array = array
        self.returned = returned
        self.address: int = segment.data_ptr()
        self.offset = 0
        self.below: _Piece | None = None
        self.above: _Piece | None = None
        self.free = False
        self.since = 0.0
        self.warm = segment.nbytes
        self.resize(segment.nbytes)

    def resize(self, size: int) -> None:
        self.size = size
        self._tensor: torch.Tensor | None = None
        self._memo: weakref.WeakKeyDictionary[Any, Any] | None = None

    @property
    def tensor(self) -> torch.Tensor:
        if self._tensor is None:
            self._tensor = self.segment[self.offset : self.offset + self.size]
        return self._tensor

    @property
    def memo(self) -> weakref.WeakKeyDictionary[Any, Any]:
        if self._memo is None:
            self._memo = weakref.WeakKeyDictionary()
        return self._memo

    @property
    def whole(self) -> bool:
        """Whether this is all of its segment."""
        return self.below is None and self.above is None

    def split(self, size: int) -> _Piece:
        """Keep the first `size` bytes; the rest becomes a piece, which is returned."""
        rest = _Piece(self.segment, self.array, self.returned)
        rest.address = self.address + size
        rest.offset = self.offset + size
        rest.resize(self.size - size)
        rest.since = self.since
        rest.warm = max(self.warm - size, 0)
        self.warm = min(self.warm, size)
        rest.below, rest.above, self.above = self, self.above, rest
        if rest.above is not None:
            rest.above.below = rest
        self.resize(size)
        return rest

    def absorb(self, above: _Piece) -> None:
        """Take the neighbour's memory over; both are free."""
        self.warm += above.warm
        self.above = above.above
        if self.above is not None:
            self.above.below = self
        self.since = max(self.since, above.since)
        self.resize(self.size + above.size)

    def cool(self, nbytes: int) -> int:
        """Give the last pages of what is warm back to the system, of so many bytes; how many went. The address stays,
        and has memory again when it is written to."""
        keep = max(self.warm - nbytes, 0)
        begin = -(-(self.address + keep) // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (self.address + self.warm) // mmap.PAGESIZE * mmap.PAGESIZE - begin
        if LIBC is None or length <= 0:
            return 0
        if LIBC.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), mmap.MADV_DONTNEED):
            return 0
        went, self.warm = self.warm - keep, keep
        return went

    def give_back(self) -> None:
        # Runs in finalisers, on any thread, perhaps inside the pool's own code: it takes no lock and changes nothing
        # that the pool reads; appending is atomic.
        self.since = time.monotonic()
        self.returned.append(self)


class Lease:
    """An arena for one call: `tensor`, uint8, aligned to 64 bytes, at least as long as asked.

    `release()` gives it back, once; so does leaving a `with` block, or the death of the lease.
    """

    __slots__ = ("_piece", "nbytes")

    def __init__(self, piece: _Piece, nbytes: int) -> None:
        self._piece: _Piece | None = piece
        self.nbytes = nbytes

    @property
    def tensor(self) -> torch.Tensor:
        """The memory. Raises RuntimeError after the release."""
        return self._held().tensor

    @property
    def memo(self) -> weakref.WeakKeyDictionary[Any, Any]:
        """What users of this memory left to be found with it."""
        return self._held().memo

    def _held(self) -> _Piece:
        if self._piece is None:
            raise RuntimeError("this lease has been released; its memory may serve another call")
        return self._piece

    def release(self) -> None:
        piece, self._piece = self._piece, None
        if piece is not None:
            piece.give_back()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()

    def __del__(self) -> None:
        if getattr(self, "_piece", None) is not None:
            self.release()


class Pool:
    """CPU memory in segments, split and coalesced: best fit (Knuth, TAOCP 1, section 2.5).

    Safe between threads; a forked child has its own copy. `limit_bytes`: how much may lie unused; beyond it the
    free segments unused longest go back to the system.
    """

    def __init__(self, limit_bytes: int = 4 << 30) -> None:
        self.limit_bytes = limit_bytes
        self._lock = renewed(self, "_lock")
        self._forget()

    def _forget(self) -> None:
        """Begin anew. Pieces in use live on, and their segments go when they all have died."""
        self._returned: deque[_Piece] = deque()  # given back, and not yet in `_free`
        self._free: dict[int, dict[int, _Piece]] = {}  # by size, then by address
        self._sizes: list[int] = []  # the keys of `_free`, ascending
        self._kept: set[int] = set()  # segments of these sizes are not split
        self._held = self._used = self._most = 0
        self._total = self._beside = 0  # the most that calls held, and what the last holds beside the pool
        self._slack = EASY
        self._torn = False

    @property
    def held_bytes(self) -> int:
        """Bytes that the pool has from the system, in use or not."""
        return self._counts()[0]

    @property
    def free_bytes(self) -> int:
        """Bytes that wait for their next use."""
        held, used = self._counts()
        return held - used

    @property
    def used_bytes(self) -> int:
        """Bytes of pieces under leases and living tensors."""
        return self._counts()[1]

    def _counts(self) -> tuple[int, int]:
        with self._lock:
            self._begin()
            self._settle()
            self._torn = False
            return self._held, self._used

    def lease(self, nbytes: int) -> Lease:
        """An arena of at least `nbytes` bytes, contents undefined."""
        return Lease(self._take(nbytes), nbytes)

    def tensor(self, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor, like `torch.empty_strided`, over a piece that returns when its storage dies.

        Whatever holds the storage (views, detached aliases, saved tensors, numpy arrays of it) holds the piece.
        The storage cannot grow: `resize_` to more bytes raises, as for any tensor over foreign memory.
        """
        count = 1
        for n, s in zip(shape, stride):
            if n == 0:
                return compat.empty_strided_cpu(shape, stride, dtype)
            count += (n - 1) * s
        nbytes = count * dtype.itemsize
        if nbytes < SMALL:
            return compat.empty_strided_cpu(shape, stride, dtype)
        return self._over(self._take(nbytes), nbytes, shape, stride, dtype)

    @staticmethod
    def _over(
        piece: _Piece, nbytes: int, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype
    ) -> torch.Tensor:
        """A tensor whose death gives the piece back."""
        tenant = np.ndarray.__new__(_Tenant, (nbytes,), np.uint8, piece.array, piece.offset)
        tenant.piece = piece
        flat = torch.frombuffer(tenant, dtype=dtype)
        return flat.set_(flat.untyped_storage(), 0, shape, stride)

    def lend(self, nbytes: int) -> None:
        """Give a free segment of about this size back to the system, where there is one, or what else lies idle where
        too much would: an operator is about to allocate as much for its result, which `own` brings back."""
        if nbytes < SMALL:
            return
        size = -(-nbytes // PAGE) * PAGE
        with self._lock:
            self._begin()
            self._settle()
            at = bisect_left(self._sizes, size)
            near = itertools.takewhile(lambda s: s <= size + size // SLACK, self._sizes[at:])
            piece = next((p for s in near for p in self._free[s].values() if p.whole), None)
            if piece is not None:
                self._remove(piece)
                self._held -= piece.warm
            if self._held + size > self._bound():
                self._shrink(MAX_AGE, self._bound() - self._used - size)
            self._torn = False

    def expect(self, peak: int, given: int, limited: bool) -> None:
        """A call begins that holds `peak` bytes at most, the pool's and others, `given` of them the pool's already.
        `limited`: it is to hold little more, at the price of fresh pages."""
        self._beside, self._slack = 0, SLACK if limited else EASY
        with self._lock:
            self._begin()
            self._settle()
            self._total = max(self._total, self._used - given + peak)
            self._torn = False

    def beside(self, nbytes: int) -> None:
        """A call holds so many bytes that are not the pool's from here on: what lies idle makes room for them."""
        self._beside = nbytes
        if self._held > self._bound():
            with self._lock:
                self._begin()
                self._settle()
                self._torn = False

    def own(self, x: torch.Tensor) -> torch.Tensor:
        """A result that nobody else holds, as a tensor over the same memory, which is the pool's from here on."""
        storage = x.untyped_storage()
        if storage.nbytes() < SMALL or x.storage_offset():
            return x
        segment = torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage)
        with self._lock:
            self._begin()
            piece = _Piece(segment, segment.numpy(), self._returned)
            self._held += piece.size
            self._used += piece.size
            self._most = max(self._most, self._used)
            if self._held > self._bound():
                self._shrink(MAX_AGE, self._bound() - self._used)
            self._torn = False
        return self._over(piece, piece.size, x.size(), x.stride(), x.dtype)

    def trim(self, max_age: float = 0.0, limit_bytes: int = 0) -> int:
        """Give free segments back to the system: those unused for `max_age` seconds, and the oldest of the others
        while more than `limit_bytes` lie unused. Until more is in use together the pool holds no more than it does now.
        Returns the bytes given back."""
        with self._lock:
            self._begin()
            self._settle()
            before = self._held
            self._shrink(max_age, limit_bytes)
            given = before - self._held
            self._most = min(self._most, self._held)
            self._total = min(self._total, self._held)
            self._torn = False
        return given

    def _take(self, nbytes: int) -> _Piece:
        size = -(-max(nbytes, 1) // PAGE) * PAGE
        with self._lock:
            self._begin()
            piece = self._last(size)
            if piece is None:
                self._settle()
                piece = self._fit(size) or self._fresh(size)
                self._used += piece.size
                if self._used > self._most:
                    self._most = self._used
                if piece.warm < piece.size:
                    self._held += piece.size - piece.warm
                    piece.warm = piece.size
                    if self._held > self._bound():
                        self._shrink(MAX_AGE, self._bound() - self._used)
            self._torn = False
        return piece

    # What follows runs under the lock, between `_begin` and `_torn = False`.
    def _begin(self) -> None:
        if self._torn:  # an interrupt, or a fork while another thread was inside, left a change half made
            self._forget()
        self._torn = True

    def _last(self, size: int) -> _Piece | None:
        """The piece given back last, if it has this size: warm, with its memo, and still counted as in use."""
        if self._returned:
            piece = self._returned.pop()
            if piece.size == size:
                return piece
            self._returned.append(piece)
        return None

    def _settle(self) -> None:
        """Put the pieces given back among the free ones, each as one with its free neighbours."""
        returned = self._returned
        while returned:
            piece = returned.popleft()
            self._used -= piece.size
            below, above = piece.below, piece.above
            if above is not None and above.free:
                piece = self._join(piece, above)
            if below is not None and below.free:
                piece = self._join(below, piece)
            self._insert(piece)
        if self._held > self._bound():
            self._shrink(MAX_AGE, self._bound() - self._used)

    def _join(self, below: _Piece, above: _Piece) -> _Piece:
        """Two free neighbours as one, which has what is warm in front: else the upper one's goes."""
        for piece in (below, above):
            if piece.free:
                self._remove(piece)
        if below.warm < below.size and above.warm:
            self._held -= above.warm
            above.cool(above.warm)
            above.warm = 0
        below.absorb(above)
        return below

    def _bound(self) -> int:
        """The bytes that may be held: near what was once in use together, here and beside the pool."""
        most = self._most + self._most // self._slack
        return min(most, self._total + self._total // self._slack - self._beside) if self._beside else most

    def _insert(self, piece: _Piece) -> None:
        piece.free = True
        size = piece.size
        same = self._free.get(size)
        if same is None:
            self._free[size] = {piece.address: piece}
            insort(self._sizes, size)
        else:
            same[piece.address] = piece

    def _remove(self, piece: _Piece) -> None:
        piece.free = False
        size = piece.size
        same = self._free[size]
        del same[piece.address]
        if not same:
            del self._free[size], self._sizes[bisect_left(self._sizes, size)]

    def _fit(self, size: int) -> _Piece | None:
        """The piece of this size given back last, or else the first of the next size, split if its rest is worth it."""
        same = self._free.get(size)
        if same is not None:
            piece = same[next(reversed(same))]
            self._remove(piece)
            return piece
        for larger in self._sizes[bisect_left(self._sizes, size) :]:
            same = self._free[larger]
            piece = same[min(same)]
            if larger - size < KEEP:
                self._remove(piece)
                return piece
            if size >= KEEP and not (piece.whole and larger in self._kept):
                self._remove(piece)
                self._insert(piece.split(size))
                return piece
        return None

    def _fresh(self, size: int) -> _Piece:
        """A segment from the system; free segments of other sizes go first. Where more is held nevertheless than was
        once in use together, parts of segments lie idle: segments of their sizes are not split again."""
        used = self._used + size
        seen, self._most = self._most, max(self._most, used)
        self._shrink(MAX_AGE, min(self.limit_bytes, self._bound() - used))
        if used <= seen and self._held + size > self._bound():
            self._kept.update(p.segment.nbytes for same in self._free.values() for p in same.values())
        try:
            segment = torch.empty(size, dtype=torch.uint8, device="cpu")
        except RuntimeError:  # no memory: the pool is whole, and goes on
            self._most, self._torn = seen, False
            raise
        self._held += size
        return _Piece(segment, segment.numpy(), self._returned)

    def _shrink(self, max_age: float, limit_bytes: int) -> None:
        """Give free memory back as `trim` says: segments, and the pages of pieces of those in use."""
        now = time.monotonic()
        for piece in sorted((p for same in self._free.values() for p in same.values()), key=lambda p: p.since):
            over = self._held - self._used - limit_bytes
            aged = now - piece.since >= max_age
            if not aged and over <= 0:
                break
            if piece.whole and (aged or 2 * over >= piece.warm):
                self._remove(piece)
                self._held -= piece.warm
            else:
                self._held -= piece.cool(piece.warm if aged else over)
