"""Fused optimiser steps in generated kernels: eager's parameters and states."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.judge import check, externs, kernels

SHAPES = ((5, 7), (33,), ())
ADAM = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1, "eps": 1e-8, "maximize": False, "amsgrad": False}
# Of the forms in place torch traces those without an empty list alone: amsgrad's.
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "adam": (torch.ops.aten._fused_adam, ADAM),
    "in place": (torch._fused_adam_, {**ADAM, "amsgrad": True, "maximize": True}),
    "adamw": (torch.ops.aten._fused_adamw, ADAM),
    "adamw in place": (torch._fused_adamw_, {**ADAM, "amsgrad": True}),
}


@pytest.mark.parametrize("scaling", [None, 0.0, 1.0], ids=["plain", "scaled", "overflown"])
@pytest.mark.parametrize("name", CASES)
def test_a_fused_step_is_kernels(name: str, scaling: float | None) -> None:
    step, settings = CASES[name]
    lists = [[torch.randn(s) for s in SHAPES] for _ in range(2)] + [[torch.rand(s) for s in SHAPES] for _ in range(3)]
    if not settings["amsgrad"]:
        lists[4] = []
    lists.append([torch.tensor(3.0) for _ in SHAPES])
    extra = {} if scaling is None else {"grad_scale": torch.tensor(8.0), "found_inf": torch.tensor(scaling)}
    check(lambda lists, extra: step(*lists, **settings, **extra), lists, extra, tolerance=1e-5)
    assert not externs()
    assert kernels() <= len(SHAPES) * 2
