"""torch.compile's own switches, and how often it compiles."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from tests.judge import compiled, records, same, twin
from tests.usage.models import WIDTH, Language, Perceptron, gradients, loss_of, texts


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# -- switches -------------------------------------------------------------------------------------------
def test_a_reset_compiles_again() -> None:
    run = compiled(lambda x: x.sin() + 1)
    for count in (1, 2):
        same(run(torch.ones(5)), torch.ones(5).sin() + 1)
        assert len(records()) == count
        torch.compiler.reset()


def test_a_stance_says_when_to_compile() -> None:
    run, x = compiled(lambda x: x.sin() + 1), torch.randn(5)
    with torch.compiler.set_stance("force_eager"):
        same(run(x), x.sin() + 1, exact=True)
    assert records() == []
    run(x)
    assert len(records()) == 1
    with torch.compiler.set_stance("fail_on_recompile"):
        same(run(x), x.sin() + 1)
        with pytest.raises(RuntimeError, match="fail_on_recompile"):
            run(x[:4])
    with torch.compiler.set_stance("eager_on_recompile"):
        same(run(x[:3]), x[:3].sin() + 1, exact=True)
    assert len(records()) == 1


def test_a_graph_break_under_fullgraph_is_torch_s_error() -> None:
    def f(x: Tensor) -> Tensor:
        y = x.sin()
        torch._dynamo.graph_break()
        return y + 1

    with pytest.raises(torch._dynamo.exc.Unsupported, match="graph_break"):
        compiled(f, fullgraph=True)(torch.ones(3))
    assert records() == []
    same(compiled(f)(torch.ones(3)), torch.ones(3).sin() + 1)
    assert len(records()) == 2


def test_compiled_autograd_accumulates_eager_s_gradients() -> None:
    model = Perceptron()
    eager = twin(model)

    def step(model: nn.Module, x: Tensor) -> Tensor:
        loss = model(x).square().mean()
        loss.backward()
        return loss.detach()

    with torch._dynamo.config.patch(compiled_autograd=True):
        run = compiled(step)
        for _ in range(2):
            x = torch.randn(4, WIDTH)
            same(run(model, x), step(eager, x))
    same(gradients(model), gradients(eager), tolerance=1e-5)
    assert "backward" not in {r.stage for r in records()}, "it is captured as a graph of its own"


# -- sizes that change ----------------------------------------------------------------------------------
def frames(
    model: nn.Module, batches: list[Tensor], use: Callable[[Callable[..., Tensor], nn.Module, Tensor], None]
) -> int:
    """How often `model` is compiled while it is used, plain and compiled, on these batches."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("minifuse")
    run, eager = torch.compile(model, backend=counter), twin(model)
    for words in batches:
        use(run, eager, words)
    return int(counter.frame_count)


@pytest.mark.parametrize("shapes", [((4, 8), (6, 8), (3, 8)), ((4, 8), (4, 11), (4, 5))], ids=["batch", "sequence"])
def test_training_on_batches_of_changing_size_compiles_twice(shapes: tuple[tuple[int, int], ...]) -> None:
    model = Language(layers=1)

    def step(run: Callable[..., Tensor], eager: nn.Module, words: Tensor) -> None:
        loss_of(run, words).backward()
        loss_of(eager, words).backward()
        same(gradients(model), gradients(eager), tolerance=1e-5)

    assert frames(model, [texts(*s) for s in shapes], step) == 2


def test_inference_on_growing_texts_compiles_twice() -> None:
    model = Language(layers=1)

    @torch.no_grad()
    def read(run: Callable[..., Tensor], eager: nn.Module, words: Tensor) -> None:
        same(run(words), eager(words))

    assert frames(model, [texts(2, n) for n in (8, 9, 17, 33)], read) == 2
