"""Forms of operators that lowering once got wrong, or that were found by PyTorch's operator database and the fuzzer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import minifuse
from tests.judge import check, compiled, externs, same


def test_a_reduction_of_a_scalar_may_name_its_missing_dimension() -> None:
    def fn(x: Tensor) -> tuple[Any, ...]:
        return x.sum(0), x.softmax(0), x.log_softmax(-1), torch.max(x, 0), x.argmin(-1), torch.aminmax(x, dim=0)

    check(fn, torch.tensor(2.0))


def test_numbers_that_are_no_sizes_may_be_negative() -> None:
    x = torch.randn(5, 5)

    def fn(x: Tensor, k: int, source: Tensor) -> tuple[Tensor, ...]:
        return (
            torch.arange(k, k - 6, -2), x.select(0, k), torch.select_scatter(x, source, 1, k), x * k, x[k:],
            torch.full((3,), k), x.roll(k, 0),
        )  # fmt: skip

    run = compiled(fn, dynamic=True)
    for k in (-2, -1, 3, 0):
        same(run(x, k, torch.ones(5)), fn(x, k, torch.ones(5)))


@pytest.mark.parametrize("dynamic", [False, True])
def test_views_by_strides_windows_and_repeats(dynamic: bool) -> None:
    x = torch.randn(4, 6)

    def fn(x: Tensor) -> tuple[Tensor, ...]:
        y = x * 2
        return (
            x.as_strided((2, 3), (1, 2), 3), y.as_strided((3, 2), (6, 1), 2) + 1,
            x[1:].as_strided((2, 2), (6, 1), 0) * 3, y.unfold(1, 3, 2).sum(-1), x.unfold(0, 2, 1),
            x.repeat(2, 3), x.repeat(1, 0, 2), x[:, :0].repeat(2, 2),
        )  # fmt: skip

    check(fn, x, dynamic=dynamic)
    check(fn, torch.randn(6, 4).t(), dynamic=dynamic)


def test_a_view_of_an_input_by_strides_aliases_it() -> None:
    x = torch.randn(4, 6, requires_grad=True)
    check(lambda x: x.as_strided((2, 2), (1, 2), 1), x, dynamic=True)
    check(lambda x: x.as_strided((2, 2), (1, 2), 1).sin(), x)


def test_an_operator_may_be_called_as_axes_are() -> None:
    x = torch.rand(3, 7, requires_grad=True)
    check(lambda x: (torch.special.i0(x) * x.sum(0), torch.special.i1(x)), x)


@pytest.mark.parametrize("target", ["c", "interpret"])
@pytest.mark.parametrize("columns", [150, 1024, 4800])
def test_a_norm_of_equal_numbers_is_zero(columns: int, target: str) -> None:
    """Though their sum is rounded one way at each step."""
    x = torch.arange(1.0, 17).mul(0.61803).unsqueeze(1).expand(16, columns).contiguous()
    check(lambda x: (F.layer_norm(x, (columns,)), x.var(1)), x, options={"target": target}, tolerance=1e-9)


def test_gather_by_an_index_without_dimensions() -> None:
    check(lambda x, i: x.gather(0, i) + 1, torch.randn(5), torch.tensor(3))


@pytest.mark.parametrize("dynamic", [False, True])
def test_an_empty_index_may_have_any_number_of_dimensions(dynamic: bool) -> None:
    def fn(x: Tensor, y: Tensor, at: Tensor) -> tuple[Tensor, ...]:
        source = torch.ones(at.shape)
        return (
            x.gather(0, at) + 1, y.gather(1, at) * 2, x.scatter(0, at, 3.0) + 1, y.scatter_add(1, at, source) * 2,
            x.scatter_reduce(0, at, source, "amax") + 1, y.scatter(0, at, source),
        )  # fmt: skip

    x, y = torch.randn(5, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    for shape in ((0,), (2, 0), (3, 0, 2)):
        check(fn, x, y, torch.zeros(shape, dtype=torch.int64), dynamic=dynamic)


def test_complex_numbers_and_sizes_of_results_with_dynamic_shapes() -> None:
    x = torch.randn(3, 5, 4, requires_grad=True)
    check(lambda x: (torch.fft.irfft(x), torch.fft.fft(x).abs()), x, dynamic=True, tolerance=1e-5)
    check(lambda x: torch.linalg.lu_factor(x)[1] + 1, torch.randn(2, 3, 5), dynamic=True)


@pytest.mark.parametrize("form", ["foreach", "each"])
def test_an_optimiser_step_is_kernels(form: str) -> None:
    def parameters() -> list[Tensor]:
        made = [torch.nn.Parameter(torch.linspace(-1, 1, 12 * n).view(n, 12)) for n in (1, 2, 3)]
        for p in made:
            p.grad = p.detach().cos()
        return made

    mine, theirs = parameters(), parameters()
    a, b = (torch.optim.AdamW(ps, lr=0.1, foreach=form == "foreach") for ps in (mine, theirs))
    step = compiled(a.step)
    for _ in range(3):
        step()
        b.step()
    same([p.detach() for p in mine], [p.detach() for p in theirs])
    assert not externs()


def test_operators_over_lists() -> None:
    xs, ys = [torch.randn(n) for n in (3, 5, 1)], [torch.rand(n) for n in (3, 5, 1)]

    def fn(xs: list[Tensor], ys: list[Tensor]) -> list[Any]:
        return [
            torch._foreach_add(xs, ys, alpha=2), torch._foreach_add(xs, [1.0, 2.0, 3.0]), torch._foreach_mul(xs, 3),
            torch._foreach_addcdiv(xs, xs, ys, [1.0, 2.0, 3.0]), torch._foreach_maximum(xs, 0.1),
            torch._foreach_norm(xs),
            torch._foreach_minimum(xs, ys), torch._foreach_lerp(xs, ys, 0.3), torch._foreach_pow(2.0, ys),
            torch._foreach_sqrt(ys), torch._foreach_max(xs), torch._foreach_clamp_min(xs, [0.0, 0.1, 0.2]),
        ]  # fmt: skip

    check(fn, xs, ys)
    assert not externs()


@pytest.mark.parametrize("dynamic", [False, True])
def test_an_index_into_a_view_of_any_form(dynamic: bool) -> None:
    """Of a view that merges or splits dimensions the place in memory is divided from the index."""
    x, at = torch.randn(4, 6, 5, requires_grad=True), torch.tensor([3, 0, 3, 1])

    def fn(x: Tensor, at: Tensor) -> tuple[Tensor, ...]:
        merged = x.transpose(0, 1).reshape(24, 5)
        split = x.reshape(2, 2, 30).transpose(1, 2).reshape(10, 12)
        shifted = x.reshape(6, 4, 5)[1:].reshape(4, 5, 5)
        return (
            merged.index_select(0, at), split[at, at + 1], F.embedding(at, merged) + 1, merged[at.neg()],
            split.gather(1, at.expand(10, 4)), shifted.index_select(1, at) * 2, shifted[:, at, at],
        )  # fmt: skip

    check(fn, x, at, dynamic=dynamic)
    compiled(fn, dynamic=dynamic)(x.detach(), at)
    assert not externs()


def test_a_kernel_may_be_read_through_a_gather_that_divides() -> None:
    def fn(x: Tensor, at: Tensor) -> Tensor:
        return (x.sin() + x.flip(0)).transpose(0, 1).reshape(24)[at] * 2

    check(fn, torch.randn(4, 6), torch.randint(24, (7,)))


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_slice_with_a_step_is_written_and_has_a_gradient(dynamic: bool) -> None:
    x, y = torch.randn(5, 9, requires_grad=True), torch.randn(5, 3, requires_grad=True)

    def fn(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        written = x * 1
        written[:, 1:8:3] = y
        return (
            x[:, ::2].sin(), x[1::3, 2::4] * 2, x[:, 8::2], torch.slice_scatter(x, y, 1, 2, 9, 3), written,
            torch.slice_scatter(x, y, 1, -8, 7, 2), x[:, ::20],
        )  # fmt: skip

    check(fn, x, y, dynamic=dynamic)
    compiled(fn, dynamic=dynamic)(x.detach(), y.detach())
    assert not externs()


def test_a_step_of_a_slice_may_be_a_symbol() -> None:
    def fn(x: Tensor, y: Tensor, k: int) -> tuple[Tensor, ...]:
        written = x * 1
        written[1:, 1::k] = 3
        return x[:, ::k] * 2, x[:, 1:7:k].sin(), torch.slice_scatter(x, y, 1, 1, 7, k), written

    x = torch.randn(5, 9, requires_grad=True)
    check(fn, x, torch.randn(5, 2, requires_grad=True), 3, dynamic=True)
    compiled(fn, dynamic=True)(x.detach(), torch.randn(5, 2), 3)
    assert not externs()


def test_a_row_that_stands_for_padding_may_be_a_symbol() -> None:
    def fn(table: Tensor, k: int) -> Tensor:
        return F.embedding(torch.arange(4), table, padding_idx=k).sin()

    check(fn, torch.randn(5, 8, requires_grad=True), 3, dynamic=True)


def test_memory_that_is_only_asked_for_is_no_call_of_aten() -> None:
    def fn(x: Tensor) -> Tensor:
        return x.new_empty_strided((3, 4), (1, 3)).copy_(x) + torch.empty_like(x).fill_(2)

    check(fn, torch.randn(3, 4))
    assert not externs()


def test_what_lies_by_eager_s_strides_is_found_whatever_ours_are() -> None:
    """The place in memory that `as_strided` names is eager's: here results have other strides, and lie in one arena."""

    def pooled(x: Tensor) -> Tensor:
        return F.adaptive_avg_pool1d((x * 2).transpose(1, 2), 1).flatten(1).sin()

    def fn(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        a, b, base = x @ y, (x.t() + 1) @ x, torch.zeros(48)
        return (
            a.cos().t().as_strided((2, 2), (1, 3), 1) + 1, (b.sin() * 2).as_strided((5,), (1,), 2),
            torch.as_strided_scatter(base + 1, x.exp(), (4, 6), (1, 8), 3), pooled(x.view(2, 3, 4)),
            torch.as_strided_scatter(a.detach().t().exp(), x[0], (6,), (2,), 1),
            (base + a.sum()).view(8, 6)[2:].as_strided((2, 3), (6, 1)),
            torch.as_strided_scatter(base, x.sum(), (), (), 7),
        )  # fmt: skip

    x, y = torch.randn(4, 6, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    for dynamic in (False, True):
        check(fn, x, y, dynamic=dynamic)
        assert not [op for op in externs() if "strided" in op]


def test_what_is_held_for_a_row_parts_no_loop_that_its_readers_share() -> None:
    """Two checks of an index leave no grid; a row that varies less than its readers was held before their loops."""

    def fn(x: Tensor, weight: Tensor, table: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        y = F.layer_norm(x.permute(0, 2, 3, 1), (8,), weight) + table[rows[:, None], columns[None]]
        return y, F.layer_norm(y, (8,), weight)

    x, weight, table = torch.randn(2, 8, 8, 8), torch.randn(8), torch.randn(8, 8, 8)
    check(fn, x, weight, table, torch.randint(8, (8,)), torch.randint(8, (8,)))
    assert not [name for report in minifuse.reports() for name in report.interpreted]


@pytest.mark.parametrize("dim", [0, 2])
def test_a_weight_given_by_its_norm_has_its_gradient_in_kernels(dim: int) -> None:
    def fn(v: Tensor, g: Tensor) -> Tensor:
        return torch._weight_norm(v, g, dim).sin()

    v = torch.randn(4, 3, 5, requires_grad=True)
    g = v.detach().norm(dim=[d for d in range(3) if d != dim], keepdim=True) + 1
    check(fn, v, g.requires_grad_(), tolerance=1e-5)
    assert not externs()


def test_what_is_asked_for_its_shape_alone_is_no_kernel() -> None:
    def fn(x: Tensor) -> Tensor:
        return torch.ops.aten.full_like(x.exp() * 2, 3.0) + x

    x = torch.randn(4, 6)
    check(fn, x)
    lowered = minifuse.capture(fn, x).plans["inference"].launches
    assert {node for launch in lowered for node in launch.kernel.origins} == {"full_like", "add"}


def test_a_result_that_nobody_reads_keeps_its_loops_while_kernels_merge() -> None:
    """Of a mean that is computed again only its shape was needed: its loops were forgotten, and one took their name."""

    def fn(x: Tensor, length: Tensor) -> tuple[Tensor, ...]:
        mask = torch.arange(x.shape[1])[None] < length[:, None]
        mean = (x * mask[..., None]).sum(1) / length[:, None].clamp(min=1)
        slots = (length % 3)[:, None].expand_as(mean)
        means = torch.zeros(3, x.shape[-1]).scatter_reduce(0, slots, mean, "mean", include_self=False)
        return mean, means, x.new_zeros(4, x.shape[-1]).index_copy(0, torch.tensor([1, 3]), mean[:2])

    x, length = torch.randn(4, 6, 5), torch.tensor([6, 3, 1, 4])
    gradients = []
    for run in (fn, compiled(fn, {"memory_budget": 0.05, "on_budget": "best"})):
        leaf = x.clone().requires_grad_()
        sum(out.sum() for out in run(leaf, length)).backward()
        gradients.append(leaf.grad)
    same(gradients[1], gradients[0])
