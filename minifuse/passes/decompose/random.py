"""Random numbers as arithmetic on uniform and normal ones, which become a seed and a counter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def native_dropout(x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    """Dropout by a drawn uniform number; the kept elements are scaled by 1/(1-p)."""
    if train is False or p == 0:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    if p == 1:
        return torch.zeros_like(x), torch.zeros_like(x, dtype=torch.bool)
    keep = torch.rand_like(x, dtype=torch.float32) >= p
    return torch.where(keep, x * (1.0 / (1.0 - p)), 0.0), keep


def uniform(x: Tensor, low: float = 0.0, high: float = 1.0, *, generator: Any = None) -> Tensor:
    """Uniform numbers in [low, high) of the shape of x."""
    return NotImplemented if generator is not None else torch.rand_like(x) * (high - low) + low


def normal(mean: Any, std: Any = 1.0, *, generator: Any = None) -> Tensor:
    """Normal numbers of the shape that mean and deviation have together."""
    if generator is not None:
        return NotImplemented
    like = mean + torch.zeros_like(std) if isinstance(std, Tensor) else mean
    return torch.randn_like(like) * std + mean


def normal_like(x: Tensor, mean: float = 0.0, std: float = 1.0, *, generator: Any = None) -> Tensor:
    return NotImplemented if generator is not None else torch.randn_like(x) * std + mean


TABLE: dict[Any, Callable[..., Any]] = {
    aten.native_dropout.default: native_dropout,
    aten.uniform.default: uniform,
    aten.normal_functional.default: normal_like,
    aten.normal.Tensor_float: normal,
    aten.normal.float_Tensor: normal,
    aten.normal.Tensor_Tensor: normal,
}
