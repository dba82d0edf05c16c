"""Fusion changes no bit: what is hard to schedule, with all fusions, with none and with some, on one thread and two."""

from __future__ import annotations

import re

import pytest
import torch

from tests.fuzz.check import check
from tests.fuzz.generate import Recipe, Statement
from tests.fuzz.inputs import Input

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
FUELS = (None, 0, 1, 2, 4)


def f32(*shape: int, **more: str) -> Input:
    return Input(shape, F32, **more)


def program(inputs: list[Input], *lines: str, writes: tuple = (), outputs: tuple = (), dynamic: bool = False) -> Recipe:
    """A recipe of lines `v0, v1… = text` over x0, x1…; not exact, so compared with eager within rounding."""
    statements = []
    for k, line in enumerate(lines):
        args = tuple(dict.fromkeys(re.findall(r"\b[xv]\d+\b", line)))
        text = re.sub(r"\b[xv]\d+\b", lambda m, args=args: f"{{{args.index(m[0])}}}", line)
        statements.append(Statement(text, args, (f"v{k}",), False))
    return Recipe(0, tuple(inputs), tuple(statements), outputs or (f"v{len(lines) - 1}",), writes, dynamic)


CASES = {
    "a softmax over rows longer than a chunk": program([f32(3, 5000)], "torch.softmax(x0, 1)"),
    "a softmax over columns longer than a chunk": program([f32(300, 40)], "torch.softmax(x0, 0)"),
    "columns longer than a chunk, sizes dynamic": program([f32(300, 40)], "torch.softmax(x0, 0)", dynamic=True),
    "a layer norm of ragged rows": program([f32(7, 4101), f32(4101)], "F.layer_norm(x0, [4101], x1)"),
    "a norm over two axes": program([f32(4, 5, 6, 7)], "F.batch_norm(x0, None, None, training=True)"),
    "a variance over two axes, sizes dynamic": program([f32(2, 16, 33)], "torch.var(x0, [0, 2])", dynamic=True),
    "an axis that is a row for one and a column for another": program(
        [f32(31, 257), f32(257, 32)],
        "x0.sum(1)",
        "x1.sum(0)",
        "v0.sum() + v1 * x1",
        "x0.sum([0, 1]) + v2",
        outputs=("v0", "v1", "v3"),
    ),
    "statistics of rows that are used after another reduction of them": program(
        [f32(17, 19)], "torch.logsumexp(x0, [0])", "v0.mean(0)", "v1 / (v0.abs() + 1)", outputs=("v2",), dynamic=True
    ),
    "a row and a column statistic of one matrix": program(
        [f32(100, 5)], "(x0 - x0.amax(1, keepdim=True)).exp()", "torch.log_softmax(v0, 0)", dynamic=True
    ),
    "a sum with too few rows to fill the threads": program([f32(150_000)], "(x0 * x0 + 1).sum()", "torch.tanh(v0)"),
    "a maximum that is split, with an epilogue": program([f32(2, 70_001)], "x0.amax(1)", "x0 - v0.unsqueeze(1)"),
    "the index of the largest in columns": program(
        [f32(200, 33)], "torch.max(x0 * 1.5, 0)[0]", "torch.argmax(x0, 0)", outputs=("v0", "v1")
    ),
    "a transposed copy beside a row sum": program(
        [f32(65, 130)], "x0.t().contiguous() * 2", "x0.sum(0)", "v0.sum(1) + v1", outputs=("v0", "v2")
    ),
    "a gather along the lane": program(
        [f32(9, 33), Input((9, 33), torch.int64, values="index")],
        "torch.gather(x0 * 2, 1, x1)",
        "v0 + x0.sum(1, keepdim=True)",
    ),
    "padding, then a reduction": program(
        [f32(5, 37)], "F.pad(x0 * 2, [3, 2, 1, 0], value=1)", "v0.sum(1)", "v0.mean(0)", outputs=("v1", "v2")
    ),
    "a concatenation, then a softmax": program(
        [f32(5, 17), f32(5, 20)], "torch.cat([x0.exp(), x1.sin()], 1)", "torch.softmax(v0, 1)"
    ),
    "a store and its repetition": program(
        [f32(500)], "x0 * 2", "v0.repeat_interleave(2)", "v0 - 1", "v1 + v1.sum()", outputs=("v2", "v3")
    ),
    "no rows": program([f32(0, 17)], "torch.softmax(x0, 1)", "v0.sum(0)", outputs=("v0", "v1")),
    "rows of nothing": program([f32(3, 0)], "x0.sum(1) + 1", "x0 * 2", outputs=("v0", "v1")),
    "bytes and truth values in ragged rows": program(
        [Input((5, 19), torch.int8), Input((5, 19), torch.bool)],
        "torch.where(x1, x0 * x0, x0 << 3)",
        "v0 // 3 + v0 % 5",
        "(v1 > 2).any(0)",
        outputs=("v1", "v2"),
    ),
    "halves that are rounded at each step": program(
        [Input((40, 50), BF16)], "x0 * 1.1 + 0.3", "v0 / 3 - v0.sum(1, keepdim=True)"
    ),
    "a scalar tensor beside halves": program(
        [Input((33,), F16), Input((), F32)], "x0 * x1 + 0.1", "v0.sum(0)", outputs=("v0", "v1")
    ),
    "NaN, infinities and zeros of both signs": program(
        [f32(300, values="special"), f32(300, values="special")],
        "torch.maximum(x0, x1)",
        "torch.minimum(v0, x0 * -1)",
        "v1.clamp(-1, 2)",
        "torch.where(v2 > 0, v2, x0)",
        outputs=("v0", "v1", "v2", "v3"),
    ),
    "a rotation by a negative remainder": program([f32(37)], "x0.roll(5)", "v0 * x0", dynamic=True),
    "two inputs that swap": program(
        [f32(5, 40), f32(5, 40)], "x0 * 2", "x1.sin()", "x0 + x1", writes=(("x1", "v0"), ("x0", "v1")), outputs=("v2",)
    ),
    "rows that overwrite themselves": program([f32(9, 5000)], "torch.softmax(x0, 1)", writes=(("x0", "v0"),)),
    "an input that is read turned round and overwritten": program(
        [f32(50)], "x0.flip(0)", "x0 + 1", "v0 * 2", writes=(("x0", "v1"),), outputs=("v0", "v2")
    ),
    "a shifted read of what is overwritten": program(
        [f32(64)], "torch.slice_scatter(x0, x0.narrow(0, 0, 2) + 1, 0, 1, 3)", writes=(("x0", "v0"),)
    ),
    "softmaxes of rows too long to be held": program(
        [f32(33, 17_001)], "torch.softmax(x0 * 2, 1)", "torch.log_softmax(x0 * 2, 1)", "(v0 * v1).sum(1)"
    ),
    "a norm of rows too long to be held, turned round": program(
        [f32(16_500, 37)], "F.layer_norm(x0.t() * 3, [16_500])", "v0.logsumexp(1)", outputs=("v0", "v1")
    ),
    "statistics of too few long rows to fill the threads": program(
        [f32(2, 70_001)], "torch.softmax(x0, 1)", "torch.var(x0, 1)", outputs=("v0", "v1")
    ),
    "special numbers in rows too long to be held": program(
        [f32(4, 16_411, values="special")], "torch.logsumexp(x0, 1)", "torch.softmax(x0, 1)", outputs=("v0", "v1")
    ),
    "long rows that overwrite themselves": program([f32(33, 16_411)], "torch.softmax(x0, 1)", writes=(("x0", "v0"),)),
    "an operator of ATen between kernels": program(
        [f32(20, 30)], "x0 * 2", "torch.cumsum(v0, 1)", "v1 + v0.sum(1, keepdim=True)"
    ),
}


@pytest.fixture(scope="module")
def failures() -> dict[int, str]:
    """What is wrong with each case, by its place: all are compiled in one C unit."""
    recipes = [Recipe(k, c.inputs, c.statements, c.outputs, c.writes, c.dynamic) for k, c in enumerate(CASES.values())]
    return {f.recipe.seed: str(f) for f in check(recipes, FUELS)}


@pytest.mark.parametrize("case", CASES)
def test_fused_and_unfused_are_equal_in_bits_for(case, failures):
    wrong = failures.get(list(CASES).index(case))
    assert wrong is None, wrong
