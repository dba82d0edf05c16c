"""Large results that nobody reads soon are written past the caches; no bit depends on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from minifuse.ir.device import CPU
from minifuse.ir.text import print_plan
from tests.judge import compiled, records

ROOM = int(CPU.levels[-2].nbytes)


def past(fn: Callable[..., Any], *args: Tensor) -> set[str]:
    """The buffers that a function's kernels write past the caches."""
    compiled(fn)(*args)
    plan = records()[0].stages["memory"]
    pairs = [(s, p) for s in plan.launches for p in s.schedule.past]
    assert all(f"past {p}" in print_plan(plan) for _, p in pairs)
    return {m.buffers[p] for s, p in pairs for m in s.members}


def test_a_result_larger_than_the_caches_is() -> None:
    assert past(lambda x: (x * 2 + 1).relu(), torch.randn(ROOM // 4 + 4096)) == {"relu"}


def test_one_that_fits_is_not() -> None:
    assert past(lambda x: (x * 2 + 1).relu(), torch.randn(ROOM // 8)) == set()


def test_one_that_is_read_at_once_is_not_and_one_that_waits_is() -> None:
    def fn(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        soon = (x + 1) @ y
        waits = x.exp()
        more = (soon @ y) @ y
        return more, waits @ y

    n = 1536  # 9 MB a matrix
    x, y = torch.randn(n, n), torch.randn(n, n)
    assert past(fn, x, y) == {"exp"}


def test_partial_results_stay() -> None:
    assert past(lambda x: x.sum(0), torch.randn(ROOM // 2048, 1024)) == set()


def test_what_is_written_in_place_stays() -> None:
    def fn(x: Tensor) -> Tensor:
        return x.mul_(2)

    assert past(fn, torch.randn(ROOM // 4 + 4096)) == set()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.bool, torch.int8])
@pytest.mark.parametrize("width", [1024, 1000, 1003])
def test_rows_of_any_alignment_and_dtype_are_eagers(dtype: torch.dtype, width: int) -> None:
    x = torch.randint(0, 2, (2 * ROOM // 1024, width), dtype=torch.int8)
    x = (x[1:] if width == 1003 else x).to(dtype)

    def fn(x: Tensor) -> Tensor:
        return ~x if dtype is torch.bool else x + x

    assert past(fn, x)
    assert torch.equal(torch.compile(fn, backend="minifuse")(x), fn(x))
