"""Operators that others express: eager's values and gradients, in kernels alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.judge import check, compiled, externs

X, MASK = torch.randn(5, 8, requires_grad=True), torch.rand(5, 8) > 0.5
INTS = torch.arange(1, 6)
CASES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "masked_scatter": (lambda x, m, s: x.masked_scatter(m, s), (X, MASK, torch.randn(45, requires_grad=True))),
    "by rows": (lambda x, m, s: x.masked_scatter(m, s), (X, MASK[:, :1], torch.randn(40, requires_grad=True))),
    "diagonal above": (lambda x, s: torch.diagonal_scatter(x, s, 2), (X, torch.randn(5, requires_grad=True))),
    "diagonal below": (lambda x, s: torch.diagonal_scatter(x, s, -1, 1, 0), (X, torch.randn(5))),
    "index_reduce": (lambda x, s: x.index_reduce(1, INTS, s, "mean"), (X.detach(), torch.randn(5, 5))),
    "round": (lambda x: (x.round(decimals=2), (x * 100).round(decimals=-1)), (X.detach(),)),
    "numbers first": (lambda n: (1 << n, 64 >> n, 5 & n, 5 | n, 5 ^ n, torch.remainder(7, n)), (INTS,)),
    "triangles": (lambda x: (torch.tril_indices(5, 6, 1) + 1, torch.triu_indices(3, 4)), (X,)),
    "dist": (lambda x, y: torch.dist(x, y), (X, torch.randn(5, 8))),
    "weight_norm": (lambda v, g: torch._weight_norm(v, g, 0), (X, torch.rand(5, 1, requires_grad=True))),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_eagers(name: str) -> None:
    fn, args = CASES[name]
    for dynamic in (False, True):
        check(fn, *args, dynamic=dynamic)
        assert not externs()


MOMENTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], float], float]] = {
    "uniform": (lambda x: torch.empty_like(x).uniform_(-1, 3), lambda d: float(d.mean()), 1.0),
    "its spread": (lambda x: torch.empty_like(x).uniform_(-1, 3), lambda d: float(d.std()), 4 / 12**0.5),
    "normal": (lambda x: torch.normal(x * 0 + 2, 3.0), lambda d: float(d.std()), 3.0),
    "exponential": (lambda x: torch.empty_like(x).exponential_(0.5), lambda d: float(d.mean()), 2.0),
    "log normal": (lambda x: torch.empty_like(x).log_normal_(1, 0.5), lambda d: float(d.log().mean()), 1.0),
    "geometric": (lambda x: torch.empty_like(x).geometric_(0.25), lambda d: float(d.mean()), 4.0),
    "cauchy": (lambda x: torch.empty_like(x).cauchy_(2, 1), lambda d: float(d.median()), 2.0),
}


@pytest.mark.parametrize("name", MOMENTS)
def test_numbers_drawn_in_kernels_are_of_their_distribution(name: str) -> None:
    fn, moment, expected = MOMENTS[name]
    torch.manual_seed(0)
    drawn = compiled(fn)(torch.zeros(200_000))
    assert externs() == ["minifuse.seed.default"]
    assert moment(drawn) == pytest.approx(expected, rel=0.02)
