"""Cases for Triton's interpreter, run in a process of their own: `python -m tests.codegen.triton_cases`.

TRITON_INTERPRET must be set before triton is imported. Prints one JSON object: case to what went wrong, empty
where nothing did.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import minifuse  # noqa: F401 - the backend
from benchmarks import gpu
from minifuse.ir import prims
from minifuse.passes import schedule_triton
from minifuse.records import RECORDS
from minifuse.runtime import triton_interpret

CASES: dict[str, Callable[[], str]] = {}


def case(function: Callable[[], str]) -> Callable[[], str]:
    CASES[function.__name__] = function
    return function


def compiled(function: Callable[..., Any], target: str = "triton", dynamic: bool = False, **options: Any) -> Any:
    torch._dynamo.reset()
    RECORDS.clear()
    chosen = {"target": target, "verify": True, **options}
    return torch.compile(function, backend="minifuse", options=chosen, dynamic=dynamic)


def flat(tree: Any) -> list[Tensor]:
    return [tree] if isinstance(tree, Tensor) else [t for item in tree for t in flat(item)]


def same(found: Any, expected: Any, ulps: float = 0) -> str:
    """What differs: dtype, strides, or values by more than `ulps` of the largest magnitude."""
    for k, (a, b) in enumerate(zip(flat(found), flat(expected), strict=True)):
        if (a.dtype, a.shape, a.stride()) != (b.dtype, b.shape, b.stride()):
            return f"result {k}: {a.dtype} {a.shape} {a.stride()}, expected {b.dtype} {b.shape} {b.stride()}"
        if a.is_floating_point():
            scale = float(b.abs().nan_to_num(posinf=0, neginf=0).max()) if b.numel() else 0.0
            near = torch.isclose(a, b, rtol=0, atol=ulps * torch.finfo(b.dtype).eps * scale, equal_nan=True)
            if not bool(near.all()):
                return f"result {k}: off by {float((a.double() - b.double()).abs().nan_to_num().max())} of {scale}"
        elif not torch.equal(a, b):
            return f"result {k}: differs"
    return interpreted()


def interpreted() -> str:
    """Kernels that Triton did not express."""
    left = [str(d) for r in RECORDS for d in r.decisions if d.rule == "interpreted"]
    return "; ".join(left)


def against_eager(function: Callable[..., Any], *args: Any, ulps: float = 0, **options: Any) -> str:
    return same(compiled(function, **options)(*args), function(*args), ulps)


@case
def pointwise_of_every_dtype() -> str:
    problems = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x, y = torch.randn(7, 33).to(dtype), torch.randn(33).to(dtype)
        problems.append(against_eager(lambda x, y: ((x * 2 - y) / 3, (x > y) & (x < 1), x.abs()), x, y))
    return "; ".join(p for p in problems if p)


@case
def integers_wrap_divide_and_shift() -> str:
    def f(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        q = torch.div(x, y, rounding_mode="trunc")
        return x * 3 + y, x // y, x % y, torch.fmod(x, y), q, x & y, x | y, x ^ y, ~x, x > y, x.maximum(y)

    problems = []
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        low = 0 if dtype is torch.uint8 else -100
        x, y = torch.randint(low, 100, (50,)).to(dtype), torch.randint(1, 9, (50,)).to(dtype)
        problems.append(against_eager(f, x, y if dtype is torch.uint8 else -y))
    shifts = torch.tensor([0, 1, 5, 31])
    problems.append(against_eager(lambda a, b: (a << b, a >> b), torch.tensor([-7, 8, -9, 10]), shifts))
    return "; ".join(p for p in problems if p)


@case
def bools_are_logic() -> str:
    a, b = torch.rand(40) > 0.5, torch.rand(40) > 0.5
    return against_eager(lambda a, b: (a & b, a | b, a ^ b, ~a, a.any(), b.all(), torch.where(a, 1.5, b)), a, b)


@case
def special_numbers_pass() -> str:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([0.0, -0.0, 1.0, -1.0, inf, -inf, nan, 3.5])
    y = torch.tensor([1.0, nan, -0.0, inf, 2.0, -inf, 0.0, 2.5])
    return against_eager(
        lambda x, y: (x.maximum(y), x.minimum(y), x.clamp(-1, 1), x.relu(), x.round(), x.floor(), x.sign()), x, y
    )


@case
def casts_round_as_eager() -> str:
    x = torch.randn(200) * 100

    def f(x: Tensor) -> tuple[Tensor, ...]:
        half = (x.bfloat16() * 1.01 + 0.1).float(), (x.half() / 3).float()
        return x.bfloat16(), x.half(), x.int(), x.long(), x.double(), x.bool(), *half

    return against_eager(f, x)


@case
def floats_of_8_bits_are_stored_and_loaded() -> str:
    inf, nan = float("inf"), float("nan")
    x = torch.cat(
        [torch.randn(300) * s for s in (1e-4, 1, 300)] + [torch.tensor([0.0, -0.0, inf, -inf, nan, 464, 61440])]
    )
    codes = torch.arange(256, dtype=torch.uint8)
    problems = []
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        stored = compiled(lambda x, d=dtype: (x * 1).to(d))(x).view(torch.uint8)
        problems.append("" if torch.equal(stored, x.to(dtype).view(torch.uint8)) else f"{dtype} is rounded otherwise")
        problems.append(interpreted() or against_eager(lambda q: q.float() * 2, codes.view(dtype)))
    return "; ".join(p for p in problems if p)


@case
def maths_functions() -> str:
    x = torch.rand(64) * 0.9 + 0.05
    return against_eager(
        lambda x: (x.exp(), x.log(), x.sin(), x.cos(), x.tanh(), x.erf(), x.expm1(), x.log1p(), x.pow(1.7), x.rsqrt()),
        x, ulps=2,
    )  # fmt: skip


@case
def rows_of_many_lengths() -> str:
    problems = []
    for n in (1, 3, 16, 100, 1000, 5000):
        x = torch.randn(5, n)
        problems.append(against_eager(lambda x: (x.sum(1), x.softmax(1), x.amax(1), x.argmax(1)), x, ulps=8))
    return "; ".join(p for p in problems if p)


@case
def blocks_that_end_within_what_a_thread_asks_for() -> str:
    """Sizes that no vector divides: full blocks have no mask, the last one has."""
    problems = []
    for dtype in (torch.float32, torch.bfloat16):
        flat = torch.randn(40_003).to(dtype)
        problems.append(against_eager(lambda x: (x * 2 + 1).relu(), flat, ulps=2))
        rows = torch.randn(6, 20_008).to(dtype)[:, :20_003]  # each begins on 16 bytes
        problems.append(against_eager(lambda x: (x.softmax(1), x * 3), rows, ulps=16))
        problems.append(against_eager(lambda x: x.sum(1), rows.float(), ulps=16))
    misaligned = torch.randn(40_004)[1:]
    problems.append(against_eager(lambda x: x.exp() - x, misaligned, ulps=4))
    return "; ".join(p for p in problems if p)


@case
def a_row_longer_than_a_block() -> str:
    x = torch.randn(600, 40_000)
    return against_eager(lambda x: (x[:2].sum(1), x[:2].log_softmax(1), x[:2].argmin(1)), x, ulps=16)


def _special_rows(n: int) -> Tensor:
    """Rows of nothing but -inf, of one number, with infinity, with NaN, of huge numbers, masked, and plain ones."""
    x = torch.randn(8, n)
    x[0], x[1, 1:], x[2, 5], x[3, -1] = -torch.inf, -torch.inf, torch.inf, torch.nan
    x[4], x[5], x[6, : n - 9] = x[4] * 1e37, -3e38, -torch.inf
    return x


@case
def rows_too_long_to_be_held_are_walked_twice() -> str:
    """Of a length that fills no block, in one launch and in several."""
    problems = []
    for n, programs in ((16_500, schedule_triton.PROGRAMS), (40_000, schedule_triton.PROGRAMS), (40_000, 0)):
        before, schedule_triton.PROGRAMS = schedule_triton.PROGRAMS, programs
        try:
            problems += _long_rows(n)
        finally:
            schedule_triton.PROGRAMS = before
    return "; ".join(p for p in problems if p)


def _long_rows(n: int) -> list[str]:
    def norms(x: Tensor) -> tuple[Tensor, ...]:
        return F.layer_norm(x, [n]), *torch.var_mean(x, 1, correction=0)

    x, finite = _special_rows(n), torch.randn(3, n) + 100
    softmaxes = (lambda x: x.softmax(1), lambda x: (x.log_softmax(1), x.logsumexp(1)), lambda x: x.half().softmax(1))
    problems = [against_eager(f, x, ulps=16) for f in softmaxes]
    found, unfused = (compiled(norms, fusion_fuel=fuel)(finite) for fuel in (None, 0))
    problems.append(same(found, unfused))
    pairs = zip(found, norms(finite.double()), strict=True)
    far = [float((a - b).abs().max() / b.abs().max()) for a, b in pairs]
    return [*problems, f"norms off by {far}" if max(far) > 2e-5 else interpreted()]


@case
def columns_and_whole_tensors() -> str:
    x = torch.randn(150, 40)
    return against_eager(lambda x: (x.sum(0), x.mean(), x.var(0), x.amin(0), (x > 3).any(), x.prod(1)), x, ulps=16)


def _running(x: Tensor) -> tuple[Tensor, ...]:
    y = x.sin() + 1
    return (
        y.cumsum(1) * 2, y.cumsum(0).relu(), x.t().cumsum(0), x[:, ::2].cumsum(-1), x[3].cumprod(0), y.cumsum(1).sum(1),
        x.flip(1).cumsum(1).flip(1), (y / y.sum(1, keepdim=True)).cumsum(1), *x.cummax(1), *y.cummin(0),
    )  # fmt: skip


@case
def scans_of_rows_and_columns() -> str:
    problems = []
    for shape in ((7, 37), (4, 1), (4, 0)):
        x = torch.randn(shape)
        x[2:3, 5:6] = float("nan")
        problems.append(against_eager(_running, x, ulps=64))
        if any(r.stages["memory"].externs for r in RECORDS):
            problems.append("a scan was left to ATen")
    problems.append(same(compiled(_running)(x), compiled(_running, fusion_fuel=0)(x)))
    return "; ".join(p for p in problems if p)


@case
def scans_of_rows_longer_than_a_block() -> str:
    x, row = torch.randn(7, 37), torch.randn(1, 40_000)
    long = against_eager(lambda x: (x.cumsum(1), x.cummin(1).indices), row, ulps=64)
    names = ("ROW_BLOCK", "LONG_BLOCK", "PIECE")
    before = [getattr(schedule_triton, name) for name in names]
    for name, size in zip(names, (16, 8, 32), strict=True):
        setattr(schedule_triton, name, size)
    try:
        unlike = same(compiled(_running)(x), compiled(_running, fusion_fuel=0)(x))
        return long or unlike or against_eager(_running, x, ulps=64)
    finally:
        for name, size in zip(names, before, strict=True):
            setattr(schedule_triton, name, size)


@case
def scans_of_every_dtype() -> str:
    def f(x: Tensor) -> list[Tensor]:
        found = [x.cumsum(1), x.cumsum(0), x.cumprod(1), x.cumsum(1, dtype=torch.float32)]
        found += [x.cumsum(1, dtype=torch.int8)] if x.dtype is torch.int8 else []
        return found if x.dtype is torch.bool else [*found, *x.cummax(1), *x.cummin(0)]

    dtypes = (torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.uint8, torch.bool)
    return "; ".join(p for d in dtypes if (p := against_eager(f, torch.randint(0, 3, (6, 50)).to(d), ulps=4)))


@case
def scans_of_sizes_that_change() -> str:
    f = compiled(lambda x: (x.cumsum(1), x.cumsum(0), *x.cummax(-1)), dynamic=True)
    problems = []
    for shape in ((3, 5), (4, 16), (2, 700), (20, 33), (1, 9), (2, 0)):
        x = torch.randn(shape)
        problems.append(same(f(x), (x.cumsum(1), x.cumsum(0), *x.cummax(-1)), ulps=16))
    return "; ".join(p for p in problems if p)


@case
def reductions_of_nothing() -> str:
    x = torch.randn(4, 0)
    return against_eager(lambda x: ((x * 2).sum(1), (x + 1).prod(1), (x * 2).sum(0), (x > 1).any(1), x.exp()), x)


@case
def functions_of_numbers() -> str:
    """Values that vary over no lane."""
    x, y = torch.tensor(0.3), torch.tensor([7.0])
    return against_eager(
        lambda x, y: (x.exp(), x.cos() + y.log(), torch.fmod(y, x), x.pow(1.7) * y.sum()), x, y, ulps=2
    )


@case
def sizes_that_change() -> str:
    f = compiled(lambda x: ((x * 2 + 1).relu(), x.softmax(-1), x.sum(0), x.sum(), x.t() + 1), dynamic=True)
    problems = []
    for shape in ((9, 31), (40, 120), (33, 64)):
        x = torch.randn(shape)
        expected = ((x * 2 + 1).relu(), x.softmax(-1), x.sum(0), x.sum(), x.t() + 1)
        problems.append(same(f(x), expected, ulps=16))
    return "; ".join(p for p in problems if p)


@case
def sums_beside_sums_over_fewer_axes() -> str:
    x, y, v = torch.randn(1, 7, 30), torch.randn(5, 1, 30), torch.rand(30)

    def f(x: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return F.cosine_similarity(x, y, dim=-1), (x - y).transpose(1, 2).sum(1) / v.sum()

    return same(compiled(f, dynamic=True)(x, y, v), f(x, y, v), ulps=8)


@case
def views_gathers_and_masks() -> str:
    table, at = torch.randn(20, 12), torch.randint(0, 20, (4, 6))

    def f(table: Tensor, at: Tensor) -> tuple[Tensor, ...]:
        e = F.embedding(at, table)
        return e.permute(2, 0, 1) + 1, F.pad(e, (1, 2)), torch.cat([e, e * 2], 1), e.flip(1), e[:, 1:, ::2] * 3

    return against_eager(f, table, at)


@case
def an_index_out_of_range_raises() -> str:
    f = compiled(lambda table, at: F.embedding(at, table) * 2)
    f(torch.randn(5, 4), torch.tensor([0, 4]))
    try:
        f(torch.randn(5, 4), torch.tensor([0, 5]))
    except IndexError as error:
        return "" if "index out of range" in str(error) else str(error)
    return "nothing was raised"


@case
def random_numbers_are_the_same_on_every_target() -> str:
    def draw(kind: str, low: int = 0, high: int = 0, dtype: torch.dtype = torch.float32) -> Callable[[Tensor], Tensor]:
        return lambda seed: prims.random([3, 500], seed, 7, kind, low, high, dtype, torch.device("cpu")) + 0

    problems = []
    for seed in map(torch.tensor, (123456789012345, -1)):
        for function, ulps in (
            (draw("uniform"), 0),
            (draw("integer", 0, 1 << 40, torch.int64), 0),
            (draw("normal"), 4),
        ):
            found = compiled(function)(seed)
            problems.append(same(found, function(seed), ulps))
            problems.append(same(found, compiled(function, target="c")(seed), ulps))
    return "; ".join(p for p in problems if p)


@case
def random_numbers_do_not_depend_on_what_is_beside_them() -> str:
    """A draw alone is of one axis, whose neighbours share blocks of Philox; beside a sum of odd rows none do."""

    def f(x: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
        drawn = prims.random([6, 501], seed, 7, "uniform", 0, 0, torch.float32, torch.device("cpu"))
        bits = prims.random([6, 501], seed, 8, "integer", 0, 1 << 40, torch.int64, torch.device("cpu"))
        return drawn * x, (drawn * x).sum(1), bits + 1

    args = torch.ones(6, 501), torch.tensor(99)
    fused, alone, c = (compiled(f, **o)(*args) for o in ({}, {"fusion_fuel": 0}, {"target": "c"}))
    by_c = same((fused[0], fused[2]), (c[0], c[2])) or same((fused[0], fused[2]), (f(*args)[0], f(*args)[2]))
    return same(fused, alone) or by_c


@case
def statistics_of_few_channels_are_found_before_they_are_applied() -> str:
    x, mean = torch.randn(16, 2, 24, 24), torch.randn(2)

    def renormalised(x: Tensor, mean: Tensor) -> tuple[Tensor, ...]:
        m = x.mean((0, 2, 3))
        y = x - m.view(1, -1, 1, 1) + mean.view(1, -1, 1, 1)
        return y, mean.mul_(0.9).add_(m * 0.1)

    def normalised(x: Tensor, mean: Tensor) -> tuple[Tensor, ...]:
        var = torch.ones_like(mean)
        return F.batch_norm(x, mean, var, None, None, True), mean * 1, var

    problems = []
    for function in (renormalised, normalised):
        found, fuelled, expected = (
            run(x, mean.clone()) for run in (compiled(function), compiled(function, fusion_fuel=0), function)
        )
        problems += [same(found, expected, ulps=64), same(found, fuelled)]
    if not any(d.rule == "split" for r in RECORDS for d in r.decisions):
        problems.append("no launch was split")
    return "; ".join(p for p in problems if p)


@case
def odd_strides_and_offsets() -> str:
    x = torch.randn(9, 40)
    views = (
        x[1:, 3:],
        x[::2, 1::3],
        x.t()[5:],
        torch.randn(300)[1:].as_strided((5, 7), (11, 3), 2),
        x[:, :1].expand(9, 6),
    )

    def f(v: Tensor) -> tuple[Tensor, ...]:
        return v * 2, v.sum(-1), v.flip(0).cumsum(0), v[..., -1] + v[..., 0], v.select(0, -2), v[-3:, 1:-1].exp()

    problems = [against_eager(f, v, ulps=4) for v in views]
    problems.append(same(compiled(f, dynamic=True)(views[1]), f(views[1]), ulps=4))
    return "; ".join(p for p in problems if p)


@case
def negative_indices_wrap() -> str:
    table, at = torch.randn(7, 5), torch.tensor([[-1, 0], [-7, 6]])
    return against_eager(
        lambda table, at: (table[at] * 2, table[:, at[0] % 5], table.t()[-at.abs() % 5 - 5]), table, at
    )


@case
def numbers_that_are_no_sizes_may_be_negative() -> str:
    """Their remainders index memory: those are to round down."""
    x = torch.randn(5, 6)

    def f(x: Tensor, k: int) -> tuple[Tensor, ...]:
        return x.roll(k, 0), x.roll((k, 2 * k), (0, 1)), x.roll(k) * k, torch.arange(k, k + 6)

    run = compiled(f, dynamic=True)
    return "; ".join(p for k in (-2, -7, 3, 0, 11) if (p := same(run(x, k), f(x, k))))


@case
def pooling_pads_and_masked_stores() -> str:
    x = torch.randn(2, 3, 9, 8, requires_grad=True)

    def f(x: Tensor) -> tuple[Tensor, ...]:
        top, at = F.max_pool2d(x, 3, 2, 1, return_indices=True)
        mean = F.avg_pool2d(x, 2, ceil_mode=True)
        padded = F.pad(x, (1, 2, 0, 1), mode="reflect").sum() + F.pad(x, (2, 0), value=1.5).square().mean()
        return top, at, mean, F.adaptive_avg_pool2d(x, (3, 4)), padded, x.slice_scatter(x[..., :2] * 2, 3, 6)

    def run(g: Callable[..., Any]) -> list[Tensor]:
        x.grad = None
        out = g(x)
        sum((o * (k + 1)).sum() for k, o in enumerate(out) if o.is_floating_point()).backward()
        return [*(o.detach() for o in out), x.grad]

    return same(run(compiled(f)), run(f), ulps=16)


@case
def rows_of_two_axes_share_a_kernel() -> str:
    """No value varies over both, so that each is a block of its own; where a kernel is split, so are its pieces."""
    x, y, z = torch.randn(64, 700), torch.randn(64, 900), torch.randn(2, 3, 110)
    sums = against_eager(lambda x, y: x.sum(1) * y.exp().sum(1), x, y, ulps=8)
    return sums or against_eager(
        lambda z: F.pad(z, (2, 1)).sum() + F.pad(z, (0, 5), value=2.0).square().mean(), z, ulps=8
    )


@case
def wide_drops_roundings() -> str:
    x = torch.randn(40, 33).bfloat16()

    def f(x: Tensor) -> Tensor:
        return (x * 1.01 + 0.3).exp().sum(1)

    found, right = compiled(f, widen=True)(x).double(), f(x.double())
    if not any(d.rule == "widen" for r in RECORDS for d in r.decisions):
        return "nothing was widened"
    return "" if (found - right).abs().max() <= 2**-8 * right.abs().max() else "off"


@case
def sizes_of_zero_come_and_go() -> str:
    def f(x: Tensor) -> tuple[Tensor, ...]:
        return x * 2, x.sum(1), x.sum(0), x.cumsum(0), torch.cat([x, x], 0), x.sum(), (x > 0).all()

    run, problems = compiled(f, dynamic=True), []
    for shape in ((5, 7), (0, 7), (6, 0), (3, 9), (1, 1)):
        x = torch.randn(shape)
        problems.append(same(run(x), f(x), ulps=4))
    return "; ".join(p for p in problems if p)


@case
def a_block_trains() -> str:
    torch.manual_seed(0)
    block = nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48), nn.LayerNorm(48))
    x = torch.randn(40, 48)

    def step(model: Callable[[Tensor], Tensor]) -> list[Tensor]:
        block.zero_grad()
        (model(x) * x.sin()).mean().backward()
        return [p.grad.clone() for p in block.parameters() if p.grad is not None]

    return same(step(compiled(block)), step(block), ulps=64)


def _norms(x: Tensor, w: Tensor) -> Tensor:
    y = F.rms_norm(x + x.roll(1, 0), (x.shape[-1],), w)
    return F.dropout(F.gelu(y), 0.2).softmax(-1)


@case
def fusion_changes_no_bit() -> str:
    x, w = torch.randn(9, 40, requires_grad=True), torch.randn(40, requires_grad=True)

    def run(**options: Any) -> list[Tensor]:
        torch.manual_seed(3)
        y = compiled(_norms, **options)(x, w)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), (x, w))]

    return same(run(), run(fusion_fuel=0))


@case
def a_split_reduction_changes_no_bit() -> str:
    rows, columns = torch.randn(2, 40_001), torch.randn(300, 24)

    def f(rows: Tensor, columns: Tensor) -> tuple[Tensor, ...]:
        return rows.sum(1), columns.sum(0), columns.var(0), columns.sum(), rows.var(1), rows.softmax(1)

    few = compiled(f)(rows, columns)
    split = [d for r in RECORDS for d in r.decisions if d.rule == "split"]
    programs = schedule_triton.PROGRAMS
    schedule_triton.PROGRAMS = 0
    try:
        whole = compiled(f)(rows, columns)
    finally:
        schedule_triton.PROGRAMS = programs
    again = [d for r in RECORDS for d in r.decisions if d.rule == "split"]
    return same(few, whole) if split and not again else f"split {split}, then {again}"


@case
def column_sums_ride_along_with_the_rows() -> str:
    """The backward of a norm over a ragged number of blocks: one launch over them, one that joins."""
    x, g, w = torch.randn(85, 56), torch.randn(85, 56), torch.randn(56)

    def f(x: Tensor, g: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        h, n = g * w, x * x.square().mean(1, keepdim=True).rsqrt()
        return h - n * (h * n).mean(1, keepdim=True), (g * n).sum(0), g.sum(0)

    least = schedule_triton.LEAST_ROWS
    schedule_triton.LEAST_ROWS = 64
    try:
        found = compiled(f)(x, g, w)
    finally:
        schedule_triton.LEAST_ROWS = least
    launches = [launch.name for launch in RECORDS[-1].stages["memory"].launches]
    if len(launches) != 2:
        return f"launches {launches}"
    return same(found, compiled(f, fusion_fuel=0)(x, g, w))


@case
def a_batch_of_tensors_changes_no_bit() -> str:
    """Tensors of many sizes, none, one, and one that begins between two multiples of 16 bytes."""
    memory = torch.randn(200)
    sizes = ((3, 7), (64,), (16, 16), (0, 4), (1,), (2000,), (5, 5))
    xs = [*(torch.randn(s) for s in sizes), memory[1:65], memory[65:193].view(8, 16)]
    written = [torch.zeros_like(x) for x in xs]
    count = torch.tensor(2.0)

    def f(xs: list[Tensor], written: list[Tensor], count: Tensor) -> list[Tensor]:
        for w, x in zip(written, xs, strict=True):
            w.add_(x * 2 / count)
        return [x.sin() + count for x in xs]

    found = compiled(f)(xs, written, count)
    launches = RECORDS[-1].stages["memory"].launches
    if not any(len(launch.sizes) > 3 for launch in launches):
        return f"{len(launches)} launches, none of them a batch of more than three"
    before, written = written, [torch.zeros_like(x) for x in xs]
    return same([found, before], [compiled(f, fusion_fuel=0)(xs, written, count), written])


@case
def a_batch_serves_every_size() -> str:
    f = compiled(lambda xs: [(x * 2).exp() for x in xs], dynamic=True)
    for n in (4, 16, 37):
        xs = [torch.randn(n, 16), torch.randn(n), torch.randn(2, n, 8), torch.randn(n, n)]
        if wrong := same(f(xs), [(x * 2).exp() for x in xs], ulps=4):
            return f"{n}: {wrong}"
    launches = RECORDS[-1].stages["memory"].launches
    return "" if len(launches) < 4 else f"{len(launches)} launches"


@case
def equal_reductions_are_one_launch() -> str:
    xs = [torch.randn(40, 24) for _ in range(3)]
    found = compiled(lambda xs: [x.sum(0) for x in xs])(xs)
    launches = RECORDS[-1].stages["memory"].launches
    return same(found, [x.sum(0) for x in xs], ulps=16) if len(launches) == 1 else f"{len(launches)} launches"


# Each extent of the GPU benchmark's rows as a small one that no vector and no block divides (what halves a row or has
# groups needs an even one, or some of each), and as one.
ODD = {
    16384: 37, 14336: 29, 32768: 13, 1024: 35, 4096: 131, 8192: 7, 131_072: 17_003, 128_256: 16_391, 8: 2, 32: 3,
    128: 10, 124_000_000: 1003, 64: 3, 256: 64, 56: 5, 1152: 33, 1 << 28: 40_001,
}  # fmt: skip
ONE = {n: {128: 2, 256: 32, 64: 2}.get(n, 1) for n in ODD}


def _at_any_address(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(prod(shape) + 1).to(dtype)[1:].view(shape)


def _every_other(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., ::2]


def _plain(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype)


MADE: dict[str, tuple[dict[int, int], Callable[[tuple[int, ...], torch.dtype], Tensor]]] = {
    "odd": (ODD, _plain), "misaligned": (ODD, _at_any_address), "strided": (ODD, _every_other), "one": (ONE, _plain),
    "none": ({**ODD, 32768: 0, 8192: 0, 16384: 0, 64: 0, 8: 0}, _plain),
}  # fmt: skip


def _row(row: gpu.Row, kind: str, target: str) -> list[Tensor]:
    """What a row gives and leaves in its inputs, or its gradients."""
    extents, make = MADE[kind]
    torch.manual_seed(0)
    given = [make(tuple(extents[n] for n in shape), row.dtype).requires_grad_(row.train) for shape in row.shapes]
    torch.manual_seed(1)
    found = row.run(*given) if target == "eager" else compiled(row.run, target)(*given)
    if row.train:
        torch.manual_seed(2)
        return [found.detach(), *torch.autograd.grad(found, given, torch.randn_like(found))]
    return [*([] if found is None else [found]), *given]


@case
def rows_of_the_gpu_benchmark_at_odd_shapes() -> str:
    problems = []
    for row in gpu.ROWS:
        for kind in MADE:
            try:
                _row(row, kind, "eager")
            except (RuntimeError, ValueError):
                continue  # a batch norm of one value a channel
            if why := same(_row(row, kind, "triton"), _row(row, kind, "interpret"), ulps=8):
                problems.append(f"{row.name}, {kind}: {why}")
    return "; ".join(problems)


@case
def helpers_run_as_they_are_written() -> str:
    """Reductions without the stand-ins that save time in the other cases."""
    kept = dict(triton_interpret.STAND_INS)
    triton_interpret.STAND_INS.clear()
    try:
        with tempfile.TemporaryDirectory() as folder:
            x = torch.randn(3, 12)
            x[1, 4] = float("nan")
            f = compiled(lambda x: (x.amax(1), x.amin(1), x.argmax(1), x.argmin(1), (x > 1).any(1)), cache_dir=folder)
            return same(f(x), (x.amax(1), x.amin(1), x.argmax(1), x.argmin(1), (x > 1).any(1)))
    finally:
        triton_interpret.STAND_INS.update(kept)


def main() -> None:
    found = {}
    for name, function in CASES.items():
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        torch.manual_seed(0)
        started = time.perf_counter()
        try:
            found[name] = function()
        except Exception:
            found[name] = traceback.format_exc()[-3000:]
        print(f"{name}: {time.perf_counter() - started:.1f} s", file=sys.stderr)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
