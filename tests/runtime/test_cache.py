from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest

from minifuse.runtime import cache as cache_module
from minifuse.runtime.cache import DiskCache, default_dir


def test_what_was_put_is_found_by_another_cache_of_the_directory(tmp_path: Path) -> None:
    assert DiskCache(tmp_path / "c").get("k") is None
    path = DiskCache(tmp_path / "c").put("k", b"bytes")
    assert path is not None and DiskCache(tmp_path / "c").get("k") == path
    assert Path(path).read_bytes() == b"bytes"


def test_the_directory_is_private(tmp_path: Path) -> None:
    DiskCache(tmp_path / "a" / "b")
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700


@pytest.mark.parametrize("damage", [b"", b"byt", b"byteS", b"bytes and more"])
def test_a_damaged_entry_is_a_miss_and_is_removed(tmp_path: Path, damage: bytes) -> None:
    cache = DiskCache(tmp_path / "c")
    path = cache.put("k", b"bytes")
    assert path is not None
    Path(path).write_bytes(damage)
    assert cache.get("k") is None and not os.path.exists(path)
    assert cache.put("k", b"bytes") == path and cache.get("k") == path


def test_a_second_put_replaces_the_first(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "c")
    cache.put("k", b"one")
    path = cache.put("k", b"two")
    assert cache.get("k") == path and len(os.listdir(tmp_path / "c")) == 1


def test_entries_unused_longest_are_evicted(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "c", limit_bytes=250)
    for age, key in ((300, "a"), (200, "b")):
        path = cache.put(key, key.encode() * 100)
        assert path is not None
        os.utime(path, (time.time() - age,) * 2)
    assert cache.get("a")  # a use makes it young
    cache.put("c", b"c" * 100)
    assert cache.get("a") and cache.get("c") and cache.get("b") is None


def test_an_entry_beyond_the_limit_still_serves(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "c", limit_bytes=10)
    assert cache.put("k", b"x" * 100) and cache.get("k")


def test_a_key_cannot_leave_the_directory(tmp_path: Path) -> None:
    for key in ("../x", "a/b", "", "*"):
        with pytest.raises(ValueError, match="cache key"):
            DiskCache(tmp_path / "c").put(key, b"")


def test_a_directory_that_cannot_be_made_is_replaced_with_one_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="in every process") as caught:
        cache = DiskCache(tmp_path / "file" / "c")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = cache.put("k", b"bytes")
    assert cache.get("k") == path and path is not None
    assert len(caught) == 1
    assert not path.startswith(str(tmp_path / "file"))


def test_a_directory_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module.os, "geteuid", lambda: 12345678)
    with pytest.warns(UserWarning, match="belongs to"):
        cache = DiskCache(tmp_path)
    assert cache.dir != tmp_path


def test_a_directory_that_others_may_write_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.warns(UserWarning, match="others may write"):
        assert DiskCache(tmp_path).dir != tmp_path


def test_a_read_only_directory_and_a_full_disk_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = DiskCache(tmp_path / "c")
    real = cache_module.os.replace

    def full(source: str, target: Path) -> None:
        if str(target).startswith(str(tmp_path)):
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(cache_module.os, "replace", full)
    with pytest.warns(UserWarning, match="No space left"):
        path = cache.put("k", b"bytes")
    assert path is not None and cache.get("k") == path
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.put("l", b"bytes")
    assert os.listdir(tmp_path / "c") == []
    monkeypatch.setattr(cache_module.os, "access", lambda *a: False)
    with pytest.warns(UserWarning, match="read-only"):
        assert DiskCache(tmp_path / "d").put("k", b"bytes")


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = DiskCache(tmp_path / "c")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cache_module.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cache.put("k", b"bytes")
    assert os.listdir(tmp_path / "c") == []


def test_threads_that_race_see_whole_entries(tmp_path: Path) -> None:
    data = {k: k.encode() * 5000 for k in "abcd"}
    wrong: list[str] = []

    def work() -> None:
        cache = DiskCache(tmp_path / "c")
        for _ in range(30):
            for key, value in data.items():
                cache.put(key, value)
                path = cache.get(key)
                if path is None or Path(path).read_bytes() != value:
                    wrong.append(key)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []


def test_two_processes_may_race(tmp_path: Path) -> None:
    script = (
        "import sys; from minifuse.runtime.cache import DiskCache; c = DiskCache(sys.argv[1])\n"
        "for i in range(60):\n"
        "    assert open(c.put('k', b'x' * 9000), 'rb').read() == b'x' * 9000 and c.get('k')"
    )
    runs = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "c")]) for _ in range(2)]
    assert [r.wait() for r in runs] == [0, 0]


def test_the_default_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIFUSE_CACHE_DIR", "/x/y")
    assert default_dir() == "/x/y"
    monkeypatch.delenv("MINIFUSE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert default_dir() == "/xdg/minifuse"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_dir().endswith(".cache/minifuse")


def test_a_good_directory_warns_of_nothing(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DiskCache(tmp_path / "c").put("k", b"")
