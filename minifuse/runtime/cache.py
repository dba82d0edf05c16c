"""Files by content on disk: what was compiled once is loaded the next time.

An entry is one file, `KEY-CHECKSUM.bin`: the checksum of its bytes stands in its name, so that the file itself
stays a library that the loader can map, and a damaged, truncated or swapped entry is seen before use.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import re
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not on every system
    fcntl: Any = None  # type: ignore[no-redef]

DEFAULT_LIMIT = 2 << 30
_KEY = re.compile(r"[A-Za-z0-9_.]+")


def default_dir() -> str:
    """$MINIFUSE_CACHE_DIR, else $XDG_CACHE_HOME/minifuse, else ~/.cache/minifuse."""
    if chosen := os.environ.get("MINIFUSE_CACHE_DIR"):
        return chosen
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "minifuse")


def write_atomically(path: Path, data: bytes) -> None:
    """The whole file or none of it, in place of an older one. Raises OSError."""
    handle, temporary = tempfile.mkstemp(prefix=".new-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


class DiskCache:
    """Bytes by key in a directory (None: `default_dir()`), at most about `limit_bytes` of them.

    Safe between threads and processes: an entry appears whole, by a rename. A directory that cannot be made or
    written, or that belongs to another user, is replaced by a private temporary one, with one warning.
    """

    def __init__(self, dir: str | os.PathLike[str] | None = None, limit_bytes: int = DEFAULT_LIMIT) -> None:
        self.limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._fallback: tempfile.TemporaryDirectory[str] | None = None
        self._dir = Path(os.path.expanduser(default_dir() if dir is None else os.fspath(dir)))
        wrong = problem(self._dir)
        if wrong:
            self._fall_back(wrong)

    @property
    def dir(self) -> Path:
        """Where entries are now."""
        return self._dir

    def get(self, key: str) -> str | None:
        """The path of an entry with these bytes intact, or None. A damaged entry is removed."""
        return next((str(path) for path in self._entries(key) if self.read(path) is not None), None)

    def read(self, path: Path) -> bytes | None:
        """The bytes of an entry, intact, or None. A damaged entry is removed."""
        try:
            data = path.read_bytes()
        except OSError:
            return None
        intact = _checksum(data) == path.stem.rpartition("-")[2]
        with contextlib.suppress(OSError):
            if intact:
                os.utime(path)  # eviction is by age since last use
            else:
                path.unlink()
        return data if intact else None

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Inside, no other process holds this lock; where the file system has no locks, all go on."""
        with contextlib.ExitStack() as held:
            with contextlib.suppress(OSError, AttributeError):
                file = held.enter_context(open(self._dir / f".{name}.lock", "w"))
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def having(self, start: str) -> list[Path]:
        """The entries whose keys begin so, whatever their bytes."""
        return sorted(self._dir.glob(f"{glob.escape(start)}*.bin"))

    def put(self, key: str, data: bytes) -> str | None:
        """Store bytes; their path, or None when no directory at all takes them. Replaces an older entry."""
        if not _KEY.fullmatch(key):
            raise ValueError(f"a cache key is letters, digits, '_' and '.', found {key!r}")
        try:
            path = self._write(key, data)
        except OSError as error:
            self._fall_back(f"{error.strerror or error} in {self._dir}")
            try:
                path = self._write(key, data)
            except OSError:
                return None
        self._evict(keep=path)
        return str(path)

    def _entries(self, key: str) -> list[Path]:
        if not _KEY.fullmatch(key):
            raise ValueError(f"a cache key is letters, digits, '_' and '.', found {key!r}")
        return sorted(self._dir.glob(f"{key}-*.bin"))

    def _write(self, key: str, data: bytes) -> Path:
        target = self._dir / f"{key}-{_checksum(data)}.bin"
        write_atomically(target, data)
        for old in self._entries(key):
            if old != target:
                with contextlib.suppress(OSError):
                    old.unlink()
        return target

    def _evict(self, keep: Path) -> None:
        """Remove the entries used longest ago until the rest fits; a mapped library outlives its file."""
        found = []
        with contextlib.suppress(OSError):
            for item in os.scandir(self._dir):
                with contextlib.suppress(OSError):
                    stat = item.stat()
                    if item.name.endswith(".bin"):
                        found.append((stat.st_mtime, stat.st_size, item.path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.limit_bytes:
                return
            if path != str(keep):
                with contextlib.suppress(OSError):
                    os.unlink(path)
                total -= size

    def _fall_back(self, why: str) -> None:
        with self._lock:
            if self._fallback is not None:
                return
            self._fallback = tempfile.TemporaryDirectory(prefix="minifuse-cache-", ignore_cleanup_errors=True)
            self._dir = Path(self._fallback.name)
        warnings.warn(f"minifuse compiles anew in every process: {why}", stacklevel=3)


def problem(folder: Path) -> str:
    """Make a directory for this user only; empty when it is usable, else what is wrong with it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        stat = folder.stat()
    except OSError as error:
        return f"{error.strerror or error}: {folder}"
    if hasattr(os, "geteuid") and stat.st_uid != os.geteuid():
        return f"{folder} belongs to user {stat.st_uid}"
    if stat.st_mode & 0o022:
        return f"others may write to {folder}"
    return "" if os.access(folder, os.W_OK | os.X_OK) else f"{folder} is read-only"


def _checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
