"""Chains of pointwise kernels: fused before the queue is filled, within every rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import minifuse
from minifuse.ir.text import print_kernel
from minifuse.passes.fuse import chains, forbid
from minifuse.passes.fuse.search import Search

X, Y = torch.randn(64, 48), torch.randn(64, 48)


def compiled(fn: Callable[..., Any], *args: Tensor, **options: Any) -> tuple[Any, Any]:
    torch._dynamo.reset()
    out = torch.compile(fn, backend="minifuse", options=options)(*args)
    return out, minifuse.reports()[-1]


@pytest.fixture
def contracted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What is fused before the queue is filled, while a test runs."""
    found: list[tuple[str, ...]] = []

    def watch(search: Search) -> None:
        before = len(search.ctx.decisions)
        chains_contract(search)
        found.extend(d.subject for d in search.ctx.decisions[before:])

    chains_contract = chains.contract
    monkeypatch.setattr(chains, "contract", watch)
    return found


def test_a_chain_is_one_kernel_before_the_queue_is_filled(contracted: list[tuple[str, ...]]) -> None:
    out, report = compiled(lambda x, y: ((x.sin() * y).cos() + x.exp()).relu(), X, Y)
    torch.testing.assert_close(out, ((X.sin() * Y).cos() + X.exp()).relu())
    assert report.kernels == 1 and len(contracted) == 5
    assert all(d.facts["saved_bytes"] >= 2 * X.nbytes for d in report.decisions if d.rule == "fuse")


@pytest.mark.parametrize(
    "fn",
    [
        lambda x, y: (lambda s: (s + y, s * y))(x.sin()),  # two readers
        lambda x, y: (lambda s: (s, s.cos()))(x.sin()),  # a caller reads it too
        lambda x, y: x.sin().sum(1),  # its reader reduces
        lambda x, y: x.sum(1).sin(),  # it reduces
        lambda x, y: x.sin().t() + 1.0,  # read at another place
        lambda x, y: x[:, 0].sin().unsqueeze(1) * y,  # computed once a row, read at each element
        lambda x, y: x.sin() @ y.t(),  # its reader is a library's call
    ],
)
def test_what_is_more_than_a_chain_waits_in_the_queue(
    fn: Callable[..., Any], contracted: list[tuple[str, ...]]
) -> None:
    out, _ = compiled(fn, X, Y)
    torch.testing.assert_close(out, fn(X, Y), rtol=1e-4, atol=1e-4)
    assert not contracted


@pytest.mark.parametrize("fuel", range(5))
def test_fuel_and_a_log_hold_for_chains_too(fuel: int) -> None:
    def fn(x: Tensor, y: Tensor) -> Tensor:
        return ((x.sin() * y).cos() + y.exp()).relu()

    whole, report = compiled(fn, X, Y)
    out, short = compiled(fn, X, Y, fusion_fuel=fuel)
    assert torch.equal(out, whole) and short.kernels == 6 - fuel
    replayed, again = compiled(fn, X, Y, fusion_log=report.fusion_log)
    assert torch.equal(replayed, whole)
    assert [print_kernel(k.kernel) for k in again.plan.launches] == [
        print_kernel(k.kernel) for k in report.plan.launches
    ]


def test_a_rule_of_the_users_sees_each_pair_of_a_chain(contracted: list[tuple[str, ...]]) -> None:
    rules = [forbid("sin", "cos")]
    _, report = compiled(lambda x: x.exp().sin().cos().relu(), X, fusion_rules=rules)
    assert not contracted and report.kernels == 2


def test_layers_that_repeat_are_one_kernel_whatever_came_together_first() -> None:
    """The seconds at stake of a matrix and of a vector put their fusions in another order; what is stored stands in the
    order of the captured graph."""

    def step(*state: Tensor) -> list[Tensor]:
        out = []
        for p, g, m, v in zip(*[iter(state)] * 4, strict=True):
            m2, v2 = m * 0.9 + g * 0.1, v * 0.99 + g * g * 0.01
            out += [m2, v2, p - m2 / (v2.sqrt() + 1e-8)]
        return out

    state = [torch.rand(size) for size in (1 << 18, 1 << 18, 64, 64) for _ in range(4)]
    out, report = compiled(step, *state)
    for a, b in zip(out, step(*state), strict=True):
        torch.testing.assert_close(a, b)
    bodies = {print_kernel(launch.kernel).split("store", 1)[1] for launch in report.plan.launches}
    assert len(bodies) == 1
