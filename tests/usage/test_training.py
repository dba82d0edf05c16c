"""The parts of a training loop: micro-batches, half precision, functional transforms, optimisers, clipped gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.optim.lr_scheduler import LinearLR

from tests.judge import check, compiled, externs, records, same, twin
from tests.usage.models import Language, Perceptron, gradients, loss_of, parameters, texts

Optimizer = torch.optim.Optimizer


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_gradients_of_micro_batches_add_up() -> None:
    def losses(model: nn.Module, run: Callable[[Tensor], Tensor], batch: Tensor) -> list[float]:
        optimizer = torch.optim.SGD(model.parameters(), 0.3, momentum=0.9)
        found = []
        for _ in range(2):
            parts = [loss_of(run, part) / 3 for part in batch.chunk(3)]
            for part in parts:
                part.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(sum(part.item() for part in parts))
        return found

    model, batch = Language(Perceptron), texts(12)
    eager = twin(model)
    got = losses(model, compiled(model), batch)
    assert got == pytest.approx(losses(eager, eager, batch), rel=1e-5)
    assert len(records()) == 2


def test_autocast_with_a_scaler_follows_eager() -> None:
    """The loop of torch's documentation: forward in bfloat16, a scaled backward, clipped gradients, a guarded step."""

    def losses(model: nn.Module, run: Callable[[Tensor], Tensor], batch: Tensor) -> list[float]:
        optimizer = torch.optim.SGD(model.parameters(), 0.3)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        found = []
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(run, batch)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    model, batch = Language(layers=1), texts()
    eager = twin(model)
    got = losses(model, compiled(model), batch)
    assert got == pytest.approx(losses(eager, eager, batch), rel=2e-3)
    assert got[-1] < got[0]


# -- torch.func -----------------------------------------------------------------------------------------
def test_gradients_of_each_example() -> None:
    model = Language(Perceptron, layers=1)
    # detached, as torch's documentation has it: gradients are taken inside, none through the whole
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: dict[str, Tensor], words: Tensor) -> Tensor:
        return loss_of(lambda w: functional_call(model, weights, (w,)), words[None])

    def by_example(weights: dict[str, Tensor], batch: Tensor) -> Any:
        return vmap(grad(loss), (None, 0))(weights, batch)

    batch = texts()
    same(compiled(by_example)(weights, batch), by_example(weights, batch), tolerance=1e-5)


def test_an_ensemble_as_one_batched_model() -> None:
    members = [nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 2)) for _ in range(3)]
    weights, _ = stack_module_state(members)
    check(lambda w, x: vmap(lambda one: functional_call(members[0], one, (x,)))(w), weights, torch.randn(5, 8))


# -- optimisers -----------------------------------------------------------------------------------------
def sgd(weights: Iterable[Tensor], lr: Any) -> Optimizer:
    return torch.optim.SGD(weights, lr, momentum=0.9)


def adamw(weights: Iterable[Tensor], lr: Any) -> Optimizer:
    return torch.optim.AdamW(weights, lr, foreach=False)


def adamw_foreach(weights: Iterable[Tensor], lr: Any) -> Optimizer:
    return torch.optim.AdamW(weights, lr, foreach=True)


def steps_as_eager(make: Callable[..., Optimizer], lr: Callable[[], Any]) -> None:
    """Six steps under a schedule of learning rates, on gradients drawn anew each time."""

    def weights(model: nn.Module, compile: Callable[..., Any]) -> list[Tensor]:
        torch.manual_seed(1)
        optimizer = make(model.parameters(), lr())
        schedule = LinearLR(optimizer, 1.0, 0.1, total_iters=6)
        step = compile(optimizer.step)
        for _ in range(6):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            step()
            schedule.step()
        return parameters(model)

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    eager = twin(model)
    same(weights(model, compiled), weights(eager, lambda step: step), tolerance=1e-5)


@pytest.mark.parametrize("make", [sgd, adamw])
def test_a_learning_rate_in_a_tensor_is_scheduled_without_compiling_again(make: Callable[..., Optimizer]) -> None:
    steps_as_eager(make, lambda: torch.tensor(0.05))
    # SGD's first step is a graph of its own: there is no momentum yet
    assert len(records()) == (2 if make is sgd else 1)
    assert externs() == []


def test_a_learning_rate_that_is_a_number_is_scheduled_with_one_compile_more() -> None:
    steps_as_eager(adamw_foreach, lambda: 0.05)
    assert len(records()) == 2
    assert externs() == []


def test_clipping_gradients_is_one_graph() -> None:
    def clip(model: nn.Module) -> Tensor:
        return nn.utils.clip_grad_norm_(model.parameters(), 0.1)

    model, words = Language(Perceptron), texts()
    eager = twin(model)
    loss_of(model, words).backward()
    loss_of(eager, words).backward()
    same(compiled(clip, fullgraph=True)(model), clip(eager))
    same(gradients(model), gradients(eager))
    assert len(records()) == 1


def test_forward_backward_and_step_in_one_function() -> None:
    def make(model: nn.Module) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        optimizer = torch.optim.SGD(model.parameters(), 0.3, momentum=0.9)

        def step(words: Tensor) -> tuple[Tensor, Tensor]:
            loss = loss_of(model, words)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach(), norm

        return step

    model = Language(Perceptron, layers=1)
    eager = twin(model)
    mine, theirs = compiled(make(model)), make(eager)
    for _ in range(3):
        words = texts()
        same(mine(words), theirs(words), tolerance=1e-5)
    same(parameters(model), parameters(eager), tolerance=1e-5)
