"""Text from a compiled model with a cache of fixed size is the text of the plain one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CompileConfig

from minifuse.records import RECORDS
from tests.usage.llama import llama
from tests.usage.models import texts

GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": "static"}


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    RECORDS.clear()


def test_a_compiled_forward_generates_eager_s_words() -> None:
    model, prompt = llama().eval(), texts(2, 5)
    want = model.generate(prompt, **GREEDY)
    model.forward = torch.compile(model.forward, backend="minifuse")
    assert torch.equal(model.generate(prompt, **GREEDY), want)
    assert len(RECORDS) == 2, "one graph reads the prompt, one makes each word after it"


def test_generate_compiles_by_its_own_configuration() -> None:
    model, prompt = llama().eval(), texts(2, 5)
    want = model.generate(prompt, **GREEDY)
    settings = CompileConfig(backend="minifuse", fullgraph=True)
    settings._compile_all_devices = True  # transformers compiles by itself on accelerators alone
    got = model.generate(prompt, **GREEDY, compile_config=settings)
    assert torch.equal(got, want)
    assert len(RECORDS) == 1, "the prompt is read by eager"
