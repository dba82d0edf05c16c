"""How often families compile when the batch and the length of the text change."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tests.judge import same
from tests.models.check import step
from tests.models.families import FAMILIES
from tests.models.makers import BATCH, SEQUENCE


def cut(inputs: dict[str, Any], batch: int, sequence: int) -> dict[str, Any]:
    """The inputs of a family at another size, up to twice its batch."""

    def of(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.shape[0] != BATCH:
            return x
        x = x.repeat(2, *[1] * (x.dim() - 1))[:batch]
        return (x[:, :sequence] if x.shape[1:] == (SEQUENCE,) else x).contiguous()

    return {name: of(x) for name, x in inputs.items()}


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "vit"])
def test_a_batch_and_a_length_that_change_compile_at_most_twice(family: str) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    eager, inputs = FAMILIES[family]()
    model = copy.deepcopy(eager)
    counter = CompileCounterWithBackend("minifuse")
    run = torch.compile(model, backend=counter)
    for size in ((2, 12), (4, 9), (3, 7), (4, 11)):
        some = cut(inputs, *size)
        for m in (model, eager):
            m.zero_grad()
        same(step(model, run, some), step(eager, eager, some), tolerance=2e-4)
    assert counter.frame_count <= 2
