"""Compiled C units: from this process, from the disk, or from the compiler, and mapped."""

from __future__ import annotations

import contextlib
import functools
import sys
import tempfile
from typing import Any

from minifuse.errors import CompileError
from minifuse.forks import renewed
from minifuse.ir.plan import content_hash

from . import toolchain
from .cache import DiskCache

_loaded: dict[str, Any] = {}
_lock = renewed(sys.modules[__name__], "_lock")


@functools.lru_cache(maxsize=8)
def disk_cache(folder: str | None) -> DiskCache:
    return DiskCache(folder)


class Loading:
    """The library of a unit: from this process, from the disk, or from the compiler, which runs until `result`."""

    def __init__(self, source: str, tools: toolchain.Toolchain, cache_dir: str | None, others: int = 0) -> None:
        self.key, self.seconds = content_hash(tools.key + source), 0.0
        self.cache = disk_cache(cache_dir)
        with _lock:
            self.library = _loaded.get(self.key)
        path = self.cache.get(self.key) if self.library is None else None
        if path is not None:
            with contextlib.suppress(OSError):
                self.library = toolchain.load(path)
        self.compiling = toolchain.Compiling(source, tools, others) if self.library is None else None

    def result(self) -> Any:
        """Raises CompileError."""
        if self.compiling is not None:
            self.library = load_bytes(self.key, self.compiling.result(), self.cache)
            self.seconds, self.compiling = self.compiling.seconds, None
        with _lock:
            _loaded[self.key] = self.library
        return self.library


def load_bytes(key: str, data: bytes, cache: DiskCache) -> Any:
    """The library of these bytes, loaded from its entry in the cache, or, where nothing can be mapped
    there (no space, a mount without execution), from a file that is gone once it is mapped."""
    path = cache.put(key, data)
    if path is not None:
        with contextlib.suppress(OSError):
            return toolchain.load(path)
    try:
        with tempfile.NamedTemporaryFile(prefix="minifuse-", suffix=".so") as file:
            file.write(data)
            file.flush()
            return toolchain.load(file.name)
    except OSError as error:
        raise CompileError(("load", key), str(error), "") from error
