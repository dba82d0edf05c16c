"""Running sums, products and extrema in generated kernels: eager's numbers, the same bits however they are fused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._higher_order_ops.associative_scan import associative_scan

from minifuse.ir.text import print_plan
from tests.judge import check, compiled, externs, kernels, records, same


def running(x: Tensor) -> tuple[Tensor, ...]:
    y = x.sin() + 1
    return (
        y.cumsum(1) * 2, y.cumsum(0).relu(), x.t().cumsum(0), x[:, ::2].cumsum(-1), x[3].cumprod(0),
        x.flip(1).cumsum(1).flip(1), (y / y.sum(1, keepdim=True)).cumsum(1), y.cumsum(1).sum(1),
    )  # fmt: skip


@pytest.mark.parametrize("target", ["c", "interpret"])
@pytest.mark.parametrize("shape", [(5, 16), (7, 37), (33, 4100), (4, 1), (4, 0)], ids=str)
def test_sums_equal_eager_and_no_bit_depends_on_fusion(shape: tuple[int, int], target: str) -> None:
    x = torch.randn(shape)
    got = check(running, x, options={"target": target}, tolerance=2e-4)
    assert not externs()
    same(compiled(running, {"target": target, "fusion_fuel": 0})(x), got, exact=True)


def test_a_running_sum_is_one_kernel_with_what_feeds_and_reads_it() -> None:
    x = torch.randn(64, 48)
    for fn in (lambda x: (x.exp() + 1).cumsum(1).relu(), lambda x: (x.exp() + 1).cumsum(0).relu()):
        check(fn, x)
        assert kernels() == 1
    plan = records()[0].stages["memory"]
    assert "scan(sum" in print_plan(plan) and "i1: lane, i0: loop" in print_plan(plan)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool])
def test_dtypes_accumulate_as_in_eager(dtype: torch.dtype) -> None:
    x = torch.randint(0, 3, (6, 50)).to(dtype)

    def fn(x: Tensor) -> list[Tensor]:
        out = [x.cumsum(1), x.cumsum(0), x.cumprod(1), x.cumsum(1, dtype=torch.float32)]
        return out if dtype is torch.bool else [*out, *x.cummax(1), *x.cummin(0)]

    check(fn, x)
    assert not externs()


def test_extrema_give_the_last_place_and_keep_nan() -> None:
    x = torch.randn(6, 40).mul(3).round()
    x[1, 5], x[2, 3], x[2, 9], x[4, 0] = torch.nan, torch.nan, torch.nan, -torch.inf
    check(lambda x: (x.cummax(1), x.cummin(1), x.cummax(0), x.cummin(0)), x, exact=True)
    assert not externs()


def test_gradients_are_eagers() -> None:
    x = torch.randn(9, 21, requires_grad=True)
    check(lambda x: (x.sin().cumsum(1), x.cumsum(0).exp().mul(0.01)), x)
    assert not externs()


@pytest.mark.parametrize("fn", [lambda x: x.cumsum(1), lambda x: x.cumsum(0), lambda x: x.cummax(-1)])
def test_lengths_may_vary(fn: Callable[..., Any]) -> None:
    run = compiled(fn, dynamic=True)
    for shape in ((3, 5), (4, 16), (1, 70), (20, 33)):
        x = torch.randn(shape)
        same(run(x), fn(x))


def test_a_scan_stays_apart_from_what_reduces_another_axis() -> None:
    x = torch.randn(40, 48)
    check(lambda x: x.softmax(1).cumsum(0), x)
    check(lambda x: x.cumsum(0).cumsum(1), x, tolerance=1e-4)
    decisions = [d for r in records() for d in r.decisions if d.rule == "two orders"]
    assert decisions
    assert kernels() == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sums_of_exponentials_neither_overflow_nor_vanish(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 37).mul(90).to(dtype).requires_grad_()
    check(
        lambda x: (x.logcumsumexp(1) * 2, x.logcumsumexp(0), (x[:, 1:] + 1).logcumsumexp(-1)),
        x,
        tolerance=2e-5 if dtype is torch.float32 else None,
    )
    assert not externs()
    y = torch.tensor([[-torch.inf, -torch.inf, 1, torch.inf, 2], [0, torch.nan, 1, torch.inf, 2]]).to(dtype)
    check(lambda y: (y.logcumsumexp(1), y.logcumsumexp(0)), y)


@pytest.mark.parametrize("dim", [0, 1])
def test_the_gradient_of_a_sum_of_exponentials_is_as_near_as_eagers(dim: int) -> None:
    """It is made of exponentials of sums and differences of logarithms, whose errors it has for factors."""

    def gradient(fn: Callable[..., Tensor], x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        fn(x, dim).sin().sum().backward()
        assert x.grad is not None
        return x.grad.double()

    run = compiled(torch.logcumsumexp)
    theirs, ours = 0.0, 0.0
    for seed in range(8):
        torch.manual_seed(seed)
        for x in (torch.randn(12, 400), torch.randn(12, 400) * 90):
            exact = gradient(torch.logcumsumexp, x.double())
            theirs += (gradient(torch.logcumsumexp, x) - exact).abs().mean().item()
            ours += (gradient(run, x) - exact).abs().mean().item()
    assert ours <= 1.1 * theirs


def test_an_associative_scan_is_kernels() -> None:
    """The linear recurrence of a state space model, h[t] = a[t] * h[t-1] + x[t]."""

    def join(left: list[Tensor], right: list[Tensor]) -> list[Tensor]:
        return [left[0] * right[0], left[1] * right[0] + right[1]]

    def fn(a: Tensor, x: Tensor) -> Tensor:
        return associative_scan(join, [a, x], dim=1, combine_mode="generic")[1].tanh()

    check(fn, torch.rand(4, 12), torch.randn(4, 12), tolerance=1e-5)
    assert not externs() and kernels() <= 5


@pytest.mark.parametrize("dim", [0, 1])
def test_a_long_running_sum_is_as_exact_as_eagers(dim: int) -> None:
    x = torch.rand(4, 1_000_000) if dim else torch.rand(1_000_000, 4)
    exact = x.double().cumsum(dim)
    error = (compiled(lambda x: x.cumsum(dim))(x).double() - exact).abs() / exact
    assert error.max() < 2e-7
