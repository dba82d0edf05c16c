"""Numbers at the edges, bit for bit as eager: NaN, infinities, signed zeros, denormals, integers that do not fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import minifuse

from .judge import compiled, same

INF, NAN = math.inf, math.nan
SPECIAL = torch.tensor(
    [NAN, INF, -INF, -0.0, 0.0, 1e-41, -1e-41, 1.0, -2.5, 3.4e38, -3.4e38, 2.0**31, -(2.0**31), 2.0**63, -(2.0**63),
     300.7, -300.7, 255.5, 256.0, -1.0, 127.5, -128.9, 1e10] * 2
)  # fmt: skip
ROWS = torch.tensor([[1.0, NAN, 3.0], [NAN, NAN, 2.0], [INF, -INF, 0.0], [-INF, -INF, -INF], [2.0, 2.0, 1.0]])
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


def identical(fn: Callable[..., Any], *args: Any) -> None:
    """Values and the signs of zeros."""
    want, got = fn(*args), compiled(fn, dynamic=False)(*args)
    same(got, want, exact=True)
    for a, b in zip(got, want, strict=True):
        if b.is_floating_point():
            real = ~b.isnan()
            assert torch.equal(a.signbit()[real], b.signbit()[real])


def extremes(dtype: torch.dtype) -> Tensor:
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    return torch.tensor([low, high, 0, 1, 2, 3, high - 1, low + 1, 5, 7, high // 2] * 3, dtype=dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_casts_of_what_does_not_fit(dtype: torch.dtype) -> None:
    identical(lambda x: [x.to(t) for t in (*INTEGERS, torch.bool, *FLOATS)], SPECIAL.to(dtype))


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_casts_of_integers_that_do_not_fit(dtype: torch.dtype) -> None:
    identical(lambda x: [x.to(t) for t in (*INTEGERS, torch.bool, *FLOATS)], extremes(dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bounds_keep_the_sign_of_zero_and_pass_nan_on(dtype: torch.dtype) -> None:
    identical(
        lambda x: [x.relu(), x.clamp(min=0.0), x.clamp(max=-0.0), x.clamp(NAN, 1.0), x.clamp(0.0, NAN), x.clamp(2, 1),
                   x.abs(), -x, x.sign(), x.trunc(), x.round(), x == 0, x.signbit(), x.nan_to_num(), x.isfinite()],
        SPECIAL.to(dtype),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)
def test_nan_and_ties_in_reductions(dtype: torch.dtype) -> None:
    identical(
        lambda x: [*x.max(-1), *x.min(-1), x.amax(-1), x.argmax(-1), x.argmin(-1), x.argmax(), x.argmax(0), x.sum(-1),
                   x.prod(-1), x.any(-1), x.all(-1), *x.cummax(-1), *x.cummin(-1), *x.sort(dim=-1, stable=True)],
        ROWS.to(dtype),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integers_wrap_and_numbers_beside_them_are_eagers(dtype: torch.dtype) -> None:
    shifts = torch.tensor([0, 1, 7, 8, 15, 31, 32, 63, 64, 65, 100] * 3).to(dtype)
    identical(
        lambda x, y, s: [x + y, x - y, x * y, -x, x * 100003, x + 1000, x**5, x << s, x >> s, x << 3, x << 70, x >> 70,
                         x == -1, x < 300, x < 2.5, x & -2, x | 256, 5 - x, x.abs(), x.sum(), x.sum(dtype=dtype),
                         x.prod(), x.cumsum(0), x.clamp(2, 100), x // 2.5, x % 1.5,
                         torch.where(x > 1, x, -1), torch.maximum(x, y), torch.full_like(x, 3.7)],
        extremes(dtype), extremes(dtype).flip(0), shifts,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integer_quotients_at_the_ends_of_the_range(dtype: torch.dtype) -> None:
    x = extremes(dtype)
    y = x.flip(0)
    y = torch.where((y == 0) | (y.to(torch.int64) == -1), 3, y)  # by zero eager raises, by -1 the lowest one traps
    identical(
        lambda x, y: [x // y, x % y, torch.fmod(x, y), torch.div(x, y, rounding_mode="trunc"), x / y, x // 3, x % 5],
        x,
        y,
    )


@pytest.mark.parametrize("by", ["//", "%", "fmod"])
def test_division_by_a_literal_zero_raises_but_of_nothing(by: str) -> None:
    def divide(x: Tensor) -> Tensor:
        return torch.fmod(x, 0) if by == "fmod" else x // 0 if by == "//" else x % 0

    run = compiled(lambda x: divide(x) + 1, dynamic=False)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        divide(torch.arange(5))
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        run(torch.arange(5))
    assert run(torch.arange(0)).shape == (0,)


def test_a_range_of_integers_takes_its_ends_for_integers() -> None:
    identical(
        lambda x: [torch.arange(0.1, -7.9, -4.0, dtype=torch.int64) + x, torch.arange(-1.5, 3, 1.5).int()],
        SPECIAL[:1].long() * 0,
    )


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_memory_that_is_not_aligned_to_its_elements(offset: int) -> None:
    x = torch.frombuffer(bytearray(4 * 101), dtype=torch.float32, offset=offset, count=100)
    x.copy_(torch.arange(100) / 7)
    y = x.clone()

    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        out = x * 2 + 1
        x.mul_(3)
        return out, x.amax()

    same(compiled(f)(x), f(y), exact=True)
    same(x.clone(), y, exact=True)


def test_a_number_that_does_not_fit_raises_as_eager() -> None:
    x = torch.arange(250, 256).to(torch.uint8)
    for f in (
        lambda x: x.clamp(2, 300),
        lambda x: torch.full((2,), 300, dtype=torch.uint8),
        lambda x: torch.add(x, x, alpha=300),
        lambda x: F.pad(x, [1, 1], value=300),
        lambda x: x.half().clamp(-1e6, 1e6),
        lambda x: torch.full((2,), 1e39),
    ):
        for run in (f, compiled(f, dynamic=False)):
            with pytest.raises(RuntimeError, match="without overflow"):
                run(x)
    identical(lambda x: [x - 300, x == 300, x.clamp(min=2), torch.full_like(x, -1), x.half() + 1e6], x)


def test_short_rows_that_are_walked_twice_read_what_is_theirs() -> None:
    """A compiler took the address of a masked row, the same in each turn of the loop, from that loop's counter."""

    def f(a: Tensor, g: Tensor, most: Tensor, b: Tensor, c: Tensor, d: Tensor, e: Tensor) -> Tensor:
        best = (a.abs() == most.unsqueeze(1)) | a.isnan()
        share = (g / best.sum(1)).unsqueeze(1) * best
        return a.sign() * share + b + c.mT + d + F.pad(e.unsqueeze(0), (0, 0, 0, 0, 0, 1))

    a = torch.randn(2, 4, 4)
    more = [torch.randn(2, 4, 4) for _ in range(3)]
    args = (a, torch.ones(2, 4), a.abs().amax(1), *more, torch.randn(4, 4))
    same(compiled(f)(*args), f(*args))


def test_the_caller_s_floating_point_unit_is_as_it_was() -> None:
    """A compiler kept integers in MMX registers: from then on `fmod` in the C library gave NaN."""
    x = torch.randn(2, 2, 3, 6).to(memory_format=torch.channels_last).requires_grad_()
    pooled = compiled(lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True, return_indices=True), dynamic=True)
    for step in (lambda: pooled(x), lambda: pooled(x)[0].sum().backward()):
        step()
        assert not torch.arange(50, dtype=torch.float64).remainder(7).isnan().any()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float64])
def test_the_place_of_an_extremum_is_found_in_generated_code(dtype: torch.dtype) -> None:
    x = (torch.randn(48, 129) * 100).to(dtype)
    identical(lambda x: [x.argmax(), x.argmin(1), x.max(0).indices, x.argmax(1, keepdim=True)], x)
    assert not minifuse.reports()[-1].interpreted


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (3,)])
@pytest.mark.parametrize("grad", [False, True])
def test_what_is_turned_round_is_a_tensor_of_its_own_whatever_its_size(shape: tuple[int, ...], grad: bool) -> None:
    def fn(x: Tensor) -> tuple[Tensor, ...]:
        y = x * 2
        dims = [0] if x.dim() else []
        return x.flip(dims), x.view(-1), y, y.flip(dims)

    x = torch.randn(shape, requires_grad=grad)
    found, wanted = compiled(fn)(x), fn(x)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)
    everything = [[t.untyped_storage().data_ptr() for t in (x, *some)] for some in (found, wanted)]
    one, other = ([[p == q for q in row] for p in row] for row in everything)
    assert one == other
