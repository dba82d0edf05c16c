"""The static scorecard beside kernels whose figures are counted by hand."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import harness, requested, static
from benchmarks.assembled import Access, Assembled, Instruction, Loop, PythonLoop, assembled, gpu_target
from minifuse.runtime.triton_launch import Launched

pytest.importorskip("triton")


def scaled() -> Any:
    return lambda x: x * 2, (torch.zeros(1000),)


def column() -> Any:
    return lambda x: x[:, 3] * 2, (torch.zeros(256, 64),)


def long_rows() -> Any:
    return lambda x: x.sum(1), (torch.zeros(600, 65_536),)


CASES = [("model", f"tests.test_static:{f.__name__}") for f in (scaled, column, long_rows)]


@pytest.fixture(scope="module")
def asked() -> dict[str, Any]:
    found = harness.fresh(static.probe_requested, CASES, env=requested.INTERPRETED)
    assert len(found) == 3
    return {key.split(":")[1].split()[0]: value for key, value in found.items()}


def compiled(case: str) -> tuple[Assembled, str, str]:
    ((_, plan, ctx),) = static.planned(("model", f"tests.test_static:{case}"))
    ((name, one, source),) = requested.launches(plan, ctx, Launched)
    return assembled(one.compile(one.usual(), gpu_target("cuda:90")), source), source, name


def test_an_element_for_an_element(asked: dict[str, Any]) -> None:
    found = asked["scaled"]
    assert found["least"] == found["requested"] == 2 * 4000  # 125 sectors of 32 bytes, read and written
    assert found["programs"] == 8  # of 128 elements, what a warp asks for at once
    assert sum(found["lanes"].values()) == 2 * 4 * 128  # masked or not
    a, *_ = compiled("scaled")
    assert (a.threads, a.spilled, a.shared, a.loops) == (32, 0, 0, ())
    # four floats a thread in one access: 4000 bytes are a multiple of 16
    assert a.accesses == (Access(0, 16, False), Access(1, 16, True))
    assert a.wide(False, {0: 4000.0}, {}) == 1.0
    assert a.in_flight == 16
    assert not any(i.barrier for i in a.code)


def test_an_element_of_each_row(asked: dict[str, Any]) -> None:
    found = asked["column"]
    assert found["least"] == 2 * 256 * 4
    assert (
        found["requested"] == 256 * 32 + 256 * 4
    )  # each element is in a sector of its own, as a result eight share one
    a, *_ = compiled("column")
    assert a.wide(False, {0: 1.0}, {}) == 0.0


def test_rows_in_loops(asked: dict[str, Any]) -> None:
    found = asked["long_rows"]
    assert found["programs"] == 600
    assert found["requested"] == 600 * 65_536 * 4 + (600 * 4 + 31) // 32 * 32
    assert sum(found["lanes"].values()) == pytest.approx(65_536 * 4 + 4)
    assert found["reductions"] == 2  # a piece of 32,768 each; the two results a thread adds by itself
    a, source, name = compiled("long_rows")
    assert a.loops
    lanes = {int(k): v for k, v in found["lanes"].items()}
    often = a.executions(lanes, requested.loops_of(Path(source).read_text(), name))
    loaded = sum(n * i.load for n, i in zip(often, a.code, strict=True))
    assert loaded * a.threads == 65_536 * 4


def test_loops_and_routines_are_told_by_their_branches() -> None:
    add = Instruction("FADD", 3)
    code = (Instruction("LDG", 2, load=16), add, replace_rare(add), Instruction("BRA", 3))
    a = Assembled(32, 16, 0, 0, code, (Loop(0, 4),), ())
    assert a.executions({2: 512.0 * 5}, [PythonLoop(range(1, 9), 1)]) == [5, 5, 0, 5]


def replace_rare(i: Instruction) -> Instruction:
    return Instruction(i.name, i.line, rare=True)


def test_accesses_with_and_without_a_mask_stand_for_each_other() -> None:
    accesses = (Access(0, 16, False), *[Access(0, 2, False)] * 8, Access(1, 2, True))
    a = Assembled(32, 16, 0, 0, (), (), accesses)
    assert a.wide(False, {0: 1000.0}, {0: 0.96}) == pytest.approx(0.96)
    assert a.wide(False, {0: 1000.0}, {}) == 0.5
    assert a.wide(True, {1: 10.0}, {}) == 0.0


def test_what_fits_a_multiprocessor() -> None:
    h100 = static.PROCESSORS["cuda:90"]
    assert h100.resident(Assembled(128, 32, 0, 0, (), (), ())) == 16  # 2,048 threads
    assert h100.resident(Assembled(128, 128, 0, 0, (), (), ())) == 4  # 65,536 registers
    assert h100.resident(Assembled(128, 32, 0, 75 << 10, (), (), ())) == 3  # 228 KB, and one more a program
    assert static.last_wave(132 * 4, 132, 4) == 1.0
    assert static.last_wave(132 * 4 + 1, 132, 4) == pytest.approx(0.5, abs=0.01)
    assert static.last_wave(66, 132, 4) == 0.5


def test_a_kernel_that_a_target_refuses_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        raise ValueError("no such target")

    monkeypatch.setattr(static, "gpu_target", refuse)
    table = static.board("cuda:90")
    static.measure(table, CASES[0], {}, "cuda:90")
    assert len(table.short()) == 1
    assert "no such target" in next(iter(table.errors.values()))


def test_cases_are_rows_models_and_paths() -> None:
    def chosen(rows: str = "", models: str = "", quick: bool = False) -> list[Any]:
        return static.cases(argparse.Namespace(rows=rows, models=models, quick=quick))

    assert chosen(rows="rope") == [("row", "rope 8x32x4096x128")]
    assert chosen(models="bert") == [("model", "bert")]
    assert chosen(models="a:b") == [("model", "a:b")]
    assert {kind for kind, _ in chosen(quick=True)} == {"row"}
    assert {kind for kind, _ in chosen()} == {"row", "model"}
