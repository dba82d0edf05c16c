"""Some hundreds of random programs, and a thousand of what fuses; `make fuzz` runs thousands."""

from __future__ import annotations

import pytest
import torch

from minifuse.passes.lower.pointwise import ROWS
from tests.judge import in_tritons_interpreter

from .check import BATCH, check, expect, shrink
from .fusible import fusible
from .generate import Recipe, Statement, generate
from .inputs import Input

pytestmark = pytest.mark.filterwarnings("ignore:Using a target size")
FIRST = 100_000
END_TO_END = (3, 7, 10, 14, 19, 24)


@pytest.mark.parametrize("batch", range(4))
def test_random_programs_agree_with_eager_and_with_themselves_however_they_are_fused(batch):
    begin = FIRST + batch * BATCH
    failures = check(generate(seed) for seed in range(begin, begin + BATCH))
    assert not failures, "\n".join(
        str(shrink(f)) if k == 0 else f"seed {f.recipe.seed}" for k, f in enumerate(failures)
    )


@pytest.mark.parametrize("batch", range(10))
def test_a_thousand_graphs_of_what_fuses_are_the_same_bits_fused_and_unfused(batch):
    """One unit for a hundred: unfused, they are the same kernels over and over."""
    begin = 400_000 + 100 * batch
    failures = check((fusible(seed) for seed in range(begin, begin + 100)), fuels=[None, 0])
    assert not failures, "\n".join(
        str(shrink(f)) if k == 0 else f"seed {f.recipe.seed}" for k, f in enumerate(failures)
    )


def test_a_sample_of_them_runs_in_tritons_interpreter(tmp_path):
    pytest.importorskip("triton")
    in_tritons_interpreter("tests.fuzz", tmp_path, *"--fusible --target triton --count 20 --seed 420000".split())


@pytest.mark.parametrize("seed", END_TO_END)
def test_a_random_program_through_torch_compile_gives_eagers_values_and_strides(seed):
    recipe = generate(seed)
    expected, after = expect(recipe)
    torch._dynamo.reset()
    inputs = recipe.arguments()
    compiled = torch.compile(recipe.function(), backend="minifuse", dynamic=recipe.dynamic, options={"verify": True})
    found = compiled(*inputs)
    want = recipe.function()(*recipe.arguments())
    for k, (a, b) in enumerate(zip(found, want, strict=True)):
        assert a.dtype is b.dtype
        assert not a.numel() or [s for s, n in zip(a.stride(), a.shape) if n > 1] == [
            s for s, n in zip(b.stride(), b.shape) if n > 1
        ], recipe.script()
        scale = 16 * max(expected.scale[k], 1e-30) if b.is_floating_point() else 0
        torch.testing.assert_close(a, b, rtol=1e-5, atol=scale, equal_nan=True, msg=lambda m: m + recipe.script())
    for a, b in zip(inputs, after, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2, equal_nan=True)


def test_a_seed_always_makes_the_same_program():
    assert generate(42) == generate(42)
    assert all(torch.equal(a, b) for a, b in zip(generate(42).arguments(), generate(42).arguments(), strict=True))


def test_what_fails_is_shrunk_to_the_statement_that_fails(monkeypatch):
    monkeypatch.setitem(ROWS, torch.ops.aten.relu.default, ROWS[torch.ops.aten.neg.default])
    recipe = Recipe(
        0,
        (Input((64,), torch.float32), Input((64,), torch.float32)),
        (
            Statement("{0} + {1}", ("x0", "x1"), ("v0",), True),
            Statement("torch.relu({0})", ("v0",), ("v1",), True),
            Statement("{0}.flip(0) * 3", ("v1",), ("v2",), True),
        ),
        ("v2", "v0"),
    )
    (failure,) = check([recipe])
    assert [s.text for s in shrink(failure).recipe.statements] == ["torch.relu({0})"]
