"""A run of kernels on a GPU: all that stand between two operators are started by one call into C.

A kernel's arguments do not change between calls but for addresses, so a run has a table: the driver's function for any
addresses and for those that 16 divides, programs, threads, shared memory, which addresses it takes, and its sizes.
Up to `KEPT` tables are kept, one a size. What the table lacks (a variant that is not compiled yet, a batch, whose
addresses are a table themselves) goes through `Launched`, as all does where there is no C compiler.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from minifuse import compat_triton
from minifuse.errors import CompileError

from . import toolchain
from .loading import Loading

if TYPE_CHECKING:
    from .triton_launch import Launched

KEPT = 64
SOURCE = """#include <stdint.h>

typedef unsigned u;
typedef int (*start_t)(void *f, u gx, u gy, u gz, u bx, u by, u bz, u bytes, void *stream, void **params, void **);

typedef struct {
  void *function[2]; /* for any addresses, for multiples of 16; 0 where Python is asked */
  int64_t shared[2], programs, threads, addresses, sizes;
  const int64_t *at; /* which of the run's addresses */
  int64_t *size;
} entry;

/* Start kernels from the k-th on. Gives n when all have been, the number of one that Python is asked for, or -1 less
   the number of one that the driver does not start. */
__attribute__((visibility("default")))
int64_t mf_start(start_t start, const entry *table, int64_t n, int64_t k, void *const *B, void *stream) {
  static void *none = 0;
  for (; k < n; k++) {
    const entry *e = table + k;
    if (!e->programs) continue;
    void *given[e->addresses + 1], *params[e->addresses + e->sizes + 4];
    uintptr_t bits = 0;
    int64_t p = 0;
    for (; p < e->addresses; p++) {
      given[p] = B[e->at[p]];
      bits |= (uintptr_t)given[p];
      params[p] = given + p;
    }
    for (int64_t z = 0; z < e->sizes; z++) params[p++] = e->size + z; /* a narrower size is the low bytes */
    for (int z = 0; z < 4; z++) params[p++] = &none; /* scratch memory that Triton declares and that none has */
    int aligned = !(bits & 15);
    void *f = e->function[aligned];
    if (!f) return k;
    if (start(f, (u)e->programs, 1, 1, (u)e->threads, 1, 1, (u)e->shared[aligned], stream, params, 0)) return -1 - k;
  }
  return n;
}
"""


class Entry(ctypes.Structure):
    _fields_ = (
        ("function", ctypes.c_void_p * 2),
        ("shared", ctypes.c_int64 * 2),
        *((name, ctypes.c_int64) for name in ("programs", "threads", "addresses", "sizes")),
        ("at", ctypes.c_void_p),
        ("size", ctypes.c_void_p),
    )


@lru_cache(maxsize=4)
def starter(cache_dir: str | None) -> tuple[Any, int] | None:
    """The C function that starts a table's kernels, and the driver's; None where one of them is missing."""
    tools = toolchain.find()
    if tools is None:
        return None
    try:
        function = Loading(SOURCE, tools, cache_dir).result().mf_start
        driver = compat_triton.driver_launch()
    except (CompileError, OSError, AttributeError):
        return None
    function.restype = ctypes.c_int64
    function.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 2 + [ctypes.c_void_p] * 2
    return function, driver


class Table:
    """A run's kernels at known sizes."""

    def __init__(self, run: Run, sizes: tuple[int, ...]) -> None:
        self.entries = (Entry * len(run.launches))()
        self.keep: list[Any] = []
        for entry, one, at in zip(self.entries, run.launches, run.places, strict=True):
            values = tuple([sizes[k] for k in one.at])
            entry.programs = 1 if one.tables is not None else one.programs(values)[0]
            size = [*(values[k] for k in one.given), *one.last]
            given, places = (ctypes.c_int64 * (len(size) + 1))(*size), (ctypes.c_int64 * (len(at) + 1))(*at)
            entry.addresses, entry.sizes = len(at), len(size)
            entry.at, entry.size = ctypes.addressof(places), ctypes.addressof(given)
            self.keep += [given, places]


class Run:
    """Launches that one call starts. `names` are the buffers whose addresses a call takes, in order."""

    def __init__(self, launches: Sequence[Launched], bindings: Sequence[Sequence[str]]) -> None:
        self.launches = launches
        self.names = tuple(dict.fromkeys(name for names in bindings for name in names))
        places = {name: k for k, name in enumerate(self.names)}
        self.places = [[places[name] for name in names] for names in bindings]
        self.tables: dict[tuple[int, ...], Table] = {}
        self.start: tuple[Any, int] | None = None

    def __call__(self, pointers: Any, sizes: Any, stream: int) -> int:
        if self.start is None:
            for k in range(len(self.launches)):
                self.one(k, pointers, sizes, stream)
            return 0
        key = tuple(sizes)
        table = self.tables.get(key)
        if table is None:
            if len(self.tables) >= KEPT:
                self.tables.clear()
            table = self.tables[key] = Table(self, key)
        start, driver = self.start
        k, n = 0, len(self.launches)
        while (k := start(driver, table.entries, n, k, pointers, stream)) != n:
            if k < 0:  # a thread without a context, or a fault: Triton's launcher makes the one and tells the other
                k = -1 - k
                self.one(k, pointers, sizes, stream)
            else:
                aligned = self.one(k, pointers, sizes, stream)
                self.fill(table.entries[k], self.launches[k], key, aligned)
            k += 1
        return 0

    def one(self, k: int, pointers: Any, sizes: Any, stream: int) -> bool:
        """One launch by itself; whether 16 divides its addresses."""
        given = [pointers[j] or 0 for j in self.places[k]]
        self.launches[k](given, sizes, stream)
        return not any(address & 15 for address in given)

    def fill(self, entry: Any, one: Launched, sizes: tuple[int, ...], aligned: bool) -> None:
        """Note what the driver knows of a variant that has just run."""
        handle = one.handle(aligned, tuple([sizes[k] for k in one.at]))
        if handle is not None:
            entry.threads, entry.shared[aligned] = handle.threads, handle.shared
            entry.function[aligned] = handle.function  # last: another thread may be reading
