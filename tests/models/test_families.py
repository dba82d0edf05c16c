from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import minifuse
from minifuse.records import RECORDS
from tests.models.families import FAMILIES

BACKEND = "minifuse"
DRAWS = 4


def _step(model: nn.Module, run: Callable[..., Any], inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs that are tensors, and gradients by parameter, of one training step."""
    output = run(**inputs)
    output["loss"].backward()
    found = {name: value.detach() for name, value in output.items() if isinstance(value, Tensor)}
    return found | {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}


def _to_double(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def _error(got: Tensor, exact: Tensor) -> float:
    return (got.double() - exact).abs().max().item() if got.numel() else 0.0


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()
    RECORDS.clear()


@pytest.mark.parametrize("family", ["gpt2", "bert", "llama", "vit"])
def test_nearly_all_that_can_be_fused_runs_in_generated_kernels(family: str) -> None:
    model, inputs = FAMILIES[family]()
    model.train()
    _step(model, torch.compile(model, backend=BACKEND), inputs)
    found = minifuse.reports()
    assert {r.stage for r in found} >= {"forward", "backward"}
    for report in found:
        assert report.coverage >= 0.9, [(e.op, e.reason) for e in report.externs]
        assert all(e.reason for e in report.externs)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step_is_as_exact_as_eager(family: str) -> None:
    """Over several draws of weights and inputs: what is zero but for rounding differs by chance in any one of them."""
    model = None
    ours: dict[str, float] = {}
    allowed: dict[str, float] = {}
    for draw in range(DRAWS):
        torch.manual_seed(draw)
        eager_model, inputs = FAMILIES[family]()
        eager_model.train()
        exact_model = copy.deepcopy(eager_model).double()
        if model is None:
            model = copy.deepcopy(eager_model)
            run = torch.compile(model, backend=BACKEND)
        model.load_state_dict(eager_model.state_dict())
        model.zero_grad()

        exact = _step(exact_model, exact_model, _to_double(inputs))
        eager = _step(eager_model, eager_model, inputs)
        compiled = _step(model, run, inputs)

        assert compiled.keys() == eager.keys()
        assert math.isfinite(eager["loss"].item())
        for name, value in eager.items():
            got = compiled[name]
            assert (got.shape, got.dtype, got.stride()) == (value.shape, value.dtype, value.stride()), name
            ulp = torch.finfo(value.dtype).eps * exact[name].abs().max().item()
            ours[name] = max(ours.get(name, 0.0), _error(got, exact[name]))
            allowed[name] = max(allowed.get(name, 0.0), 4 * _error(value, exact[name]), 4 * ulp)
    for name, error in ours.items():
        assert error <= allowed[name], name
