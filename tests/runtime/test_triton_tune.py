"""Schedules that are chosen by timing: which are tried, which is taken, what is kept. The clock is the test's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import minifuse
from benchmarks.assembled import gpu_target
from minifuse.codegen import triton
from minifuse.ir.parse import parse
from minifuse.ir.plan import Launch, Plan
from minifuse.ir.text import print_launch
from minifuse.ir.verify import verify_plan
from minifuse.options import Options
from minifuse.passes.context import CompileContext
from minifuse.runtime import triton_tune
from minifuse.runtime.cache import DiskCache
from minifuse.runtime.triton_tune import candidates, str_of, tune

pytest.importorskip("triton")
GPU = torch.device("cuda", 0)
OPTIONS = {"target": "triton", "device_model": "H100"}


def plan_of(function: Callable[..., Any], *args: Tensor) -> Plan:
    (plan,) = minifuse.capture(function, *args, compile_options=OPTIONS).plans.values()
    return plan


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, float]]:
    """What was timed; more tiles are faster, other warps slower."""
    seen: list[Mapping[str, float]] = []

    def measured(plan: Plan, step: Launch, every: Mapping[str, Any], *rest: Any) -> dict[str, float]:
        found = {name: (1 + bool(s.warps)) / s.grid[-1].step for name, s in every.items()}
        seen.append(found)
        return found

    monkeypatch.setattr(triton_tune, "measured", measured)
    monkeypatch.setattr(triton_tune, "device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(triton_tune, "free_bytes", lambda device: 1 << 36)
    return seen


def context(tmp_path: Path) -> CompileContext:
    return CompileContext(
        "f", "inference", replace(Options.parse(OPTIONS), mode="max-autotune", cache_dir=str(tmp_path))
    )


def test_candidates_have_other_tiles_or_warps_and_the_same_trees() -> None:
    (step,) = plan_of(lambda x, y: F.silu(x) * y, torch.empty(4096, 4096), torch.empty(4096, 4096)).launches
    assert step.schedule is not None
    found = list(candidates(step.kernel, step.schedule))
    assert found[0] == step.schedule
    assert {s.grid[-1].step for s in found} == {512, 1024, 2048, 4096}
    assert {s.warps for s in found} == {0, 2, 8}
    for s in found:
        kernel = triton.write_kernel(replace(step, schedule=s))
        assert kernel.warps == (s.warps or 4)
    (norm,) = plan_of(lambda x: F.layer_norm(x, (1024,)), torch.empty(4096, 1024)).launches
    assert norm.schedule is not None
    for s in candidates(norm.kernel, norm.schedule):
        assert s.loops == norm.schedule.loops  # a row is one block, whatever is timed


def test_the_fastest_is_taken_and_kept(tmp_path: Path, clock: list[Any]) -> None:
    plan = plan_of(lambda x, y: F.silu(x) * y, torch.empty(4096, 4096), torch.empty(4096, 4096))
    ctx = context(tmp_path)
    found = tune(plan, GPU, ctx)
    (step,) = found.launches
    assert step.schedule is not None and step.schedule.grid[-1].step == 4096
    verify_plan(found)
    other = replace(step, schedule=replace(step.schedule, warps=8))
    assert parse(print_launch(other)).schedule == other.schedule
    (decision,) = [d for d in ctx.decisions if d.rule == "autotune"]
    assert decision.taken and "of 6 that were timed" in decision.words and "4096" in decision.words
    again = context(tmp_path)
    assert tune(plan, GPU, again) == found
    assert len(clock) == 1  # the second compile read what the first one found
    assert [d.words for d in again.decisions] == [d.words for d in ctx.decisions]


def test_a_damaged_result_is_timed_anew(tmp_path: Path, clock: list[Any]) -> None:
    plan = plan_of(lambda x: x * 2, torch.empty(1 << 22))
    tune(plan, GPU, context(tmp_path))
    (entry,) = DiskCache(str(tmp_path)).having("tuned_")
    entry.write_bytes(b"{}")
    tune(plan, GPU, context(tmp_path))
    assert len(clock) == 2


def test_the_rules_keep_what_is_little_slower_or_does_not_fit(
    tmp_path: Path, clock: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(lambda x: x * 2, torch.empty(1 << 22))
    monkeypatch.setattr(triton_tune, "free_bytes", lambda device: 1 << 20)
    assert tune(plan, GPU, context(tmp_path)) == plan
    assert not clock
    monkeypatch.setattr(triton_tune, "free_bytes", lambda device: 1 << 36)
    monkeypatch.setattr(triton_tune, "measured", lambda plan, step, every, *rest: {
        name: 1.0 if s == step.schedule else 0.99 for name, s in every.items()})  # fmt: skip
    ctx = context(tmp_path)
    assert tune(plan, GPU, ctx) == plan
    assert [d.taken for d in ctx.decisions] == [False]


def test_what_one_size_found_does_not_hold_for_another(tmp_path: Path, clock: list[Any]) -> None:
    for n in (1 << 22, 1 << 23):
        tune(plan_of(lambda x: x * 2, torch.empty(n)), GPU, context(tmp_path))
    assert len(clock) == 2


def test_a_plan_for_the_cpu_is_left_as_it_is(tmp_path: Path, clock: list[Any]) -> None:
    plan = plan_of(lambda x: x * 2, torch.empty(1 << 22))
    assert triton_tune.tuned(plan, context(tmp_path)) is plan
    assert not clock


def test_schedules_that_differ_are_told_apart() -> None:
    (step,) = plan_of(lambda x: x * 2, torch.empty(1 << 22)).launches
    assert step.schedule is not None
    names = [str_of(s) for s in candidates(step.kernel, step.schedule)]
    assert len(set(names)) == len(names) > 3


def test_each_candidate_is_compiled_and_those_that_the_compiler_refuses_are_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(lambda x, y: F.silu(x) * y, torch.empty(4096, 4096), torch.empty(4096, 4096))
    (step,) = plan.launches
    assert step.schedule is not None
    every = {str_of(s): s for s in candidates(step.kernel, step.schedule)}
    ran: list[str] = []

    def started(plan: Plan, step: Launch, made: Mapping[str, Any], device: torch.device) -> Any:
        assert all(len(one.variants) == 1 for one in made.values())
        ran.extend(made)
        return ((name, lambda: None) for name in made)

    compile_one = triton_tune.triton_launch.Launched.compile

    def compiled(self: Any, variant: Any, target: Any) -> Any:
        if self.kernel.warps == 8:
            raise RuntimeError("too many resources")
        return compile_one(self, variant, target)

    monkeypatch.setattr(triton_tune, "started", started)
    monkeypatch.setattr(triton_tune, "timed", lambda runs, rounds: {name: [1.0] for name in runs})
    monkeypatch.setattr(triton_tune.triton_launch.Launched, "compile", compiled)
    monkeypatch.setattr(triton_tune.compat_triton, "current_target", lambda: gpu_target("cuda:90"))
    found = triton_tune.measured(plan, step, every, GPU, context(tmp_path))
    assert list(found) == ran == [name for name, s in every.items() if s.warps != 8]
