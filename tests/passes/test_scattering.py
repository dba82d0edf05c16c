"""Scatters in generated C: eager's bits, whatever is fused, and in the memory that the program writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from minifuse.ir.parse import parse_kernel
from minifuse.ir.text import print_kernel, print_plan
from minifuse.ir.verify import VerificationError, verify_kernel
from tests.judge import check, compiled, externs, kernels, records, same

aten = torch.ops.aten
TABLE = torch.randn(50, 24)
TOKENS = torch.randint(0, 50, (3, 7))
ROWS, COLUMNS = torch.randint(0, 50, (30, 24)), torch.randint(0, 24, (50, 30))
ENDS, GRADIENT = torch.tensor([1, 2, 1, -1]), torch.randn(3, 7, 24)
INTS = torch.randint(-9, 9, (50, 24), dtype=torch.int32)

CASES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "embedding": (lambda g, t: aten.embedding_dense_backward(g * 2 + 1, t, 50, 3, False), (GRADIENT, TOKENS)),
    "bfloat16": (lambda g, t: aten.embedding_dense_backward(g, t, 50, -1, False), (GRADIENT.bfloat16(), TOKENS)),
    "index_put": (lambda x, i, v: x.index_put((i,), v * 2, accumulate=True), (TABLE, TOKENS, GRADIENT)),
    "two": (lambda x, i, v: x.index_put((i, i % 24), v, accumulate=True) + 1, (TABLE, TOKENS, torch.randn(3, 7))),
    "apart": (lambda x, i, v: aten.index_put(x, [i, None, i % 24], v, True),
              (torch.randn(50, 4, 24), TOKENS, torch.randn(3, 7, 4))),
    "beside": (lambda x, i, j: aten.index_put(x, [i[:, None], j], torch.ones(()), True),
               (TABLE, TOKENS[:, 0], torch.tensor([1, -1]))),
    "columns": (lambda x, j, v: aten.index_put(x, [None, j], v, True), (TABLE, ENDS, torch.randn(50, 4))),
    "last": (lambda x, i, v: x.index_put((i,), v), (TABLE, ENDS, torch.randn(4, 24))),
    "mask": (lambda x: x.index_put((x > 0,), torch.tensor(5.0)), (TABLE,)),
    "index_add": (lambda x, i, v: x.index_add(1, i, v, alpha=2), (TABLE, ENDS.abs(), torch.randn(50, 4))),
    "index_copy": (lambda x, i, v: x.index_copy(0, i, v), (TABLE, torch.tensor([1, 2, 0]), torch.randn(3, 24))),
    "index_fill": (lambda x, i: x.index_fill(0, i, 3.0), (TABLE, torch.tensor([1, 2, 0]))),
    "scatter_add": (lambda x, i, v: x.scatter_add(0, i, v * 3), (TABLE, ROWS, torch.randn(30, 24))),
    "along rows": (lambda x, i, v: x.scatter_add(1, i, v * 3), (TABLE, COLUMNS, torch.randn(50, 40))),
    "one dimension": (lambda x, i, v: x.scatter_add(0, i, v), (torch.zeros(30), ROWS[0] % 30, torch.randn(24))),
    "integers": (lambda x, i, v: x.scatter_add(0, i, v), (INTS, ROWS, INTS[:30])),
    "scatter": (lambda x, i, v: x.scatter(1, i, v), (TABLE, COLUMNS, torch.randn(50, 30))),
    "value": (lambda x, i: x.scatter(1, i, 7.0), (TABLE, COLUMNS)),
    "one place": (lambda x: x.scatter_add(0, torch.zeros(50, 24, dtype=torch.long), x * 2), (TABLE,)),
    "nothing": (lambda x, i, v: x.scatter_add(0, i, v), (TABLE, ROWS[:0], torch.randn(0, 24))),
    **{
        f"{kind} {reduce} {'' if own else 'alone'}": (
            lambda x, i, v, r=reduce, o=own: x.scatter_reduce(0, i, v, r, include_self=o), (x, ROWS, v))
        for kind, x, v in (("f32", TABLE, torch.randn(30, 24)), ("i32", INTS, INTS[:30]))
        for reduce in ("sum", "prod", "amax", "amin", "mean") for own in (True, False)
    },
}  # fmt: skip


# Some cases in one function, so that one compile serves all of them.
PARTS = [list(CASES)[k::4] for k in range(4)]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("names", PARTS, ids=" and ".join)
def test_scatters_have_eagers_bits_however_they_are_fused(names: list[str], dynamic: bool) -> None:
    def together(*given: tuple[Tensor, ...]) -> list[Tensor]:
        return [CASES[name][0](*args) for name, args in zip(names, given, strict=True)]

    args = [CASES[name][1] for name in names]
    got = check(together, *args, dynamic=dynamic, exact=True)
    assert not externs()
    same(compiled(together, {"fusion_fuel": 0}, dynamic=dynamic)(*args), got, exact=True)
    same(compiled(together, {"target": "interpret"}, dynamic=dynamic)(*args), got, exact=True)


def test_a_gradient_of_an_embedding_takes_in_what_feeds_it() -> None:
    fn, args = CASES["embedding"]
    check(fn, *args)
    assert kernels() == 2  # zeros, parallel over all of the table; then the tokens, one behind the other
    text = print_plan(records()[0].stages["memory"])
    assert "add =" in text and "over i0" in text


def test_what_is_scattered_is_not_fused_with_its_readers_and_says_so() -> None:
    check(lambda x, i, v: x.scatter_add(0, i, v).sin(), TABLE, ROWS, torch.randn(30, 24), tolerance=1e-6)
    assert [d for r in records() for d in r.decisions if d.rule == "scattered" and not d.taken]


def test_a_cache_that_is_written_is_not_copied() -> None:
    def step(cache: Tensor, at: Tensor, keys: Tensor) -> Tensor:
        cache.index_copy_(2, at, keys * 2)
        return (cache @ cache.transpose(-1, -2)).sum(-1)

    args = torch.randn(2, 4, 16, 8), torch.tensor([5]), torch.randn(2, 4, 1, 8)
    mine, theirs = args[0].clone(), args[0].clone()
    same(compiled(step)(mine, *args[1:]), step(theirs, *args[1:]), tolerance=1e-5)
    assert torch.equal(mine, theirs)
    (scatter,) = [step for step in records()[0].stages["memory"].launches if step.kernel.joins]
    assert not any(s.param not in scatter.kernel.joins for s in scatter.kernel.stores)
    assert kernels() == 2  # the scatter and the sum


def test_a_result_that_is_returned_too_is_its_own_memory() -> None:
    def step(cache: Tensor, at: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        new = cache.index_put((at,), keys)
        before = cache.sum()
        cache.copy_(new)
        return new, before

    args = torch.randn(16, 8), torch.tensor([5]), torch.randn(1, 8)
    mine, theirs = args[0].clone(), args[0].clone()
    got = compiled(step)(mine, *args[1:])
    same(got, step(theirs, *args[1:]), tolerance=1e-5)
    assert torch.equal(mine, theirs) and got[0].data_ptr() != mine.data_ptr()


def test_an_old_value_that_is_read_later_is_kept() -> None:
    def step(cache: Tensor, at: Tensor, keys: Tensor) -> Tensor:
        old = cache[1:]
        new = cache.index_put((at,), keys)
        cache.copy_(new)
        return new @ keys.t() + old.sum()

    args = torch.randn(16, 8), torch.tensor([5]), torch.randn(1, 8)
    same(compiled(step)(args[0].clone(), *args[1:]), step(args[0].clone(), *args[1:]), tolerance=1e-5)


def test_rows_of_a_cache_that_change_places_are_read_before_they_are_written() -> None:
    def step(cache: Tensor, at: Tensor) -> None:
        cache.copy_(cache.index_copy(0, at, cache[:3]))

    cache = torch.randn(16, 8)
    mine, theirs = cache.clone(), cache.clone()
    step(theirs, torch.tensor([1, 2, 0]))
    compiled(step)(mine, torch.tensor([1, 2, 0]))
    assert torch.equal(mine, theirs)


def test_a_place_out_of_range_writes_nothing_into_the_callers_memory() -> None:
    def step(cache: Tensor, at: Tensor, keys: Tensor) -> None:
        cache.index_copy_(0, at, keys)

    cache, run = torch.zeros(16, 8), compiled(step)
    run(cache, torch.tensor([5]), torch.ones(1, 8))
    before = cache.clone()
    with pytest.raises(IndexError):
        run(cache, torch.tensor([16]), torch.ones(1, 8))
    assert torch.equal(cache, before)


@pytest.mark.parametrize("bad", [50, -51])
def test_a_place_out_of_range_raises_as_in_eager(bad: int) -> None:
    run: Any = compiled(lambda x, i, v: x.index_put((i,), v, accumulate=True))
    with pytest.raises(IndexError, match="out of bounds"):
        run(TABLE, torch.tensor([0, bad]), torch.randn(2, 24))


SCATTER = """kernel add_rows   i < 4, j < 3
param at : i64[4]
param rows : f32[4, 3]
param out : f32[9, 3]
v0 : i64[i] = load at[i]
store out[v0, j] add = load rows[i, j] over i if lt(v0, 7)
"""


def test_a_scatter_reads_back_from_its_text() -> None:
    kernel = parse_kernel(SCATTER)
    verify_kernel(kernel)
    assert parse_kernel(print_kernel(kernel)) == kernel
    assert kernel.joins == ("out",) and kernel.reads == ("at", "rows", "out")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [(" over i", "", "scattered over None"), ("add =", "=", "needs a mode"), ("add =", "xor =", "no mode 'xor'")],
)
def test_a_scatter_that_says_too_little_is_refused(old: str, new: str, message: str) -> None:
    with pytest.raises((VerificationError, ValueError), match=message):
        verify_kernel(parse_kernel(SCATTER.replace(old, new)))


@pytest.mark.parametrize("reduce", ["sum", "prod", "amax", "amin"])
def test_booleans_are_reduced_by_aten(reduce: str) -> None:
    x, at = torch.rand(20) > 0.5, torch.randint(0, 20, (20,))
    run = compiled(lambda x, at: x.scatter_reduce(0, at, x, reduce, include_self=False))
    assert torch.equal(run(x, at), x.scatter_reduce(0, at, x, reduce, include_self=False))
