"""Backward passes, optimisers, threads and checkpoints: a compiled model trains as the plain one does."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.judge import check, compiled, records, same, twin


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(6, 8), nn.Linear(8, 3), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.silu(self.norm(self.a(x)))).tanh()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_parameters_that_are_not_used_get_no_gradient() -> None:
    class Part(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.a(x).relu()

    model = Part()
    check(model, torch.randn(4, 6))
    assert model.b.weight.grad is None


def test_inputs_that_need_no_gradient_get_none() -> None:
    def f(x: Tensor, w: Tensor, mask: Tensor, i: Tensor) -> Tensor:
        return torch.where(mask, x * w, x[i])

    x, w = torch.randn(4), torch.randn(4, requires_grad=True)
    check(f, x, w, torch.tensor([True, False, True, False]), torch.tensor([3, 2, 1, 0]))
    frozen = Net()
    frozen.a.requires_grad_(False)
    check(frozen, torch.randn(2, 6), tolerance=1e-5)


def test_an_output_whose_gradient_is_none() -> None:
    x = torch.randn(5, requires_grad=True)
    out = compiled(lambda x: (x.sin(), x.cos(), x.detach()))(x)
    out[1].sum().backward()
    torch.testing.assert_close(x.grad, -x.detach().sin())


def test_a_retained_graph_is_run_twice() -> None:
    model, x = Net(), torch.randn(4, 6, requires_grad=True)
    loss = compiled(model)(x).square().sum()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters()]
    loss.backward()
    for p, g in zip(model.parameters(), once, strict=True):
        assert torch.equal(p.grad, 2 * g)
    with pytest.raises(RuntimeError):
        loss.backward()


def test_two_outputs_of_one_call_and_two_calls_in_one_loss() -> None:
    model = Net()
    eager = twin(model)
    run = compiled(model)
    x, y = torch.randn(4, 6), torch.randn(4, 6)
    (run(x) * run(y) + run(x)).sum().backward()
    (eager(x) * eager(y) + eager(x)).sum().backward()
    same([p.grad for p in model.parameters()], [p.grad for p in eager.parameters()], tolerance=1e-5)


def test_gradients_of_some_inputs() -> None:
    x, y, z = (torch.randn(4, requires_grad=True) for _ in range(3))

    def f(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return (x * y).sin() * 2 + y

    out, want = compiled(f)(x, y, z), f(x, y, z)
    same(torch.autograd.grad(out.sum(), [y]), torch.autograd.grad(want.sum(), [y]))
    out = compiled(f)(x, y, z)
    got = torch.autograd.grad(out, [x, z], torch.ones(4) * 3, allow_unused=True)
    assert got[1] is None
    torch.testing.assert_close(got[0], 6 * y.detach() * (x * y).detach().cos())


def test_gradients_accumulate() -> None:
    model = Net()
    eager, run = twin(model), compiled(model)
    for _ in range(3):
        x = torch.randn(4, 6)
        run(x).sum().backward()
        eager(x).sum().backward()
    same([p.grad for p in model.parameters()], [p.grad for p in eager.parameters()], tolerance=1e-5)


def test_hooks_on_tensors_see_and_change_gradients() -> None:
    def trial(run: Callable[[Tensor], Tensor], model: Net) -> tuple[list[Tensor], Any]:
        seen: list[Tensor] = []
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
        x.register_hook(lambda g: seen.append(g.clone()))
        model.a.weight.register_hook(lambda g: g * 2)
        out = run(x)
        out.register_hook(lambda g: g * 3)
        out.sum().backward()
        return seen, [p.grad for p in model.parameters()]

    model = Net()
    eager = twin(model)
    same(trial(compiled(model), model), trial(eager, eager), tolerance=1e-5)


def test_weights_may_change_between_forward_calls_but_not_under_a_backward() -> None:
    w = torch.randn(4, requires_grad=True)
    x = torch.randn(4)
    out = compiled(lambda x, w: (x * w).sin() * w)(x, w).sum()
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_tied_weights_get_one_gradient() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, i: Tensor) -> Tensor:
            return self.head(self.embed(i).tanh()).log_softmax(-1)

    check(Tied(), torch.randint(0, 10, (3, 5)), tolerance=1e-5)


def test_a_double_backward_is_refused_as_by_torch() -> None:
    x = torch.randn(3, requires_grad=True)
    (g,) = torch.autograd.grad(compiled(lambda x: x.sin() * x)(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward|does not support"):
        g.sum().backward()


# -- optimisers ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_an_optimiser_step_is_compiled(kind: str) -> None:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        if kind == "AdamW":
            return torch.optim.AdamW(model.parameters(), lr=0.1, foreach=True, weight_decay=0.1)
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=True)

    model = Net()
    eager = twin(model)
    mine, theirs = make(model), make(eager)
    step = compiled(mine.step)
    for _ in range(3):
        for p, q in zip(model.parameters(), eager.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        step()
        theirs.step()
    same([p.detach() for p in model.parameters()], [p.detach() for p in eager.parameters()], tolerance=1e-5)
    assert any(len(r.stages["memory"].launches) for r in records())


def test_a_training_loop_follows_eagers() -> None:
    model = Net()
    eager, run = twin(model), compiled(model)
    for net, call in ((model, run), (eager, eager)):
        optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
        chance = torch.Generator().manual_seed(0)
        for _ in range(5):
            optimiser.zero_grad()
            F.mse_loss(call(torch.randn(4, 6, generator=chance)), torch.zeros(4, 3)).backward()
            optimiser.step()
    same([p.detach() for p in model.parameters()], [p.detach() for p in eager.parameters()], tolerance=1e-5)


# -- threads ------------------------------------------------------------------------------------------
def test_a_forward_in_one_thread_and_its_backward_in_another() -> None:
    model, x = Net(), torch.randn(4, 6, requires_grad=True)
    run = compiled(model)
    out = run(x)
    worker = threading.Thread(target=lambda: out.sum().backward())
    worker.start()
    worker.join()
    want = twin(x.detach()).requires_grad_()
    model(want).sum().backward()
    torch.testing.assert_close(x.grad, want.grad)


def test_two_threads_run_one_function_at_once() -> None:
    run = compiled(lambda x, y: (x @ y).softmax(-1) @ y.t() + x.sin().sum(0))
    sets = [(torch.randn(64, 64), torch.randn(64, 64)) for _ in range(2)]
    wants = [run(*s) for s in sets]
    wrong: list[int] = []

    def work(k: int) -> None:
        for _ in range(40):
            wrong.extend([k] * (not torch.equal(run(*sets[k]), wants[k])))

    workers = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert wrong == []


def test_two_threads_train_one_model_at_once() -> None:
    model = Net()
    run = compiled(model)
    run(torch.randn(4, 6)).sum().backward()
    xs = [torch.randn(4, 6) for _ in range(2)]
    wants = [torch.autograd.grad(model(x).sum(), list(model.parameters())) for x in xs]
    wrong: list[str] = []

    def work(k: int) -> None:
        for _ in range(20):
            got = torch.autograd.grad(run(xs[k]).sum(), list(model.parameters()))
            for a, b in zip(got, wants[k], strict=True):
                if not torch.allclose(a, b, atol=1e-5):
                    wrong.append(f"thread {k}")

    workers = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert wrong == []


# -- checkpoints --------------------------------------------------------------------------------------
def saved_numel() -> int:
    """Elements that the compiled forward keeps for its backward."""
    (backward,) = records("backward")
    plan = backward.stages["memory"]
    return sum(plan.hint(plan.buffers[n].numel) for n in plan.inputs if n in plan.buffers)


class Deep(nn.Module):
    def __init__(self, recompute: bool, p: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.recompute, self.p = recompute, p

    def block(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.dropout(layer(x).tanh(), self.p, self.training)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False) if self.recompute else self.block(x)


def test_a_checkpoint_is_honoured() -> None:
    sizes = []
    for recompute in (False, True):
        torch.manual_seed(0)
        check(Deep(recompute), torch.randn(128, 16, requires_grad=True), tolerance=1e-5)
        sizes.append(saved_numel())
    assert sizes[1] < sizes[0] - 3 * 128 * 16


def test_dropout_in_a_checkpoint_is_the_same_in_the_backward() -> None:
    class Block(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(lambda y: F.dropout(y, 0.5) * 2, x, use_reentrant=False)

    x = torch.randn(64, 64, requires_grad=True)
    out = compiled(Block())(x)
    out.sum().backward()
    torch.testing.assert_close(x.grad * x.detach(), out.detach())
    model = Deep(True, 0.3)
    x = torch.randn(8, 16, requires_grad=True)
    run = compiled(model)
    torch.manual_seed(5)
    first = run(x)
    (grad,) = torch.autograd.grad(first.sum(), x)
    step = 1e-2 * torch.randn_like(x)
    torch.manual_seed(5)
    model.double()
    # directional derivative in float64, under the same seed
    run = compiled(model)
    torch.manual_seed(5)
    up = run(x.detach().double() + 1e-4 * step.double())
    torch.manual_seed(5)
    down = run(x.detach().double() - 1e-4 * step.double())
    slope = (up - down).sum() / 2e-4
    torch.testing.assert_close((grad.double() * step.double()).sum(), slope, rtol=1e-3, atol=1e-5)


# -- life of a model ----------------------------------------------------------------------------------
def test_a_model_is_copied_and_pickled_after_compiling() -> None:
    model, x = Net(), torch.randn(4, 6)
    run = compiled(model)
    want = run(x).detach()
    clone = copy.deepcopy(model)
    clone.compile(backend="minifuse")
    same(clone(x).detach(), want)
    other = copy.deepcopy(run)
    same(other(x).detach(), want)
    back = pickle.loads(pickle.dumps(model))
    same(back(x).detach(), model(x).detach())
    buffer = io.BytesIO()
    torch.save(run.state_dict(), buffer)
    buffer.seek(0)
    model.load_state_dict({k.removeprefix("_orig_mod."): v for k, v in torch.load(buffer).items()})
    same(run(x).detach(), want)


def test_compiled_again_after_a_reset() -> None:
    f = torch.compile(lambda x: x.sin() + 1, backend="minifuse")
    x = torch.randn(5)
    same(f(x), x.sin() + 1)
    torch._dynamo.reset()
    same(f(x), x.sin() + 1)


def test_torch_func_through_compile() -> None:
    def loss(w: Tensor, x: Tensor) -> Tensor:
        return (w * x).sin().sum()

    check(lambda w, x: torch.func.grad(loss)(w, x), torch.randn(4), torch.randn(4))
    check(lambda w, x: torch.func.vmap(lambda a: (w @ a).softmax(-1))(x), torch.randn(3, 4), torch.randn(5, 4))
    check(lambda w, x: torch.func.vmap(torch.func.grad(loss), (None, 0))(w, x), torch.randn(4), torch.randn(5, 4))
    check(lambda x: torch.func.jacrev(lambda y: y.sin() * y.sum())(x), torch.randn(4))


def test_a_custom_autograd_function() -> None:
    class Clamp(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.clamp(-1, 1)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return g * 2 * (x > 0)

    check(lambda x: Clamp.apply(x * 3), torch.randn(7, requires_grad=True))


def test_memory_does_not_grow_over_steps() -> None:
    model = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64)) for _ in range(3)])
    run, x = compiled(model), torch.randn(256, 64)

    def step() -> None:
        run(x).square().sum().backward()

    def tensors() -> int:
        gc.collect()
        return sum(1 for o in gc.get_objects() if isinstance(o, Tensor))

    for _ in range(5):
        step()
    before = tensors()
    for _ in range(50):
        step()
    assert tensors() <= before


def test_saved_activations_die_with_the_backward() -> None:
    model, x = Net(), torch.randn(256, 6)
    out = compiled(model)(x).sum()
    given = {t.untyped_storage().data_ptr() for t in (*model.parameters(), x)}
    saved = list(out.grad_fn.next_functions[0][0].saved_tensors)
    watched = [weakref.ref(t) for t in saved if t.untyped_storage().data_ptr() not in given]
    del saved
    assert watched
    out.backward()
    gc.collect()
    assert all(w() is None for w in watched)


def test_a_backward_never_run_is_never_compiled() -> None:
    compiled(Net())(torch.randn(4, 6))
    assert [r.stage for r in records()] == ["forward"]


@pytest.mark.parametrize("remat", ["priced_mincut", "save_all", "recompute_all"])
def test_an_input_that_is_written_when_the_forward_has_run_is_not_what_the_backward_reads(remat: str) -> None:
    def f(x: Tensor) -> Tensor:
        x.sub_(x * 3)
        return x.clamp(-2, 2).clone()

    leaf = torch.arange(6.0, requires_grad=True)
    want, got = leaf * 1, leaf * 1
    run = compiled(f, {"remat": remat})
    for _ in range(2):  # the second call differentiates through the first one's write
        (a,) = torch.autograd.grad(f(want).sum(), leaf, retain_graph=True)
        (b,) = torch.autograd.grad(run(got).sum(), leaf, retain_graph=True)
        torch.testing.assert_close(b, a)


def test_a_backward_is_run_again_whether_or_not_the_first_one_kept_its_graph() -> None:
    torch._dynamo.reset()
    run = torch.compile(lambda x: (x.sin() * x.exp()).softmax(1), backend="minifuse")
    x = torch.randn(4, 6, requires_grad=True)
    run(x).sum().backward()
    for _ in range(2):
        out = run(x)
        first = torch.autograd.grad((out * x).sum(), x, retain_graph=True)
        assert torch.equal(first[0], torch.autograd.grad((out * x).sum(), x)[0])
