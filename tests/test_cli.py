"""The command line."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from minifuse.cli import main
from minifuse.runtime.cache import DiskCache


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    cache = DiskCache(tmp_path / "cache")
    cache.put("graph_a.0", b"1" * 3000)
    cache.put("0123456789abcdef", b"2" * 500)
    cache.put("device_b", b"3")
    return tmp_path / "cache"


def test_the_cache_is_shown_by_kind(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "--dir", str(folder)]) == 0
    said = capsys.readouterr().out
    rows = {line.split("  ")[0].strip(): line.split() for line in said.splitlines()[2:]}
    assert rows["compiled graphs"][2:4] == ["1", "3"] and rows["compiled kernels"][2:5] == ["1", "500", "B"]
    assert rows["all"][1] == "3"


def test_entries_are_listed_the_one_used_last_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (old,) = folder.glob("graph_*")
    os.utime(old, (time.time() - 90_000,) * 2)
    assert main(["cache", "list", "--dir", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and "graph_a.0" in lines[-1]


def test_entries_are_cleared_those_of_some_age_or_all(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (old,) = folder.glob("graph_*")
    os.utime(old, (time.time() - 90_000,) * 2)
    assert main(["cache", "clear", "--older", "1", "--dir", str(folder)]) == 0
    assert "1 of 3 entries cleared" in capsys.readouterr().out and not old.exists()
    assert main(["cache", "clear", "--dir", str(folder)]) == 0
    assert not [*folder.glob("*.bin")]


def test_what_is_not_ours_is_not_cleared(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder.chmod(0o777)
    assert main(["cache", "clear", "--dir", str(folder)]) == 1
    assert "others may write" in capsys.readouterr().out and len([*folder.glob("*.bin")]) == 3


def test_nothing_there_is_no_error_and_a_wrong_word_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "--dir", str(tmp_path / "none")]) == 0
    assert "nothing is cached" in capsys.readouterr().out
    for wrong in (["cache", "list", "--older", "3"], ["cash"], ["cache", "clean"]):
        with pytest.raises(SystemExit) as stop:
            main(wrong)
        assert stop.value.code == 2
