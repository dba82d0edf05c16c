"""Random numbers: from torch's seed, the same in the backward, and eager's own with rng="eager"."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.judge import compiled, externs, kernels, same


def drawn(run: Callable[..., Tensor], seed: int, *args: Tensor) -> Tensor:
    torch.manual_seed(seed)
    return run(*args)


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: F.dropout(x, 0.3),
    "rand": lambda x: torch.rand(5, 7) + x,
    "rand_like": lambda x: torch.rand_like(x) * x,
    "randn": lambda x: torch.randn(5, 7) - x,
    "randn_like": lambda x: torch.randn_like(x).sin(),
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid()),
    "bernoulli with p": lambda x: torch.empty_like(x).bernoulli_(0.25),
    "randint": lambda x: torch.randint(0, 9, (5, 7)) + x,
    "randperm": lambda x: x[:, torch.randperm(7)],
    "uniform_": lambda x: torch.empty_like(x).uniform_(-1, 2),
    "normal_": lambda x: torch.empty_like(x).normal_(2, 3),
    "multinomial": lambda x: torch.multinomial(x.softmax(-1), 3),
    "exponential_": lambda x: torch.empty_like(x).exponential_(),
    "alpha dropout": lambda x: F.alpha_dropout(x, 0.3, True),
    "feature dropout": lambda x: F.dropout1d(x, 0.3),
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_seed_gives_one_result_and_another_seed_another(name: str) -> None:
    x = torch.randn(5, 7)
    run = compiled(DRAWS[name])
    first, again, other = drawn(run, 1, x), drawn(run, 1, x), drawn(run, 2, x)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(run(x), run(x))
    assert (first.dtype, first.shape) == (DRAWS[name](x).dtype, DRAWS[name](x).shape)


# What is drawn in one operator; others compute with what they draw, within the rounding of kernels.
COPIED = ("dropout", "rand", "randn", "bernoulli", "bernoulli with p", "randint", "randperm")


@pytest.mark.parametrize("name", DRAWS)
def test_eagers_numbers_bit_for_bit(name: str) -> None:
    x = torch.randn(5, 7)
    run = compiled(DRAWS[name], {"rng": "eager"})
    for seed in (1, 2):
        want = drawn(DRAWS[name], seed, x)
        got = drawn(run, seed, x)
        same(got, want, exact=name in COPIED)


def test_eagers_generator_is_left_where_eager_leaves_it() -> None:
    run = compiled(lambda x: F.dropout(x, 0.5), {"rng": "eager"})
    x = torch.randn(9)
    torch.manual_seed(3)
    run(x)
    after = torch.rand(3)
    torch.manual_seed(3)
    F.dropout(x, 0.5)
    assert torch.equal(after, torch.rand(3))


@pytest.mark.parametrize("rng", ["fast", "eager"])
def test_the_backwards_mask_is_the_forwards(rng: str) -> None:
    x = torch.randn(64, 33, requires_grad=True)
    out = compiled(lambda x: F.dropout(x, 0.25), {"rng": rng})(x)
    out.sum().backward()
    torch.testing.assert_close(x.grad, (out != 0) / 0.75, rtol=1e-6, atol=0)
    assert 0.15 < (x.grad == 0).float().mean() < 0.35


@pytest.mark.parametrize("rng", ["fast", "eager"])
@pytest.mark.parametrize("remat", ["save_all", "recompute_all", "priced_mincut"])
def test_every_policy_replays_dropout(rng: str, remat: str) -> None:
    def f(x: Tensor, w: Tensor) -> Tensor:
        return F.dropout(F.dropout((x * w).exp(), 0.5).sin() * w, 0.2)

    x, w = (torch.randn(16, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    run = compiled(f, {"rng": rng, "remat": remat})
    torch.manual_seed(0)
    (grad,) = torch.autograd.grad(run(x, w).sum(), x)
    step = torch.randn_like(x)
    with torch.no_grad():
        up, down = drawn(run, 0, x + 1e-5 * step, w), drawn(run, 0, x - 1e-5 * step, w)
    torch.testing.assert_close((grad * step).sum(), (up - down).sum() / 2e-5, rtol=1e-5, atol=1e-6)


def test_two_dropouts_of_one_call_differ() -> None:
    x = torch.ones(1000)
    a, b = compiled(lambda x: (F.dropout(x, 0.5), F.dropout(x, 0.5)))(x)
    assert 300 < (a != b).sum() < 700


def test_dropout_fuses_into_its_neighbours_and_needs_no_memory() -> None:
    x, y = torch.randn(32, 64, requires_grad=True), torch.randn(32, 64)
    out = compiled(lambda x, y: F.dropout(x * 2, 0.5) + y)(x, y)
    assert kernels() == 1
    assert externs() == ["minifuse.seed.default"]
    out.sum().backward()


def test_uniform_numbers_lie_in_their_range_in_every_dtype() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        numbers = compiled(lambda dtype=dtype: torch.rand(50_000, dtype=dtype))()
        assert numbers.dtype is dtype and numbers.min() >= 0 and numbers.max() < 1
        assert abs(numbers.double().mean().item() - 0.5) < 0.01


def test_normal_numbers_have_their_moments() -> None:
    numbers = compiled(lambda: torch.randn(50_000))()
    assert abs(numbers.mean()) < 0.02 and abs(numbers.std() - 1) < 0.02
    assert numbers.isfinite().all()


def test_inference_draws_too() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
    x = torch.randn(4, 8)
    with torch.no_grad():
        run = compiled(model)
        assert torch.equal(drawn(run, 1, x), drawn(run, 1, x))
        assert not torch.equal(drawn(run, 1, x), drawn(run, 2, x))
        model.eval()
        same(run(x), model(x))


def test_fused_and_unfused_draw_the_same_numbers() -> None:
    x = torch.randn(16, 16)

    def f(x: Tensor) -> Tensor:
        return F.dropout(x.sin(), 0.5).softmax(-1) + torch.randn_like(x)

    assert torch.equal(drawn(compiled(f), 1, x), drawn(compiled(f, {"fusion_fuel": 0}), 1, x))
    assert torch.equal(drawn(compiled(f), 1, x), drawn(compiled(f, dynamic=True), 1, x))


def test_a_generator_of_its_own_is_used() -> None:
    run = compiled(lambda x, g: torch.rand(4, generator=g) + x)
    x = torch.zeros(4)
    got = run(x, torch.Generator().manual_seed(7))
    assert torch.equal(got, torch.rand(4, generator=torch.Generator().manual_seed(7)))
