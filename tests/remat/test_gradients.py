"""Every policy, at every budget, gives eager's gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tests.remat.harness import Seen, backend, train

PLANS = [
    *((name, 1.0) for name in ("save_all", "recompute_all", "chen_sqrt", "korthikanti_selective", "mincut")),
    *(("default", b) for b in (1.0, 0.5, 0.05, 0.0)),
    ("priced_mincut", 0.3),
    *(("knapsack_budget", b) for b in (0.5, 0.05)),
]


class Attention(nn.Module):
    def __init__(self, width: int = 32, heads: int = 4, p: float = 0.0):
        super().__init__()
        self.heads, self.p = heads, p
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, c = x.shape
        q, k, v = (y.view(b, t, self.heads, -1).transpose(1, 2) for y in self.qkv(self.norm(x)).chunk(3, -1))
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        mixed = F.dropout(scores, self.p) @ v
        x = x + F.dropout(self.out(mixed.transpose(1, 2).reshape(b, t, c)), self.p)
        return x + self.down(F.gelu(self.up(x)))


class Fused(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(self.norm(x)).chunk(3, -1))
        return x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Convolutions(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Flatten(), nn.Linear(32, 4),
        )  # fmt: skip


class Checkpointed(nn.Module):
    def __init__(self, p: float = 0.0, selective: bool = False):
        super().__init__()
        self.blocks = nn.ModuleList(Attention(p=p) for _ in range(2))
        self.selective = selective

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kw = {"context_fn": _selective} if self.selective else {}
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False, **kw)
        return x


def _policy(ctx, op, *args, **kwargs):
    matmuls = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)
    return CheckpointPolicy.MUST_SAVE if op in matmuls else CheckpointPolicy.PREFER_RECOMPUTE


def _selective():
    return create_selective_checkpoint_contexts(_policy)


class Counter(nn.Module):
    """Mutates buffers, one of which its output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(16, 16)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.lin(x)
        self.count.add_(1)
        self.mean.mul_(0.9).add_(y.detach().mean(0), alpha=0.1)
        return (y - self.mean).tanh() * self.count.cos() * y.sigmoid()


class CheckpointedCounter(Counter):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return checkpoint(lambda z: self.lin(z).sin().exp(), y, use_reentrant=False)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.b(F.gelu(self.a(x))).float().exp()


def _mlp(p: float) -> nn.Module:
    return nn.Sequential(
        nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Dropout(p),
        nn.Linear(64, 32), nn.ReLU(), nn.Dropout(p), nn.Linear(32, 8),
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: _mlp(0.0), (16, 32)),
    "mlp with dropout": (lambda: _mlp(0.4), (16, 32)),
    "attention with dropout": (lambda: Attention(p=0.2), (2, 8, 32)),
    "fused attention": (Fused, (2, 8, 32)),
    "convolutions with batch norm": (Convolutions, (2, 3, 8, 8)),
    "checkpointed": (Checkpointed, (2, 8, 32)),
    "checkpointed with dropout": (lambda: Checkpointed(0.2), (2, 8, 32)),
    "selectively checkpointed": (lambda: Checkpointed(0.2, True), (2, 8, 32)),
    "mutated buffers": (Counter, (4, 16)),
    "mutated buffers beside a checkpoint": (CheckpointedCounter, (4, 16)),
    "autocast": (Mixed, (4, 16)),
}


@pytest.mark.parametrize("name", MODELS)
def test_gradients_and_buffers_are_those_of_eager(name: str):
    build, shape = MODELS[name]
    model, x = build(), torch.randn(shape)
    eager = copy.deepcopy(model)
    expected = train(eager, eager, x)
    peaks: dict[float, int] = {}
    for policy, budget in PLANS:
        torch._dynamo.reset()
        seen, module = Seen(), copy.deepcopy(model)
        found = train(torch.compile(module, backend=backend(policy, budget, seen), fullgraph=True), module, x)
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        nbytes, peak = sum(p.saved_bytes for p in seen.plans), max(p.peak_bytes for p in seen.plans)
        if policy == "save_all":
            everything, most = nbytes, peak
        if policy == "chen_sqrt":  # a checkpoint may be what the backward itself does not read
            assert peak <= most
        elif budget == 1.0 or policy == "knapsack_budget":
            assert nbytes <= everything
        if policy == "default":
            peaks[budget] = peak
    ordered = [peaks[b] for b in sorted(peaks)]
    assert ordered == sorted(ordered)


@pytest.mark.parametrize(("policy", "budget"), PLANS)
def test_one_compile_with_dynamic_sizes_serves_every_batch(policy: str, budget: float):
    model, seen = Attention(), Seen()
    compiled = torch.compile(model, backend=backend(policy, budget, seen), dynamic=True, fullgraph=True)
    for batch, length in ((2, 8), (3, 5), (5, 7)):
        x = torch.randn(batch, length, 32)
        model.zero_grad()
        expected = [g.clone() for g in train(model, model, x)]
        model.zero_grad()
        for a, b in zip(train(compiled, model, x), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert len(seen.plans) == 1


@pytest.mark.parametrize("policy", ["save_all", "recompute_all", "priced_mincut"])
def test_a_retained_graph_gives_the_same_gradients_twice(policy: str):
    model, x = _mlp(0.4), torch.randn(16, 32)
    out = torch.compile(model, backend=backend(policy))(x).sum()
    first = torch.autograd.grad(out, list(model.parameters()), retain_graph=True)
    second = torch.autograd.grad(out, list(model.parameters()))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


class CountsBackwards(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, count):
        ctx.save_for_backward(x)
        ctx.count = count
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        ctx.count.add_(1)
        return g * ctx.saved_tensors[0].cos(), None


@pytest.mark.parametrize(("policy", "budget"), PLANS)
def test_what_is_made_of_a_buffer_that_the_backward_writes_is_as_it_was_when_it_runs_again(policy: str, budget: float):
    count = torch.ones(4)

    def f(x: torch.Tensor) -> torch.Tensor:
        y = CountsBackwards.apply(x.tanh() * count.view(2, 2).clone().exp().view(4), count)
        return (y.exp() * y).sum()

    x = torch.randn(3, 4, requires_grad=True)
    out = torch.compile(f, backend=backend(policy, budget))(x)
    first, second = (torch.autograd.grad(out, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and torch.equal(count, torch.full((4,), 3.0))


@pytest.mark.parametrize(("policy", "budget"), PLANS)
def test_a_random_operator_is_drawn_once(policy: str, budget: float):
    seen = Seen()
    model = Checkpointed(0.2)
    train(torch.compile(model, backend=backend(policy, budget, seen)), model, torch.randn(2, 8, 32))
    for gm in seen.backwards:
        drawn = [n for n in gm.graph.nodes if torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ())]
        assert drawn == []


@pytest.mark.parametrize(("policy", "budget"), PLANS)
def test_a_mutation_appears_in_one_of_the_graphs(policy: str, budget: float):
    seen, model = Seen(), CheckpointedCounter()
    train(torch.compile(model, backend=backend(policy, budget, seen)), model, torch.randn(4, 16))
    for gm in seen.backwards:
        assert not [n for n in gm.graph.nodes if n.target is torch.ops.aten.copy_.default]


def test_a_gradient_that_needs_no_tangent_is_returned():
    def f(x: torch.Tensor) -> torch.Tensor:
        return x.sum() + 3.0

    x = torch.randn(5)
    for policy, budget in PLANS:
        torch._dynamo.reset()
        found = train(torch.compile(f, backend=backend(policy, budget)), None, x)
        torch.testing.assert_close(found[1], train(f, None, x)[1])


def test_checkpointed_matmuls_are_recomputed_by_default_and_no_others():
    x = torch.randn(2, 8, 32)
    for model, again in ((Checkpointed(), True), (Attention(), False)):
        torch._dynamo.reset()
        seen = Seen()
        train(torch.compile(model, backend=backend(seen=seen)), model, x)
        kinds = {seen.problems[0][n].kind for n in seen.plans[0].recomputed if seen.problems[0][n].phase == "forward"}
        assert ("extern" in kinds) is again
