"""Rows that are too long to be held between two passes: their statistics are found in one walk, and then they are
written."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minifuse.codegen.c import kernel_source
from minifuse.codegen.looptree import LoopTree, Node, with_held
from minifuse.codegen.triton import write_kernel
from minifuse.ir.plan import Launch
from minifuse.ir.text import print_kernel
from minifuse.ir.value import LONG_ROW
from minifuse.options import Options
from minifuse.passes import schedule_triton
from minifuse.passes.context import CompileContext
from tests.judge import check, compiled, kernels, records

LONG = LONG_ROW + 17
SOFTMAXES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "logsumexp": lambda x: x.logsumexp(-1),
}
NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "layer norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "variance": lambda x: x.var(-1),
    "instances": lambda x: F.group_norm(x[None], x.shape[0])[0],
    "groups of channels": lambda x: F.group_norm(x.reshape(x.shape[0], 9, 4, -1), 3),
}
WALKS = {"softmax": 2, "log_softmax": 2, "logsumexp": 1, "layer norm": 2, "variance": 1, "groups of channels": 2}


def kinds() -> set[str]:
    """The reductions of everything that was compiled."""
    return {
        r.kind for record in records() for launch in record.stages["memory"].launches for r in launch.kernel.reductions
    }


def lane_loops(tree: LoopTree, node: Node) -> Iterator[Node]:
    for item in node.items:
        if isinstance(item, Node):
            if item.loop is not None and tree.loops[item.loop].kind == "lane":
                yield item
            yield from lane_loops(tree, item)


def walks(launch: Launch) -> int:
    """How often a kernel runs through its rows."""
    assert launch.schedule is not None
    tree = with_held(launch.kernel, launch.schedule)
    return len(list(lane_loops(tree, tree.root)))


def only(fn: Callable[[Tensor], Tensor], x: Tensor) -> Launch:
    """The one kernel that a function is."""
    compiled(fn)(x)
    assert kernels() == 1
    return records()[0].stages["memory"].launches[0]


# -- plans ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", WALKS)
def test_one_kernel_walks_a_long_row_once_for_its_statistics_and_once_to_write(name: str) -> None:
    length = 36 * 1500 if name == "groups of channels" else LONG
    launch = only({**SOFTMAXES, **NORMS}[name], torch.randn(40, length))
    assert walks(launch) == WALKS[name]
    assert kinds() == ({"softmax"} if name in SOFTMAXES else {"welford"})


def test_a_softmax_of_long_rows_reads_so() -> None:
    launch = only(SOFTMAXES["softmax"], torch.randn(40, 20_000))
    assert print_kernel(launch.kernel, launch.schedule, "div") == (
        "kernel div  i0 < 40, i1 < 20000\n"
        "  # softmax_statistics\n  # sub\n  # exp\n  # div\n"
        "  param p0 : f32[40, 20000]\n"
        "  param p1 : f32[40, 20000]\n"
        "  v0 : f32[i0, i1] = load p0[i0, i1]\n"
        "  v1 : f32[i0] = reduce(softmax, v0, over i1, lanes 16)\n"
        "  v2 : f32[i0, i1] = exp(sub(v0, pick(v1, 0)))\n"
        "  store p1[i0, i1] = div(v2, pick(v1, 1))\n"
        "  schedule i0: grid, i1: loop tile 4096, i1: lane\n"
    )


def test_c_reads_a_long_row_where_it_lies_and_keeps_what_it_computes() -> None:
    launch = only(SOFTMAXES["softmax"], torch.randn(40, 20_000))
    assert launch.schedule is not None
    text, _ = kernel_source(launch.kernel, launch.schedule, "k")
    assert text.count("mf_load_f32(") == 1 and text.count("mf_exp_f32(") == 1  # those of what is written
    assert "mf_rowsoftmax_f32(p0 + (20000*x_i0 + x_i1), 0, " in text
    launch = only(lambda x: (x * 2).softmax(-1), torch.randn(40, 20_000))
    assert launch.schedule is not None
    text, _ = kernel_source(launch.kernel, launch.schedule, "k")
    assert re.search(r"float a\d_x0\[4096\]", text) and "mf_rowsoftmax_f32(a" in text


@pytest.mark.parametrize("name", ["softmax", "layer norm"])
def test_triton_reads_a_long_row_twice(name: str) -> None:
    compiled({**SOFTMAXES, **NORMS}[name], {"target": "interpret"})(torch.randn(600, LONG))
    ctx = CompileContext("long", "inference", Options())
    (launch,) = schedule_triton.schedule(records()[0].stages["fuse"], ctx).launches
    assert write_kernel(launch).text.count("tl.load(p0") == 2


def test_what_feeds_a_long_row_is_computed_in_two_passes_not_three() -> None:
    """As `Group.passes` counts them; in one it costs nothing to compute it there."""
    x = torch.randn(64, 1 << 16)
    compiled(lambda x: x.tan().softmax(-1))(x)
    (refused,) = [d.words for d in records()[0].decisions if d.rule == "walked again" and not d.taken]
    assert "tan would be computed in 2 passes over a row" in refused
    assert walks(only(lambda x: x.tan().var(-1), x)) == 1


def test_a_loss_of_many_classes_walks_its_logits_once_forward() -> None:
    x, target = torch.randn(64, LONG, requires_grad=True), torch.randint(LONG, (64,))
    check(lambda x: F.cross_entropy(x, target), x, tolerance=1e-5)
    assert "softmax" in kinds() and not {"max"} & kinds()


@pytest.mark.parametrize("name", [*SOFTMAXES, "layer norm", "variance"])
def test_rows_that_are_held_keep_the_ordinary_form(name: str) -> None:
    fn = {**SOFTMAXES, **NORMS}[name]
    compiled(fn)(torch.randn(3, LONG_ROW))
    assert kinds() == ({"max", "sum"} if name in SOFTMAXES else {"sum"})


@pytest.mark.parametrize("name", [*SOFTMAXES, "layer norm", "variance"])
def test_rows_of_unknown_length_keep_the_ordinary_form(name: str) -> None:
    fn = {**SOFTMAXES, **NORMS}[name]
    x = torch.randn(3, LONG)
    torch.testing.assert_close(compiled(fn, dynamic=True)(x), fn(x), rtol=1e-5, atol=1e-5)
    assert not {"softmax", "welford"} & kinds()


def test_norms_in_double_precision_and_of_short_rows_of_rows_keep_the_ordinary_form() -> None:
    compiled(lambda x: F.layer_norm(x, [LONG]))(torch.randn(3, LONG, dtype=torch.float64))
    assert kinds() == {"sum"}
    compiled(lambda x: F.group_norm(x, 2))(torch.randn(3, 128, 31, 31))
    assert kinds() == {"sum"}


def test_columns_keep_the_ordinary_form() -> None:
    check(lambda x: (x.softmax(0), x.logsumexp(0), x.var(0)), torch.randn(LONG, 3), tolerance=1e-5)
    assert not {"softmax", "welford"} & kinds()


# -- numbers ----------------------------------------------------------------------------------------
@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def special_rows(dtype: torch.dtype) -> dict[str, Tensor]:
    x = torch.randn(10, LONG)
    x[0] = -torch.inf
    x[1, 1:] = -torch.inf
    x[2, : LONG - 3] = -torch.inf
    x[3, ::2] = -torch.inf
    x[4, 7] = torch.inf
    x[5, [7, 9000]] = torch.tensor([torch.inf, -torch.inf])
    x[6, LONG - 1] = torch.nan
    x[7, [0, 5000]] = torch.tensor([torch.nan, torch.inf])
    x[8] *= torch.finfo(dtype).max / 8
    x[9] -= torch.finfo(dtype).max / 2
    names = ("all -inf", "one number", "masked but for the end", "half masked", "inf", "inf and -inf", "NaN",
             "NaN and inf", "huge", "hugely negative")  # fmt: skip
    return {name: row[None].to(dtype) for name, row in zip(names, x, strict=True)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SOFTMAXES)
def test_special_rows_give_what_eager_gives(name: str, dtype: torch.dtype) -> None:
    fn = SOFTMAXES[name]
    rows = special_rows(dtype)
    found = compiled(fn)(torch.cat(list(rows.values())))
    close = {torch.float32: 4e-6, torch.float64: 1e-13, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    for got, (row, x) in zip(found, rows.items(), strict=True):
        # Eager rounds the logarithm of halves once more on its way.
        want = fn(x if dtype is torch.float64 else x.float())[0].to(dtype)
        torch.testing.assert_close(got, want, rtol=close, atol=close * 1e-6, equal_nan=True, msg=row)
        assert torch.equal(got.isnan(), fn(x)[0].isnan()), row


@pytest.mark.parametrize(
    ("name", "length"),
    [("groups of channels", 108_000)]
    + [(n, k) for n in [*SOFTMAXES, *list(NORMS)[:3]] for k in (LONG_ROW + 1, LONG_ROW + 64, 131_072)],
)
def test_long_rows_are_as_near_to_the_truth_as_eagers(name: str, length: int) -> None:
    fn = {**SOFTMAXES, **NORMS}[name]
    for mean, times, least in ((0, 2, 1e-6), (1000, 4, 3e-6)):  # a chunk's mean is rounded, and each that it joins
        x = mean + torch.randn(18, length)
        truth = fn(x.double())
        scale = truth.abs().amax()
        found, eager = ((y - truth).abs().amax() / scale for y in (compiled(fn)(x), fn(x)))
        assert found <= max(times * eager, least)
        assert kinds() == ({"softmax"} if name in SOFTMAXES else {"welford"})


def test_a_norm_of_equal_numbers_is_as_good_as_zero() -> None:
    for number in (0.1, 1e4 / 3):
        x = torch.full((17, LONG), number)
        assert float(compiled(lambda x: x.var(-1))(x).max()) <= (number * 1e-7) ** 2


def test_large_numbers_of_little_spread_do_not_overflow() -> None:
    x = 1e22 + 1e15 * torch.randn(17, LONG).round()
    torch.testing.assert_close(compiled(lambda x: x.var(-1))(x), x.double().var(-1).float(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", [*SOFTMAXES, "layer norm"])
def test_gradients_of_long_rows_are_eagers(name: str) -> None:
    check({**SOFTMAXES, **NORMS}[name], torch.randn(5, LONG, requires_grad=True), tolerance=2e-5)
