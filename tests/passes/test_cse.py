"""Equal calls become one, and only where nobody can tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from minifuse.passes.cse import merge_equal


def calls(fn: Callable[..., Any], *args: Tensor) -> tuple[int, list[str]]:
    """How many calls were merged, and the operators that are left."""
    gm = make_fx(fn, tracing_mode="fake")(*args)
    merged = merge_equal(gm.graph)
    gm.graph.lint()
    return merged, [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]


def test_equal_calls_become_one() -> None:
    merged, left = calls(lambda x: (x.sin() + 1) * (x.sin() + 1), torch.randn(3))
    assert merged == 2 and left == ["aten.sin.default", "aten.add.Tensor", "aten.mul.Tensor"]


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: (x * 1) + (x * 1.0),  # the dtype of a number counts
        lambda x: (x * 0.0) + (x * -0.0),
        lambda x: torch.rand_like(x) + torch.rand_like(x),
        lambda x: torch.empty_like(x).fill_(1) + torch.empty_like(x).fill_(2),
    ],
    ids=["number type", "sign of zero", "random", "memory"],
)
def test_what_differs_stays(fn: Callable[..., Any]) -> None:
    assert calls(fn, torch.randn(3))[0] == 0


def test_two_outputs_stay_two_tensors() -> None:
    assert calls(lambda x: (x + 1, (x + 1).view(3, 1)), torch.randn(3))[0] == 0
    x = torch.randn(3)
    a, b = torch.compile(lambda x: (x + 1, x + 1), backend="minifuse")(x)
    a.zero_()
    assert torch.equal(b, x + 1)


def test_a_mutation_separates() -> None:
    def f(x: Tensor, y: Tensor) -> Tensor:
        a = y + 1
        y.mul_(2)
        return a * (y + 1)

    assert calls(f, torch.randn(3), torch.randn(3))[0] == 0
