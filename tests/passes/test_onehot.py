"""Sums of one element: which are, what they become, and that no bit changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import minifuse
from minifuse.ir.value import Op


def plan_of(function: Callable[..., Any], *args: Tensor) -> Any:
    graphs = minifuse.capture(function, *args)
    (decisions,) = graphs.decisions.values()
    (plan,) = graphs.plans.values()
    return plan, [d for d in decisions if d.rule == "one-hot"]


def picked(x: Tensor, k: Tensor) -> Tensor:
    """x at column k of each row, -0 and what is out of the row included."""
    places = torch.arange(x.shape[1])
    return torch.where(places[None] == k[:, None], x[:, :1], 0.0).sum(1)


def both(x: Tensor, k: Tensor) -> Tensor:
    places = torch.arange(x.shape[1])
    return torch.where((places[None] == k[:, None]) & (k > 3)[:, None], x[:, :1], 0.0).sum(1)


@pytest.mark.parametrize("function", [picked, both])
def test_a_sum_of_one_element_is_that_element(function: Callable[..., Any]) -> None:
    x = torch.randn(64, 33)
    x[3, 0], x[4, 0], x[5, 0], x[6, 0] = -0.0, torch.nan, torch.inf, 0.0
    k = torch.arange(64) - 9  # some in front of the row, some behind it
    plan, decisions = plan_of(function, x, k)
    assert len(decisions) == 1
    assert not any(list(step.kernel.reductions) for step in plan.launches)
    want = function(x, k)
    for fuel in (None, 0):
        torch._dynamo.reset()
        found = torch.compile(function, backend="minifuse", options={"fusion_fuel": fuel})(x, k)
        assert torch.equal(found.view(torch.int32), want.view(torch.int32))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, k: torch.where(torch.arange(33)[None] >= k[:, None], x[:, :1], 0.0).sum(1),
        lambda x, k: torch.where(torch.arange(33)[None] == k[:, None], x, 0.0).sum(1),
        lambda x, k: torch.where(torch.arange(33)[None] == k[:, None], x[:, :1], 1.0).sum(1),
        lambda x, k: torch.where(torch.arange(33)[None] == k[:, None], x[:, :1], 0.0).amax(1),
        lambda x, k: torch.where(torch.arange(33)[None] * 2 == k[:, None], x[:, :1], 0.0).sum(1),
    ],
)  # fmt: skip
def test_other_sums_stay(function: Callable[..., Any]) -> None:
    x, k = torch.randn(64, 33), torch.arange(64) - 9
    _, decisions = plan_of(function, x, k)
    assert not decisions
    torch.testing.assert_close(torch.compile(function, backend="minifuse")(x, k), function(x, k))


def test_a_place_is_compared_in_half_the_width() -> None:
    def function(x: Tensor, k: Tensor) -> Tensor:
        return torch.where(torch.arange(33)[None] == k[:, None], x, 0.0) * 2

    x, k = torch.randn(64, 33), torch.arange(64) - 9
    k[0], k[1], k[2] = 1 << 32, (1 << 32) + 5, -(1 << 32) + 7  # whose low halves are places of the row
    plan, _ = plan_of(function, x, k)
    values = (v for s in plan.launches for v in s.kernel.values())
    compared = [v.args[0].dtype for v in values if isinstance(v, Op) and v.name == "eq"]
    assert compared == [torch.int32]
    torch._dynamo.reset()
    assert torch.equal(torch.compile(function, backend="minifuse")(x, k), function(x, k))


def test_the_gradient_of_a_cross_entropy_needs_no_sum() -> None:
    x, target = torch.randn(64, 1000, requires_grad=True), torch.randint(0, 1000, (64,))
    target[5] = -100
    graphs = minifuse.capture(F.cross_entropy, x, target)
    assert [d.rule for d in graphs.decisions["backward"] if d.rule == "one-hot"]
    gradients = []
    for fuel in (None, 0):
        torch._dynamo.reset()
        torch.compile(F.cross_entropy, backend="minifuse", options={"fusion_fuel": fuel})(x, target).backward()
        assert x.grad is not None
        gradients.append(x.grad.clone())
        x.grad = None
    assert torch.equal(*gradients)
    F.cross_entropy(x, target).backward()
    torch.testing.assert_close(gradients[0], x.grad)
