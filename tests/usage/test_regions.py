"""A block that a model repeats is compiled once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.judge import compiled, records, same, twin
from tests.usage.models import WIDTH, Language, Perceptron, gradients, loss_of, texts

LAYERS = 4


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def trains_as(model: nn.Module, eager: nn.Module) -> None:
    for _ in range(2):
        words = texts()
        loss_of(model, words).backward()
        loss_of(eager, words).backward()
    same(gradients(model), gradients(eager))


def test_blocks_compiled_in_place_share_one_graph() -> None:
    compiled(nn.Identity())  # empties the records
    model = Language(layers=LAYERS)
    eager = twin(model)
    for block in model.blocks:
        block.compile(backend="minifuse")
    trains_as(model, eager)
    assert [r.stage for r in records()] == ["forward", "backward"]


def test_wrapped_blocks_share_one_graph() -> None:
    model = Language(layers=LAYERS)
    eager = twin(model)
    compiled(nn.Identity())
    model.blocks = nn.ModuleList(torch.compile(block, backend="minifuse") for block in model.blocks)
    trains_as(model, eager)
    assert [r.stage for r in records()] == ["forward", "backward"]


def test_a_nested_compile_region_computes_what_eager_does() -> None:
    class Region(Perceptron):
        @torch.compiler.nested_compile_region
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    model = Language(Region, width=WIDTH)
    eager = twin(model)
    trains_as(compiled(model), eager)
