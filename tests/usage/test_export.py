"""A program from `torch.export` is a module like another."""

from __future__ import annotations

import pytest
import torch
from torch.export import Dim, export

from tests.judge import compiled, records, same
from tests.usage.models import Language, Perceptron, gradients, loss_of, texts


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_an_exported_program_runs_and_trains() -> None:
    model, words = Language(layers=1), texts()
    program = export(model, (words,)).module()
    loss_of(compiled(program), words).backward()
    loss_of(model, words).backward()
    same(gradients(program), gradients(model))


def test_dimensions_that_are_exported_dynamic_compile_once() -> None:
    model = Language(Perceptron, layers=1)
    sizes = {"words": {0: Dim("batch"), 1: Dim("sequence", max=32)}}
    run = compiled(export(model, (texts(),), dynamic_shapes=sizes).module(), dynamic=True)
    for shape in ((4, 8), (2, 8), (3, 31)):
        words = texts(*shape)
        same(run(words), model(words))
    assert len(records()) == 1
