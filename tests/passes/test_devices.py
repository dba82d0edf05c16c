"""Graphs over several devices: what a plan does with them, lowered from fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from minifuse.ir.interpret import run_plan
from minifuse.ir.plan import Extern, Launch, Plan
from minifuse.ir.verify import verify_plan
from minifuse.options import Options
from minifuse.passes import schedule_triton
from minifuse.passes.context import CompileContext
from minifuse.passes.fuse import fuse
from minifuse.passes.lower.graph import lower
from minifuse.passes.memory import place

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def plan_of(function: Callable[..., Any], *args: Tensor) -> Plan:
    """The fused plan of a function traced over fake tensors."""
    ctx = CompileContext("f", "inference", Options())
    plan = fuse(lower(make_fx(function)(*args).graph, ctx), ctx)
    verify_plan(plan)
    return plan


def on_cpu(plan: Plan) -> Plan:
    """The same plan with every buffer on the CPU."""
    steps = []
    for step in plan.steps:
        if isinstance(step, Extern):
            step = replace(step, kwargs=tuple((k, CPU if v == CUDA else v) for k, v in step.kwargs))
        steps.append(step)
    return replace(plan, steps=tuple(steps), buffers={n: replace(b, device=CPU) for n, b in plan.buffers.items()})


def scaled(x: Tensor, k: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    return x * k + k, x + t[1], torch.where(x > 0, x, k.float())


def test_a_number_of_the_host_reaches_a_device_by_value() -> None:
    with FakeTensorMode():
        plan = plan_of(scaled, torch.empty(8, 4, device="cuda"), torch.empty((), dtype=torch.float64), torch.empty(3))
    targets = [str(e.target) for e in plan.externs]
    # `k`, `t[1]` and `k.float()` once each, however often they are read
    assert targets.count("aten._local_scalar_dense.default") == targets.count("aten.scalar_tensor.default") == 3
    assert len(targets) == 6
    for step in plan.steps:
        if isinstance(step, Launch):
            assert len({plan.buffers[b].device for b in step.binding}) == 1
    x, k, t = torch.randn(8, 4), torch.tensor(1.5, dtype=torch.float64), torch.randn(3)
    for found, expected in zip(run_plan(on_cpu(plan), [x, k, t], {}), scaled(x, k, t), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_number_of_the_programs_text_is_everywhere() -> None:
    """Nothing is read from the host for it: a kernel has it as it has other constants."""
    number = torch.tensor(-2.5, dtype=torch.float64)

    def f(x: Tensor) -> tuple[Tensor, ...]:
        lifted = torch.ops.aten.lift_fresh_copy(number)
        return x * lifted, torch.ops.aten.fill(x, lifted), lifted

    with FakeTensorMode(allow_non_fake_inputs=True):
        plan = plan_of(f, torch.empty(8, device="cuda"))
    assert not plan.externs
    assert {plan.buffers[b].device for step in plan.launches for b in step.binding} == {CPU, CUDA}
    for step in plan.launches:
        assert len({plan.buffers[b].device for b in step.binding}) == 1
    x = torch.randn(8)
    for found, expected in zip(run_plan(on_cpu(plan), [x], {}), f(x), strict=True):
        assert torch.equal(found, expected)
        assert found.dtype == expected.dtype


def test_rows_that_a_product_reads_or_writes_begin_on_16_bytes() -> None:
    def f(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        logits = torch.mm(x.view(16, 32), w)
        scaled = logits.view(2, 8, 77) * 0.5
        return logits, torch.mm(scaled.view(16, 77).t(), x.view(16, 32)), torch.mm(x.view(16, 32), x.view(16, 32).t())

    shapes: list[tuple[torch.dtype, int]] = [(torch.bfloat16, 80), (torch.float32, 80), (torch.float64, 78)]
    for dtype, row in shapes:
        with FakeTensorMode():
            args = [torch.empty(*s, device="cuda", dtype=dtype) for s in ((2, 8, 32), (32, 77))]
            plan = plan_of(f, *args)
        strides = {n: tuple(d.value for d in b.stride) for n, b in plan.buffers.items()}
        assert strides["mm"] == (row, 1)
        ctx = CompileContext("f", "inference", Options(target="triton"))
        placed = place(schedule_triton.schedule(plan, ctx), ctx)
        assert all(step.out for step in placed.externs)  # each product writes its rows where they lie
        assert strides["mul"] == (8 * row, row, 1)
        (copy,) = (o.buffer for o in plan.outputs[:1])  # type: ignore[union-attr]
        assert strides[copy] == (77, 1)  # the caller sees eager's
        assert strides["mm_2"] == (16, 1)
        x, w = torch.randn(2, 8, 32, dtype=dtype), torch.randn(32, 77, dtype=dtype)
        for found, expected in zip(run_plan(on_cpu(plan), [x, w], {}), f(x, w), strict=True):
            torch.testing.assert_close(found, expected)
            assert found.stride() == expected.stride()


def rows_apart(function: Callable[..., Any], *shapes: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The strides of the buffers that a function's own results have, where they are not contiguous."""
    with FakeTensorMode():
        plan = plan_of(function, *(torch.empty(*s, device="cuda") for s in shapes))
    args = [torch.randn(*s) for s in shapes]
    for found, expected in zip(run_plan(on_cpu(plan), args, {}), function(*args), strict=True):
        torch.testing.assert_close(found, expected)
    apart = {n: b for n, b in plan.buffers.items() if not b.is_contiguous and b.storage != "input"}
    return {n: tuple(d.value for d in b.stride) for n, b in apart.items()}


def test_rows_are_apart_only_where_all_that_reads_them_goes_by_strides() -> None:
    x, w = (16, 77), (77, 8)
    assert rows_apart(lambda x, w: ((x * 2) @ w,), x, w) == {"mul": (80, 1)}
    assert rows_apart(lambda x, w: ((y := x * 2).sort(1).values, y @ w), x, w) == {}
    assert rows_apart(lambda x, w: ((y := x * 2), y.view(-1), y @ w), x, w) == {}  # one memory for both
    assert rows_apart(lambda x, w: ((x * 2).view(16 * 7, 11) @ w,), x, (11, 8)) == {}  # other rows
