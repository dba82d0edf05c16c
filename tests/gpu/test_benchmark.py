"""The GPU benchmark's frame, which needs no GPU: rows that end their process, tests that fail, and what is written."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, harness, launches
from benchmarks.harness import Sample

BACKENDS = ["eager", "inductor", "minifuse"]
JOBS: Any = dict.fromkeys(("first", "second", "third"), (None, ()))


def figures(name: str) -> tuple[dict[str, Any], None, dict[Any, Any], gpu.Kernels]:
    table = gpu.board(BACKENDS)
    times = {b: Sample.of([0.1, 0.2]) for b in BACKENDS}
    gpu.report(table, name, BACKENDS, times)
    table.add(name, bytes=8, copy=1e9, of_copy=1.0)
    return table.rows[name], None, table.special, {"minifuse": [("k_1", 1.0, 0.1)]}


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Processes that measure; the second job ends its own."""
    started: list[list[str]] = []

    def run(command: list[str], timeout: float) -> Any:
        started.append(command)
        path = Path(command[command.index("--serve") + 1])
        for name in JOBS:
            if name in {n for n, _ in gpu.records(path)}:
                continue
            gpu.append(path, name, None)
            if name == "second":
                return subprocess.CompletedProcess(command, -11)
            gpu.append(path, name, figures(name))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(gpu, "jobs_of", lambda options: JOBS)
    monkeypatch.setattr(gpu.subprocess, "run", run)
    return started


def test_a_row_that_ends_its_process_is_a_failure_and_the_rest_is_measured(processes: list[list[str]]) -> None:
    table, kernels = gpu.measured(argparse.Namespace(seconds=60.0), BACKENDS, time.time() + 60)
    assert [name for name, found in kernels.items() if found] == ["first", "third"]
    assert len(processes) == 2
    assert list(table.rows) == ["first", "second", "third"]
    assert list(table.errors) == ["second"]
    assert table.rows["third"]["vs inductor"] == 1.0


def test_what_there_is_no_time_for_is_named(processes: list[list[str]]) -> None:
    table, _ = gpu.measured(argparse.Namespace(seconds=60.0), BACKENDS, time.time() - 1)
    assert not processes
    assert set(table.errors) == set(JOBS)


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (1, 1)])
def test_tests_that_fail_keep_nothing_from_being_measured(
    code: int, expected: int, processes: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "tested", lambda seconds: {"exit": code, "failed": ["FAILED x"] * code, "last": "done"})
    monkeypatch.setattr(gpu, "driver", lambda: "550.1")
    monkeypatch.setattr(gpu, "launching", lambda: {"triton": 20.0, "minifuse": 2.0})
    monkeypatch.setattr(sys, "argv", ["gpu", "--tests"])
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu.main() == expected
    (path,) = tmp_path.glob("nvidia-h100-80gb-hbm3-*.json")
    found = json.loads(path.read_text())
    assert found["tests"]["exit"] == code
    assert found["gpu"]["driver"] == "550.1"
    assert found["launch_us"] == {"triton": 20.0, "minifuse": 2.0}
    assert found["versions"]["torch"]
    assert set(found["rows"]) == set(JOBS)
    assert f"tests: exit {code}; benchmark: exit 0" in capsys.readouterr().out


def test_the_cost_of_a_launch_is_what_more_kernels_add(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "seconds_of_calls", lambda runs, device: {
        name: 1e-5 + 2e-6 * int(name.split()[1]) for name in runs})  # fmt: skip
    assert launches.measure(torch.device("cpu"), ("minifuse",))["minifuse"] == pytest.approx(2e-6)


def test_what_no_launch_could_be_measured_of_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        raise harness.ProbeError("no device")

    monkeypatch.setattr(harness, "fresh", refuse)
    assert gpu.launching() == "no device"


def test_a_failing_suite_is_reported_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tests" / "gpu").mkdir(parents=True)
    (tmp_path / "tests" / "gpu" / "test_it.py").write_text(
        "import pytest\n@pytest.mark.gpu\ndef test_no():\n    assert False\n"
        "@pytest.mark.gpu\ndef test_yes():\n    pass\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    monkeypatch.chdir(tmp_path)
    found = gpu.tested(120)
    assert found["exit"] == 1
    assert [x.split(" - ")[0] for x in found["failed"]] == ["FAILED tests/gpu/test_it.py::test_no"]
    assert gpu.tested(0.01)["exit"] == 124


def test_a_result_that_is_not_eagers_is_a_failure() -> None:
    x = torch.randn(100)
    gpu.compare((x, {"y": x * (1 + 1e-3)}), (x, {"y": x}))
    with pytest.raises(ValueError, match="off eager's"):
        gpu.compare((x, x * 1.1), (x, x))
    with pytest.raises(ValueError, match="longer"):
        gpu.compare((x,), (x, x))


def test_all_rows_are_compiled_ahead_in_so_many_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    class Process:
        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            started.append(command)

        def wait(self, timeout: float) -> None:
            return None

    monkeypatch.setattr(gpu.subprocess, "Popen", Process)
    monkeypatch.setattr(sys, "argv", ["gpu", "--warm", "3"])
    gpu.warm_up(argparse.Namespace(warm=3), time.time() + 10)
    assert [command[command.index("--compile") + 1] for command in started] == ["0", "1", "2"]
    done: list[str] = []
    monkeypatch.setattr(gpu, "jobs_of", lambda options: {str(k): (None, (gpu.ROWS[k],)) for k in range(7)})
    monkeypatch.setattr(gpu, "inputs_of", lambda row: [])
    monkeypatch.setattr(gpu, "step_of", lambda row, inputs, backend: lambda: done.append(f"{row.name} {backend}"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for part in range(3):
        gpu.compile_part(argparse.Namespace(compile=part, warm=3, until=time.time() + 60), BACKENDS)
    assert sorted(done) == sorted(f"{row.name} {b}" for row in gpu.ROWS[:7] for b in BACKENDS[1:])


def test_the_profiler_looks_at_the_rows_furthest_from_a_copy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    table = gpu.board(BACKENDS)
    for name, share in (("near", 0.9), ("far", 0.1), ("between", 0.5)):
        table.add(name, of_copy=share)
    profiled: list[str] = []
    monkeypatch.setattr(gpu.subprocess, "run", lambda command, **_: profiled.append(command[-1]))
    monkeypatch.setattr(gpu.shutil, "which", lambda tool: None)
    gpu.nsight(table, 2, tmp_path / "x", time.time() + 60)
    assert "nothing is profiled" in capsys.readouterr().out
    assert not profiled
    monkeypatch.setattr(gpu.shutil, "which", lambda tool: f"/bin/{tool}")
    gpu.nsight(table, 2, tmp_path / "x", time.time() + 60)
    assert profiled == ["far", "between"]
    assert "far: 0.10 of a copy" in (tmp_path / "x").read_text()
