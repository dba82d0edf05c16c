"""What runs across the rows of memory is read and written tile by tile, each line once; no bit depends on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from minifuse.records import RECORDS


def run(fn: Callable[..., Tensor], *args: Tensor, dynamic: bool = False) -> tuple[Tensor, str]:
    torch._dynamo.reset()
    out = torch.compile(fn, backend="minifuse", dynamic=dynamic)(*args)
    return out, RECORDS[-1].stages["unit"].source


def add_turned(x: Tensor, y: Tensor) -> Tensor:
    return x + y.transpose(-1, -2)


@pytest.mark.parametrize("shape", [(64, 256), (100, 300), (1, 17), (300, 20), (65, 257), (513, 1031), (3, 70, 90)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.int64])
def test_a_transposed_operand_is_eagers(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (torch.randn(shape) * 20).to(dtype)
    y = (torch.randn(*shape[:-2], shape[-1], shape[-2]) * 20).to(dtype)
    out, _ = run(add_turned, x, y)
    assert torch.equal(out, add_turned(x, y))


def test_its_tile_is_turned_once_in_front_of_its_loops() -> None:
    x, y = torch.randn(1000, 2000), torch.randn(2000, 1000)
    out, source = run(add_turned, x, y)
    assert torch.equal(out, add_turned(x, y))
    assert "mf_stage_f32(" in source and "mf_loads_f32(" not in source.split("static void k_")[-1]


@pytest.mark.parametrize("shape", [(7, 9), (130, 270), (1000, 2000)])
def test_a_transpose_itself_a_part_of_one_and_several_at_once(shape: tuple[int, int]) -> None:
    x = torch.randn(shape)
    for fn in (
        lambda x: x.t().contiguous(),
        lambda x: x[1:, 2:].t() * 2 + x[1:, 2:].t().exp(),
        lambda x: (x * 2).t().contiguous() + x.sin().t(),
    ):
        out, _ = run(fn, x)
        torch.testing.assert_close(out, fn(x))


def two_turned(x: Tensor, y: Tensor) -> Tensor:
    return (x * 2 + y.sin() + x.mul(y)).transpose(-1, -2).contiguous()


@pytest.mark.parametrize("shape", [(64, 256), (100, 300), (17, 1), (300, 20), (65, 257), (513, 1031), (3, 70, 90)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_transposed_result_of_several_operands_is_the_plain_ones(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, y = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    out, _ = run(two_turned, x, y)
    plain, _ = run(lambda x, y: x * 2 + y.sin() + x.mul(y), x, y)
    assert torch.equal(out, plain.transpose(-1, -2))


def test_a_stored_tile_is_turned_once_behind_its_loops() -> None:
    out, source = run(two_turned, torch.ones(1000, 2000), torch.ones(1000, 2000))
    loops = source.split("static void k_")[-1]
    assert "mf_stage_f32(p" in loops and "mf_stores_f32(" not in loops
    assert out.shape == (2000, 1000)


def test_sizes_known_at_the_call() -> None:
    torch._dynamo.reset()
    f = torch.compile(add_turned, backend="minifuse", dynamic=True)
    for n, m in ((40, 50), (300, 20), (33, 1000), (1000, 700)):
        x, y = torch.randn(n, m), torch.randn(m, n)
        assert torch.equal(f(x, y), add_turned(x, y))


def test_any_number_of_threads_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(500, 600), torch.randn(600, 500)
    found: list[Any] = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(add_turned, x, y)[0])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(out, found[0]) for out in found)
