"""The policies that are exact: an integer program of a graph, a dynamic program of a chain."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import minifuse
from minifuse.passes.remat.budget import limit_of
from minifuse.passes.remat.checkmate import CheckmateMilp
from minifuse.passes.remat.plan import closure, cost_seconds
from minifuse.passes.remat.problem import RECOMPUTE
from minifuse.passes.remat.rotor import F_ALL, F_NONE, B, Chain, Link, RotorDp
from minifuse.remat import POLICIES, Problem, RematPolicy, assemble, resolve, verify_plan
from tests.remat.test_plans import random_problem


def homogeneous(length: int, outputs: int, again: int | None = None) -> float:
    """Forward evaluations beyond one a stage, where there is room to keep all of one stage and some outputs."""
    dear = 100.0
    nbytes = 1 + dear + outputs
    chain = Chain([Link(1.0, 1.0, 1.0, dear)] * length, nbytes, int(nbytes), again)
    return chain.schedule().makespan - 2 * length


@pytest.mark.parametrize("snapshots", [1, 2, 3, 4])
def test_without_f_all_a_chain_of_like_stages_takes_as_many_evaluations_as_revolve(snapshots: int):
    """Griewank and Walther, "Revolve", ACM TOMS 2000: r l - binomial(s + r, s + 1) with s snapshots. They count the
    input as one and not the state that moves; here it is the other way round."""
    for length in range(1, 16):
        r = next(r for r in itertools.count() if length <= math.comb(snapshots + r, snapshots))
        expected = r * length - math.comb(snapshots + r, snapshots + 1)
        assert homogeneous(length, snapshots) == expected


def test_running_once_again_at_most_takes_more_memory_and_never_less_time():
    assert homogeneous(9, 8, again=1) == homogeneous(9, 8) == 8
    assert [homogeneous(9, 3, again=k) for k in (1, 2)] == [float("inf"), homogeneous(9, 3)]
    assert homogeneous(9, 2, again=1) == float("inf")
    assert homogeneous(9, 8, again=0) == float("inf")


def random_chain(rng: random.Random, length: int) -> list[Link]:
    links = []
    for _ in range(length):
        output = rng.randint(1, 4)
        extra = (rng.randint(0, 2), rng.randint(0, 2))
        links.append(Link(rng.randint(1, 9), rng.randint(1, 9), output, output + rng.randint(0, 5), *extra))
    return links


def replayed(links: list[Link], operations: tuple[tuple[str, int], ...]) -> tuple[float, float]:
    """Seconds and the most bytes of a schedule, each operation's inputs being checked; the chain's input is outside."""
    held: dict[tuple[str, int], float] = {("a", -1): 0.0, ("d", len(links) - 1): links[-1].output}
    seconds = most = 0.0
    for what, i in operations:
        link, kept = links[i], ("k", i - 1) in held
        assert ("a", i - 1) in held or kept
        if what == B:
            assert {("k", i), ("d", i)} <= held.keys()
            most = max(most, sum(held.values()) + link.backward_extra)
            del held["k", i], held["d", i]
            held.pop(("a", i - 1), None)
            held["d", i - 1] = 0.0 if i == 0 else links[i - 1].output
            seconds += link.backward
            continue
        held["k" if what == F_ALL else "a", i] = link.kept if what == F_ALL else link.output
        most = max(most, sum(held.values()) + link.forward_extra)
        if what == F_NONE:
            del held["a", i - 1]
        seconds += link.forward
    assert ("d", -1) in held
    return seconds, most


def least_seconds(links: list[Link], nbytes: float) -> float:
    """Of all orders of operations, by Dijkstra's algorithm over what is held."""
    n = len(links)
    start = frozenset({("a", -1), ("d", n - 1)})

    def size(held: frozenset[tuple[str, int]]) -> float:
        return sum(0 if i < 0 else links[i].kept if what == "k" else links[i].output for what, i in held)

    queue, done, tie = [(0.0, 0, start)], set(), itertools.count(1)
    while queue:
        seconds, _, held = heapq.heappop(queue)
        if held in done:
            continue
        done.add(held)
        if ("d", -1) in held:
            return seconds
        for i, link in enumerate(links):
            if not {("a", i - 1), ("k", i - 1)} & held:
                continue
            moves = []
            if {("k", i), ("d", i)} <= held:
                after = held - {("k", i), ("d", i), ("a", i - 1)} | {("d", i - 1)}
                moves.append((link.backward, size(held) + link.backward_extra, after))
            for what in "ak":
                more = held | {(what, i)}
                seconds_bytes = (link.forward, size(more) + link.forward_extra)
                moves.extend((*seconds_bytes, after) for after in (more, more - {("a", i - 1)}))
            for took, most, after in moves:
                if most <= nbytes:
                    heapq.heappush(queue, (seconds + took, next(tie), after))
    return float("inf")


def test_a_schedule_keeps_to_its_memory_and_none_of_a_tiny_chain_is_faster():
    rng = random.Random(0)
    same = []
    for _ in range(40):
        links = random_chain(rng, rng.randint(1, 3))
        most = int(sum(k.kept for k in links)) + 12
        before = float("inf")
        for nbytes in range(2, most, 2):
            found = Chain(links, nbytes, nbytes).schedule()
            assert found.makespan <= before
            before = found.makespan
            if found.operations:
                seconds, held = replayed(links, found.operations)
                assert seconds == found.makespan
                assert held <= nbytes
            least = least_seconds(links, nbytes)
            assert least <= found.makespan
            same.append(least == found.makespan)
    # theirs is the best of the schedules that keep a checkpoint until it is used; few others are faster
    assert np.mean(same) > 0.95


def test_with_all_memory_nothing_runs_twice():
    links = random_chain(random.Random(1), 12)
    found = Chain(links, 1000.0).schedule()
    assert [what for what, _ in found.operations] == [F_ALL] * 12 + [B] * 12
    assert found.makespan == sum(k.forward + k.backward for k in links)


def test_plans_of_random_problems_are_sound_and_within_the_budget_where_they_say_so():
    rng = random.Random(5)
    for _ in range(4):
        problem = random_problem(rng, 25)
        for policy in (RotorDp(), CheckmateMilp(seconds=2.0)):
            for budget in (1.0, 0.6, 0.4, 0.2):
                asked = replace(problem, memory_budget=budget, on_budget="best")
                plan = policy.plan(asked)
                verify_plan(asked, plan)
                assert plan.policy == policy.name
                assert plan.peak_bytes <= limit_of(asked) or plan.status.startswith("over budget")


@pytest.mark.parametrize("policy", [*POLICIES.values()], ids=lambda policy: policy.name)
def test_no_policy_keeps_what_the_user_said_must_be_recomputed(policy: RematPolicy):
    rng = random.Random(11)
    for _ in range(3):
        problem = random_problem(rng, 30)
        values = [replace(v, tag="must_recompute") if v.phase == "forward" and rng.random() < 0.4 else v
                  for v in problem.values]  # fmt: skip
        for budget in (1.0, 0.5, 0.0):
            asked = replace(problem, values=tuple(values), memory_budget=budget, on_budget="best")
            short = replace(policy, seconds=0.5) if isinstance(policy, CheckmateMilp) else policy
            verify_plan(asked, short.plan(asked))


@pytest.mark.parametrize("policy", [*POLICIES.values()], ids=lambda policy: policy.name)
def test_tensors_without_elements_have_a_plan(policy: RematPolicy):
    problem = random_problem(random.Random(12), 30)
    empty = replace(problem, values=tuple(replace(v, nbytes=0, flops=0.0) for v in problem.values))
    for budget in (1.0, 0.5, 0.0):
        asked = replace(empty, memory_budget=budget)
        plan = policy.plan(asked)
        verify_plan(asked, plan)
        assert plan.peak_bytes == 0


def test_without_a_budget_the_integer_program_is_the_minimum_cut():
    rng = random.Random(6)
    for _ in range(20):
        problem = random_problem(rng, 30)
        exact, cut = CheckmateMilp(gap=0.0).plan(problem), resolve("priced_mincut").plan(problem)
        if cut.status == "optimal":
            assert cost_seconds(problem, exact) == pytest.approx(cost_seconds(problem, cut), rel=1e-5)
            assert exact.lower_bound == pytest.approx(cut.lower_bound, rel=1e-4)


def test_a_tiny_problem_gets_the_cheapest_of_all_plans_that_fit():
    rng = random.Random(7)
    compared = 0
    for _ in range(30):
        problem = replace(random_problem(rng, 7), memory_budget=rng.choice((0.9, 0.7, 0.5)), on_budget="best")
        limit = limit_of(problem)
        names = [v.name for v in problem.values if v.phase == "forward" and v.kind != "view"]
        best = float("inf")
        for mask in range(2 ** len(names)):
            saved = frozenset(n for i, n in enumerate(names) if mask >> i & 1)
            actions = closure(problem, saved)
            if not any(problem[n].pinned for n, a in actions.items() if a == RECOMPUTE):
                plan = assemble(problem, saved, "one")
                best = min(best, cost_seconds(problem, plan) if plan.peak_bytes <= limit else float("inf"))
        plan = CheckmateMilp(gap=0.0).plan(problem)
        if np.isinf(best):
            assert plan.peak_bytes > limit
            continue
        compared += 1
        assert plan.peak_bytes <= limit
        assert cost_seconds(problem, plan) == pytest.approx(best, rel=1e-6), problem.to_json()
    assert compared > 5


def test_within_a_budget_it_is_never_dearer_than_the_default_beyond_the_gap():
    rng = random.Random(8)
    for _ in range(6):
        problem = replace(random_problem(rng, 20), memory_budget=rng.choice((0.8, 0.6, 0.4)), on_budget="best")
        exact, plain = CheckmateMilp(seconds=4.0).plan(problem), resolve("default").plan(problem)
        if plain.peak_bytes <= limit_of(problem):
            assert exact.peak_bytes <= limit_of(problem)
            assert cost_seconds(problem, exact) <= cost_seconds(problem, plain) * (1 + 1e-3)


class Block(nn.Module):
    """One layer of a transformer before a loss."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.first(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2) / 4).softmax(-1)
        x = x + self.out((scores @ v).transpose(1, 2).reshape(batch, length, width))
        return (x + self.mlp(self.second(x))).pow(2).mean()


@pytest.fixture(scope="module")
def block() -> Problem:
    found = minifuse.capture(Block(), torch.randn(4, 128, 64), compile_options={"device_model": "cpu"}).problem
    assert found is not None
    return found


def test_the_default_is_within_two_percent_of_a_step_of_the_certified_optimum(block: Problem):
    rng = random.Random(9)
    closed = 0
    for problem in (block, *(random_problem(rng, 20) for _ in range(8))):
        exact, plain = CheckmateMilp(seconds=4.0).plan(problem), resolve("default").plan(problem)
        if exact.lower_bound is not None and exact.status in ("optimal", "within the gap"):
            closed += 1
            assert cost_seconds(problem, exact) <= (1 + 2e-3) * exact.lower_bound
            assert plain.step_seconds <= 1.02 * exact.step_seconds
    assert closed >= 8


@pytest.mark.parametrize("budget", [0.8, 0.72])
def test_a_block_of_a_transformer_is_closed_within_its_budget(block: Problem, budget: float):
    problem = replace(block, memory_budget=budget, on_budget="best")
    exact, plain = CheckmateMilp(seconds=10.0).plan(problem), resolve("default").plan(problem)
    verify_plan(problem, exact)
    assert exact.peak_bytes <= limit_of(problem)
    if plain.peak_bytes <= limit_of(problem):
        assert cost_seconds(problem, exact) <= cost_seconds(problem, plain) * (1 + 1e-3)
    assert exact.lower_bound is not None
    assert exact.lower_bound <= cost_seconds(problem, exact)
