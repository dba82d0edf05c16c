"""Operators that see memory: views whose elements share it, and places in it that only eager's strides name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.judge import check, compiled, externs


def windows(x: Tensor) -> Tensor:
    return x.unfold(0, 3, 2)


OVERLAPPING: dict[str, Callable[[Tensor], Any]] = {
    "diagonal": lambda x: torch.diagonal_scatter(windows(x), windows(x).diagonal() * 2),
    "slice": lambda x: torch.slice_scatter(windows(x), windows(x)[1:2] * 2, 0, 1, 2),
    "select": lambda x: torch.select_scatter(windows(x), windows(x)[1] * 2, 0, 1),
    "strides": lambda x: torch.as_strided_scatter(windows(x), x[:4, 0] * 2, (4,), (7,), 0),
    "turned": lambda x: torch.diagonal_scatter(windows(x.flip(0)), windows(x).diagonal() * 2) + 1,
    "reshaped": lambda x: torch.select_scatter(x.flip(0).reshape(49).unfold(0, 3, 2), x[0, :3] * 2, 0, 1),
    "transposed": lambda x: torch.slice_scatter(windows((x + 1).t()), windows(x)[1:2] * 2, 0, 1, 2),
    "seen by strides": lambda x: torch.as_strided(x.flip(0)[::2], (3, 2), (1, 14), 7) * 2,
    "seen through windows": lambda x: torch.as_strided(windows(x.flip(0)), (3, 2), (1, 14), 7) * 2,
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", OVERLAPPING)
def test_what_is_written_into_shared_memory_shows_at_each_element(name: str, dynamic: bool) -> None:
    check(OVERLAPPING[name], torch.arange(49.0).reshape(7, 7), exact=True, dynamic=dynamic)
    # windows that are only looked at lie in memory, by the strides that they have in eager
    assert bool(externs()) is (name != "seen through windows")


def test_a_scatter_into_what_is_expanded_is_a_kernel() -> None:
    check(lambda x: torch.select_scatter(x[:1].expand(7, 7), x[0] * 2, 0, 1), torch.randn(7, 7), exact=True)
    assert not externs()


@pytest.mark.parametrize("dynamic", [False, True])
def test_memory_that_is_asked_for_by_strides_has_them(dynamic: bool) -> None:
    asked = [((3, 2, 2), (1, 2, 3)), ((1, 1, 12), (5, 20, 10)), ((3, 4), (9, 2)), ((3, 4), (0, 1))]

    def fn(x: Tensor, asked: Any) -> list[Tensor]:
        return [x.new_empty_strided(shape, stride) for shape, stride in asked]

    got = compiled(fn, dynamic=dynamic)(torch.randn(5), asked)
    assert [(tuple(y.shape), y.stride()) for y in got] == asked
