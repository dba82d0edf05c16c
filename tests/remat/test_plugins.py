"""The policies of examples/remat_policies: sound plans that fall with the budget, and what their papers promise."""

from __future__ import annotations

import importlib.util
import itertools
import random
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from examples.remat_policies.dtr_greedy import DTRGreedy
from examples.remat_policies.kusumoto_dp import KusumotoDP
from examples.remat_policies.moccasin import Moccasin
from examples.remat_policies.offload_hybrid import OffloadHybrid
from examples.remat_policies.schedule import schedule
from examples.remat_policies.xla_greedy import XLAGreedy
from minifuse.errors import RematError
from minifuse.ir.device import CPU
from minifuse.remat import Problem, RematPolicy, limit_of, resolve, verify_plan
from tests.remat.test_plans import MB, random_problem, value

needs_ortools = pytest.mark.skipif(importlib.util.find_spec("ortools") is None, reason="OR-Tools is not installed")
HEURISTICS: tuple[RematPolicy, ...] = (KusumotoDP(), DTRGreedy(), XLAGreedy(), OffloadHybrid())
ALL = (*HEURISTICS, pytest.param(Moccasin(limit=1.0), marks=needs_ortools))


def named(policy: RematPolicy) -> str:
    return policy.name


def layers(n: int, budget: float = 1.0) -> Problem:
    """A chain of n layers of a megabyte and a billion flops, each read by its own step of the backward."""
    forward = [value(f"l{i}", f"l{i - 1}" if i else "x", kind="extern", flops=1e9) for i in range(n)]
    back = [value("g0", "tangent", f"l{n - 1}", phase="backward", kind="extern")]
    back += [value(f"g{i}", f"g{i - 1}", f"l{n - 1 - i}", phase="backward", kind="extern") for i in range(1, n)]
    values = (
        value("x", phase="input", kind="input"), *forward, value("tangent", phase="tangent", kind="input"), *back,
    )  # fmt: skip
    names = tuple(f"l{i}" for i in range(n))
    return Problem(values, (f"l{n - 1}",), (f"g{n - 1}",), names, CPU, budget, "best")


@pytest.mark.parametrize("policy", ALL, ids=named)
def test_plans_are_sound_and_their_peak_falls_with_the_budget(policy: RematPolicy):
    rng = random.Random(5)
    for problem in (random_problem(rng, 40), random_problem(rng, 40), layers(24)):
        peaks = []
        for budget in (1.0, 0.6, 0.2):
            asked = replace(problem, memory_budget=budget, on_budget="best")
            plan = policy.plan(asked)
            verify_plan(asked, plan)
            assert policy.plan(asked) == plan
            assert plan.policy == policy.name
            assert plan.peak_bytes <= max([limit_of(asked), *peaks[-1:]])
            peaks.append(plan.peak_bytes)
        assert resolve("save_all").plan(problem).peak_bytes == peaks[0]
    assert peaks[-1] < peaks[0] / 2


@pytest.mark.parametrize("policy", ALL, ids=named)
def test_what_runs_once_is_saved_and_the_users_tags_are_kept(policy: RematPolicy):
    values = (
        value("x", phase="input", kind="input"),
        value("mm", "x", kind="extern", flops=1e9),
        value("drawn", "mm", is_random=True),
        value("kept", "drawn", tag="must_save"),
        value("again", "kept", tag="must_recompute"),
        value("pair", "again", kind="extern", is_random=True, savable=False),
        value("item", "pair", kind="item"),
        value("turned", "item", kind="view", storage="item"),
        value("out", "turned", kind="extern", flops=1e9),
        value("tangent", phase="tangent", kind="input"),
        value("grad", "tangent", "mm", "drawn", "kept", "again", "turned", phase="backward", kind="extern"),
    )
    names = ("mm", "drawn", "kept", "again", "turned")
    for budget in (1.0, 0.5, 1.5):
        problem = Problem(values, ("out",), ("grad",), names, CPU, budget, "best")
        plan = policy.plan(problem)
        verify_plan(problem, plan)
        assert {"drawn", "kept", "item"} <= {*plan.saved, *plan.offloaded}
        assert {"again", "turned"} <= set(plan.recomputed)


def test_a_schedule_holds_what_the_simulator_holds():
    problem = layers(16)
    s = schedule(problem)
    assert (s.held() == s.everything.timeline.total).all()
    for again in (frozenset({"l3", "l4", "l9"}), frozenset(v.name for v in s.movable)):
        assert s.held(again).max() == s.plan("mine", again).peak_bytes


@pytest.mark.parametrize("policy", [KusumotoDP(), DTRGreedy(), XLAGreedy()], ids=named)
def test_a_chain_takes_the_square_root_of_its_memory_for_one_more_forward(policy: RematPolicy):
    """Kusumoto and others, 2019, section 3; Kirisame and others, 2021, theorem 3.1: O(n) operators more."""
    n = 100
    plan = policy.plan(layers(n, budget=3 * n**0.5 * MB))
    assert plan.peak_bytes <= 3 * n**0.5 * MB
    assert plan.extra_flops <= n * 1e9


def test_dtr_evicts_nothing_where_all_fits():
    problem = layers(24)
    assert not DTRGreedy().plan(problem).recomputed
    whole = resolve("save_all").plan(problem).peak_bytes
    assert not DTRGreedy().plan(replace(problem, memory_budget=float(whole))).recomputed


def test_xla_brings_the_peak_to_the_limit_and_little_below():
    problem = layers(40)
    for budget in (0.9, 0.7, 0.5):
        asked = replace(problem, memory_budget=budget)
        limit = limit_of(asked)
        assert 0.8 * limit <= XLAGreedy().plan(asked).peak_bytes <= limit


def test_offloading_is_chosen_where_it_hides_and_recomputing_where_the_link_is_slow():
    problem = layers(24, budget=0.5)
    fast = replace(problem, device=replace(CPU, link=1e12))
    plan = OffloadHybrid().plan(fast)
    assert plan.offloaded and not [n for n in plan.recomputed if problem[n].kind == "extern"]
    assert plan.peak_bytes <= limit_of(fast)
    assert plan.step_seconds == pytest.approx(resolve("save_all").plan(fast).step_seconds, rel=0.01)
    slow = replace(problem, device=replace(CPU, link=1e6))
    plan = OffloadHybrid().plan(slow)
    assert plan.recomputed and not plan.offloaded
    assert plan.peak_bytes <= limit_of(slow)


@needs_ortools
def test_moccasin_finds_what_trying_every_subset_finds():
    problem = layers(8)
    values = tuple(replace(v, flops=v.flops * (1 + i % 3)) for i, v in enumerate(problem.values))
    problem = replace(problem, values=values, memory_budget=7.0 * MB)
    s = schedule(problem)
    names = [v.name for v in s.movable]
    plans = (s.plan("all", again) for k in range(len(names) + 1) for again in itertools.combinations(names, k))
    best = min(p.extra_seconds for p in plans if p.peak_bytes <= problem.memory_budget)
    plan = Moccasin(limit=20.0).plan(problem)
    assert plan.status == "optimal"
    assert plan.peak_bytes <= problem.memory_budget
    assert plan.extra_seconds == pytest.approx(best, rel=1e-3)
    assert plan.lower_bound is not None and 0 < plan.lower_bound <= best * (1 + 1e-9)


def test_moccasin_without_its_solver_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch):
    for name in ("ortools", "ortools.sat", "ortools.sat.python", "ortools.sat.python.cp_model"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RematError, match="pip install ortools"):
        Moccasin().plan(layers(4))


class Tiny(nn.Module):
    """A layer of attention and an MLP, with dropout."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm, self.mix, self.drop = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Dropout(0.1)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(self.norm(x)).chunk(3, dim=-1)
        x = x + self.drop((q @ k.transpose(-1, -2)).softmax(-1)) @ v
        return x + self.drop(self.down(nn.functional.gelu(self.up(x))))


@pytest.fixture(scope="module")
def gradients() -> Callable[[object, float], list[Tensor]]:
    torch.manual_seed(3)
    model, x = Tiny(), torch.randn(4, 64, 32)

    def found(policy: object, budget: float) -> list[Tensor]:
        torch._dynamo.reset()
        torch.manual_seed(7)
        model.zero_grad()
        options = {"remat": policy, "memory_budget": budget, "on_budget": "best"}
        torch.compile(model, backend="minifuse", options=options)(x).square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    return found


@pytest.fixture(scope="module")
def expected(gradients: Callable[[object, float], list[Tensor]]) -> list[Tensor]:
    return gradients("save_all", 1.0)


@pytest.mark.parametrize("policy", ALL, ids=named)
def test_gradients_are_those_of_saving_everything_bit_for_bit(
    policy: RematPolicy, gradients: Callable[[object, float], list[Tensor]], expected: list[Tensor]
):
    found = gradients(policy, 0.5)
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
