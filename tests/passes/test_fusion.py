"""Fusion seen from outside: rules of a user's own, and logs that replay."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

import minifuse
from minifuse.passes.fuse import RULES, Candidate, Rule, forbid, force
from minifuse.passes.fuse.log import unnumbered
from tests.judge import check, compiled, kernels, same

X = torch.randn(64, 96)


def chain(x: Tensor) -> Tensor:
    return (x.sin() + 1).exp() * x.sum(1, keepdim=True)


def report() -> Any:
    return minifuse.reports()[-1]


def written() -> list[set[str]]:
    """What each kernel of the last graph stores."""
    return [set(launch.writes) for launch in report().plan.launches]


# -- rules ------------------------------------------------------------------------------------------
def test_a_rule_of_the_users_own_refuses_with_its_reason() -> None:
    def broken(c: Candidate) -> dict[str, Any] | None:
        return {"n": c.a.size + c.b.size} if c.a.size + c.b.size > 6 else None

    want = compiled(chain)(X)
    assert kernels() == 1
    small = Rule("small kernels", "A kernel has at most 6 values.", "it would have {n} values", broken)
    same(compiled(chain, {"fusion_rules": [small]})(X), want, exact=True)
    refused = [d for d in report().decisions if d.rule == "small kernels"]
    assert refused and not refused[0].taken and "values; it would save" in refused[0].words
    assert kernels() > 1


@pytest.mark.parametrize(
    ("which", "count"),
    [(("sin",), 2), (("aten.exp*",), 3), (("sin", "add"), 2), ((lambda c: "exp" in c.b.nodes,), 2)],
)
def test_fusions_are_forbidden_by_node_operator_pair_or_function(which: tuple[Any, ...], count: int) -> None:
    want = compiled(lambda x: (x.sin() + 1).exp().cos())(X)
    same(compiled(lambda x: (x.sin() + 1).exp().cos(), {"fusion_rules": [forbid(*which)]})(X), want, exact=True)
    assert kernels() == count
    assert any(d.rule == "forbidden" and not d.taken for d in report().decisions)


def test_forced_fusions_pass_the_rules_of_speed_and_not_those_of_meaning() -> None:
    def two(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x.sin(), y.cos()

    y = torch.randn(64, 96)
    assert kernels_of(two, X, y) == 2
    assert kernels_of(two, X, y, options={"fusion_rules": [force("sin", "cos")]}) == 1
    assert "forced by the user" in str(report().decisions[0])
    # A function of a candidate is asked of those that are found.
    wide = [force(lambda c: True)]
    assert kernels_of(chain, X, options={"fusion_rules": wide}) == 1

    def scan(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.cumsum(1), x.cumsum(0)

    assert kernels_of(scan, X, options={"fusion_rules": [force("cumsum", "cumsum_1")]}) == 2
    assert any(d.rule == "two orders" and not d.taken for d in report().decisions)


def kernels_of(fn: Callable[..., Any], *args: Tensor, options: dict[str, Any] | None = None) -> int:
    check(fn, *args, options=options, tolerance=1e-5)
    return kernels()


@pytest.mark.parametrize("make", [forbid, force])
def test_what_names_no_fusion_is_an_error(make: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"expected .*patterns? .*function of a candidate"):
        make("a", "b", "c")
    with pytest.raises(ValueError, match="expected"):
        make(3)
    with pytest.raises(BackendCompilerFailed, match="fusion_rules"):
        compiled(chain, {"fusion_rules": ["sin"]})(X)


def test_each_rule_says_its_condition_and_its_reason() -> None:
    assert len({r.name for r in RULES}) == len(RULES)
    assert all(r.sentence.endswith(".") and r.reason for r in RULES)


# -- logs -------------------------------------------------------------------------------------------
def block(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    h = torch.nn.functional.layer_norm(x, (96,))
    y = (h @ w).relu()
    return y + x, (x.sin() * 2).sum(0)


def test_a_log_replays_to_the_same_plan(tmp_path: Path) -> None:
    w = torch.randn(96, 96)
    want = compiled(block)(X, w)
    log, plan = report().fusion_log, written()
    assert log and {"rule", "graph", "first", "second"} == set(log[0])
    file = tmp_path / "log.json"
    file.write_text(json.dumps(log))
    for given in (log, str(file), file):
        same(compiled(block, {"fusion_log": given})(X, w), want, exact=True)
        assert written() == plan
    assert report().fusion_log == log


def test_an_edited_log_is_obeyed_where_it_is_legal_and_refused_where_not() -> None:
    w = torch.randn(96, 96)
    want = compiled(block)(X, w)
    log, most = report().fusion_log, kernels()
    same(compiled(block, {"fusion_log": log[:1]})(X, w), want, exact=True)
    assert kernels() > most and report().fusion_log == log[:1]
    graph = log[0]["graph"]

    def entry(first: str, second: str) -> dict[str, str]:
        return {"rule": "fuse", "graph": graph, "first": first, "second": second}

    names = [step.name for step in report().unfused.launches]
    relu, sin = next(n for n in names if "relu" in n), next(n for n in names if "sin" in n)
    edited = [entry("sin", "relu"), entry(names[0], "relu"), entry("nothing", sin)]
    same(compiled(block, {"fusion_log": edited})(X, w), want, exact=True)
    rules = {d.rule: d for d in report().decisions if not d.taken}
    assert rules["cycle"] and "no kernel of this graph" in rules["fusion log"].words
    assert {sin, relu} <= next(w for w in written() if relu in w) | {sin}


@pytest.mark.parametrize(
    ("run", "first", "second", "rule", "words"),
    [
        (lambda x: x.sin() + x.cos(), "sin", "cos", "inline", "cos reads nothing that sin stores"),
        (lambda x: x.sum(1, keepdim=True) * x, "sum_1", "mul", "inline", "sum_1 reduces, checks, or touches"),
        (lambda x: x.add_(1).sin(), "add", "sin", "inline", "add reduces, checks, or touches what is overwritten"),
        (lambda x: x.sin().cos(), "sin", "cos", "forbidden", "forbidden by the user: cos"),
    ],
)
def test_what_a_log_would_inline_is_refused_with_its_reason(
    run: Callable[..., Any], first: str, second: str, rule: str, words: str
) -> None:
    options: dict[str, Any] = {"fusion_rules": [forbid("cos")] if rule == "forbidden" else []}
    compiled(run, {**options, "fusion_fuel": 0})(X.clone())
    launches = report().unfused.launches
    names = {n: next(step.name for step in launches if n in step.kernel.origins) for n in (first, second)}
    entry = {"rule": "inline", "graph": unnumbered(report().name), "first": names[first], "second": names[second]}
    same(compiled(run, {**options, "fusion_log": [entry]})(X.clone()), run(X.clone()), tolerance=1e-5)
    refused = next(d for d in report().decisions if not d.taken)
    assert refused.rule == rule and words in refused.words


@pytest.mark.parametrize("log", [3, "missing.json", [{"rule": "fuse"}], [{"rule": "melt", "graph": "g"}]])
def test_what_is_no_log_is_an_error(log: Any) -> None:
    with pytest.raises(BackendCompilerFailed, match="fusion_log"):
        compiled(chain, {"fusion_log": log})(X)


def square(x: Tensor, y: Tensor) -> Tensor:
    return (x.sin() @ y).cos()


def test_every_operator_on_its_own_says_why() -> None:
    compiled(square)(torch.randn(64, 64), torch.randn(64, 64))
    alone = {d.subject[0]: d.words for d in report().decisions if d.rule == "alone"}
    assert set(alone) == {"sin", "cos"}


# -- the plan ---------------------------------------------------------------------------------------
HASHED = """
import torch, minifuse
def f(x, w):
    h = torch.nn.functional.layer_norm(x, (32,), w)
    return (h.relu() * w).softmax(1), h.sum(0), (h + 1).exp().mean(1), x.sin() + w
torch.compile(f, backend="minifuse")(torch.randn(16, 32), torch.randn(32))
from minifuse.ir.text import print_plan
print(print_plan(minifuse.reports()[-1].plan))
"""


def test_a_plan_does_not_depend_on_the_hash_seed() -> None:
    texts = {
        subprocess.run(
            [sys.executable, "-c", HASHED],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(texts) == 1


def test_a_row_walked_backwards_is_the_same_row() -> None:
    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.sin(), (x.flip(0) + 1).cos() * x.sin().flip(0)

    check(fn, X, tolerance=1e-5)
    assert kernels() == 1


def test_the_exact_planner_takes_no_longer_plan_than_the_greedy_one() -> None:
    w = torch.randn(96, 96)
    want = compiled(block)(X, w)
    greedy = kernels()
    same(compiled(block, {"fusion": "exact"})(X, w), want, exact=True)
    assert kernels() <= greedy
    assert any("least predicted time" in d.words for d in report().decisions)


def test_what_is_too_large_for_the_exact_planner_is_fused_greedily_and_says_so() -> None:
    def long(x: Tensor) -> Tensor:
        for _ in range(70):
            x = x.sin() + 0.5
        return x

    same(compiled(long, {"fusion": "exact"})(X), long(X), tolerance=1e-4)
    assert "at most 60" in next(d.words for d in report().decisions if d.rule == "exact")


def test_a_number_that_is_stored_rides_along_with_a_kernel_that_computes_it_for_itself() -> None:
    def clipped(x: Tensor) -> tuple[Tensor, Tensor]:
        least = torch.full((), 0.25)
        return torch.where(x > 0, x, least).exp(), least

    check(clipped, X)
    assert kernels() == 1
    check(lambda x: clipped(x.repeat(64, 64)), X)
    assert kernels() == 2, "a large kernel keeps its loops"

    def between(x: Tensor) -> tuple[Tensor, ...]:
        least, most = torch.full((), 0.25), torch.full((), 0.5)
        return torch.where(x > 0, least, most), least, most

    check(between, X)
    assert kernels() == 1


def test_computing_a_value_where_it_is_read_keeps_to_the_number_of_buffers() -> None:
    def forward_and_backward(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        kept = []
        for _ in range(150):
            kept.append(x * 1.01 + 0.001)
            x = kept[-1].sin()
        for z in reversed(kept):
            g = g * z.cos() * 1.01
        return x, g

    launches = minifuse.capture(forward_and_backward, X, X).plans["inference"].launches
    assert max(len(launch.binding) for launch in launches) <= 28
