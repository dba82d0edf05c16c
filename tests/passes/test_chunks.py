"""Column sums in the launch that walks the rows, results over what dies, and the order of steps: what is planned, and
that no bit changes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minifuse import capture
from minifuse.ir.index import ONE, Axis, as_expr
from minifuse.ir.interpret import run_plan
from minifuse.ir.kernel import Kernel, Store
from minifuse.ir.plan import Buffer, Extern, Launch, Plan, TensorRef
from minifuse.ir.shape import product
from minifuse.ir.value import Load, Op
from minifuse.options import Options
from minifuse.passes.context import CompileContext
from minifuse.passes.memory import place
from minifuse.records import RECORDS
from minifuse.runtime.program import deterministic
from tests.judge import compiled, same

ROWS = (512, 517, 300, 255, 64)  # whole chunks, a ragged last one, too few for chunks


def layer_norm_backward(x: Tensor, g: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    mean, rstd = x.mean(1, keepdim=True), x.var(1, keepdim=True).add(1e-5).rsqrt()
    n = (x - mean) * rstd
    h = g * w
    dx = rstd * (h - h.mean(1, keepdim=True) - n * (h * n).mean(1, keepdim=True))
    return dx, (g * n).sum(0), g.sum(0)


def bias_gelu_backward(x: Tensor, g: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    y = torch.ops.aten.gelu_backward(g, x + w)
    return y, y.sum(0)


def embedded_rows(x: Tensor, g: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    table = w * torch.arange(3, dtype=w.dtype)[:, None]
    picked = F.embedding(x[:, 0].abs().long() % 3, table)
    return picked * x, (picked * x).amax(0), (picked + w).sum(0) + w


CASES = (layer_norm_backward, bias_gelu_backward, embedded_rows)


def last_plan() -> Plan:
    return RECORDS[-1].stages["memory"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda f: f.__name__)
def test_no_bit_depends_on_the_chunks(case: Any, dtype: torch.dtype) -> None:
    """One graph of the case for each number of rows: compiling is what takes the time."""

    def every(*args: Tensor) -> tuple[Tensor, ...]:
        return tuple(result for k in range(0, len(args), 3) for result in case(*args[k : k + 3]))

    threads = torch.get_num_threads()
    args = [t.to(dtype) for rows in ROWS for t in (torch.randn(rows, 96), torch.randn(rows, 96), torch.randn(96))]
    want = compiled(every, {"fusion_fuel": 0})(*args)
    for fuel in (None, 1, 3, 8, 21):
        same(compiled(every, {"fusion_fuel": fuel})(*args), want, exact=True)
    try:
        torch.set_num_threads(2)
        same(compiled(every)(*args), want, exact=True)
    finally:
        torch.set_num_threads(threads)
    same(compiled(every, {"target": "interpret"})(*args), want, tolerance=2e-2 if dtype is torch.bfloat16 else 1e-3)
    close = {torch.float32: 1e-3, torch.bfloat16: 1.0, torch.float64: 1e-9}[dtype]
    for a, b in zip(want, every(*[t.double() for t in args]), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=close, atol=close * 5)


@pytest.mark.parametrize("case", CASES, ids=lambda f: f.__name__)
def test_a_dynamic_number_of_rows_is_one_program(case: Any) -> None:
    f, fuelless = (
        compiled(case, dynamic=True),
        torch.compile(case, backend="minifuse", dynamic=True, options={"fusion_fuel": 0}),
    )
    for rows in (700, 513, 3, 1):
        args = (torch.randn(rows, 40), torch.randn(rows, 40), torch.randn(40))
        same(f(*args), fuelless(*args), exact=True)


@pytest.mark.parametrize("rows", [512, 517])
def test_a_norms_backward_is_one_pass_over_its_data(rows: int) -> None:
    compiled(layer_norm_backward)(torch.randn(rows, 96), torch.randn(rows, 96), torch.randn(96))
    first, join = last_plan().launches
    assert join.name.endswith("_join") and len(join.writes) == 2
    assert len(list(first.kernel.reductions)) == 7 and len(list(first.kernel.stores)) == 3
    masked = [s for s in first.kernel.stores if s.mask is not None]
    assert bool(masked) is (rows % 64 != 0)


def test_few_rows_keep_their_columns_apart_and_the_reason_is_recorded() -> None:
    compiled(layer_norm_backward)(torch.randn(128, 512), torch.randn(128, 512), torch.randn(512))
    assert not any(launch.name.endswith("_join") for launch in last_plan().launches)
    refused = [d for r in RECORDS for d in r.decisions if not d.taken and d.rule == "loses parallelism"]
    assert refused and all("independent rows" in d.words for d in refused)


def test_what_a_chunked_kernel_cannot_walk_is_refused() -> None:
    def f(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        z = x * 2
        return z, z.sum(0), (x[:256] + y).exp()

    compiled(f)(torch.randn(512, 128), torch.randn(256, 128))
    same(f(*(a := (torch.randn(512, 128), torch.randn(256, 128)))), compiled(f)(*a), tolerance=1e-3)


# -- results over what dies -------------------------------------------------------------------------
def reuses(plan: Plan) -> dict[str, str]:
    return {b.name: b.reuses for b in plan.buffers.values() if b.reuses is not None}


def test_a_result_takes_the_memory_of_what_it_is_computed_from() -> None:
    def f(x: Tensor, w: Tensor) -> Tensor:
        return (x @ w).relu()

    x, w = torch.randn(300, 300), torch.randn(300, 300)
    same(compiled(f)(x, w), f(x, w))
    (taken,) = reuses(last_plan()).items()
    assert taken == ("relu", "mm")


@pytest.mark.parametrize(
    "fn",
    [
        lambda x, w: ((y := x @ w), y.relu()),  # still the user's
        lambda x, w: (x @ w).t().contiguous(),  # another element
        lambda x, w: (y := x @ w) - y.flip(0),  # another element too
        lambda x, w: (x @ w).double(),
        lambda x, w: (x @ w).sum(),
    ],
    ids=["returned", "transposed", "flipped", "wider", "sum"],
)
def test_memory_that_is_needed_stays(fn: Any) -> None:
    x, w = torch.randn(300, 300), torch.randn(300, 300)
    same(compiled(fn)(x, w), fn(x, w), tolerance=1e-3)
    assert not reuses(last_plan())


def test_inputs_and_saved_values_are_never_overwritten() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(300, 300), torch.nn.GELU(), torch.nn.Linear(300, 300))
    x = torch.randn(300, 300, requires_grad=True)
    before = x.detach().clone()
    loss = compiled(model)(x).square().sum()
    first = torch.autograd.grad(loss, [x, *model.parameters()], retain_graph=True)
    second = torch.autograd.grad(loss, [x, *model.parameters()])
    same(first, second, exact=True)
    assert torch.equal(x, before)
    for record in RECORDS:
        plan = record.stages["memory"]
        given = {n for n, b in plan.buffers.items() if b.storage in ("input", "constant")}
        assert given.isdisjoint(reuses(plan).values())


def test_a_custom_operator_may_keep_what_it_was_given() -> None:
    kept: list[Tensor] = []

    @torch.library.custom_op("chunks::keep", mutates_args=())
    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x.sum()

    keep.register_fake(lambda x: x.new_empty(()))

    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.sin()
        return keep(y), y @ y + (y + 1)

    x = torch.randn(300, 300)
    compiled(f)(x)
    torch.testing.assert_close(kept[-1], x.sin())


# -- the order of steps -----------------------------------------------------------------------------
def test_a_weights_gradient_comes_before_the_inputs_where_it_frees_more() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.GELU(), torch.nn.Linear(512, 64))
    compiled(model)(torch.randn(4096, 64)).square().sum().backward()
    plan = last_plan()
    products = [s for s in plan.steps if isinstance(s, Extern) and "mm" in str(s.target)]
    elements = [plan.buffers[s.writes[0]].numel.value for s in products]
    assert elements[0] == 64 * 512 and elements[1] == 4096 * 512


# -- what a review found ----------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(2048, 8), (4, 65_537), (1000, 24)])
def test_an_overwritten_input_is_read_before_it_is_written(shape: tuple[int, int]) -> None:
    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        y, z = x / (x.sum(0) + 7.0), x / (x.sum(1, keepdim=True) + 7.0)
        x.add_(1.0)
        return y, z

    for target in ("c", "triton"):
        gm = capture(f, torch.rand(shape), compile_options={"target": target})
        x = torch.rand(shape)
        want = f(x.clone())
        torch.testing.assert_close(run_plan(gm.plans["inference"], [x])[-2:], list(want), rtol=1e-5, atol=1e-9)


def test_a_sum_that_is_split_twice_keeps_its_axes_apart() -> None:
    x = torch.rand(512, 512, 8)
    plan = capture(lambda x: x.sum((0, 1)), x, compile_options={"target": "triton"}).plans["inference"]
    torch.testing.assert_close(run_plan(plan, [x])[0], x.sum((0, 1)))


def test_threads_that_ask_for_determinism_do_not_end_it_for_each_other() -> None:
    with deterministic:
        with deterministic:
            assert torch.are_deterministic_algorithms_enabled()
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_result_that_nobody_reads_gives_its_memory_to_no_other() -> None:
    size, at = (as_expr(1 << 20),), (Axis("i", 1 << 20).expr,)
    buffers = {n: Buffer(n, torch.float32, size, (ONE,), torch.device("cpu")) for n in ("x", "dead", "out")}
    buffers["x"] = dataclasses.replace(buffers["x"], storage="input")
    value = Load.of("x", at, torch.float32)
    kernel = Kernel(
        (at[0].atom,),
        tuple(b.as_param() for b in buffers.values()),
        (Store("dead", at, Op.of("neg", value)), Store("out", at, Op.of("abs", value))),
    )
    whole = TensorRef("out", size, (ONE,), as_expr(0))
    plan = place(
        Plan("p", ("x",), buffers, (Launch(kernel, tuple(buffers)),), (whole,)),
        CompileContext("p", "inference", Options()),
    )
    assert not reuses(plan)


@pytest.mark.parametrize(
    "fn", [lambda x: (x.max(0), x * 2), lambda x: (x.var(0), x * 2)], ids=["two results", "nested"]
)
def test_columns_that_cannot_be_joined_stay_out_of_the_rows_kernel(fn: Any) -> None:
    x = torch.randn(4096, 16)
    same(compiled(fn)(x), fn(x), tolerance=1e-4)
    grids = [product(loop.axis.size for loop in launch.schedule.grid) for launch in last_plan().launches]
    assert max(g.value for g in grids) >= 4096
