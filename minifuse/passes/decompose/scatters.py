"""Scatters as sums, counts and running sums of what kernels scatter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minifuse import compat
from minifuse.ir.shape import is_overlapping

aten = torch.ops.aten


def scatter_reduce(
    x: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    """A mean as a sum and a count; what is not to count is replaced by the identity where something is scattered."""
    plain = x.dim() == 0 or index.dim() == 0 or x.dtype is torch.bool
    if x.device.type != "cpu" or plain or reduce != "mean" and include_self:
        return NotImplemented
    if not include_self:
        lowest, highest = (-math.inf, math.inf) if x.is_floating_point() else (_bounds(x.dtype))
        start = {"sum": 0, "mean": 0, "prod": 1, "amax": lowest, "amin": highest}[reduce]
        x = x.scatter(dim, index, start)
    if reduce != "mean":
        return aten.scatter_reduce.two(x, dim, index, src, reduce)
    first = torch.ones_like(x) if include_self else torch.zeros_like(x)
    count = first.scatter_add(dim, index, torch.ones_like(src)).clamp_min(1)
    total = x.scatter_add(dim, index, src)
    return total / count if x.is_floating_point() else torch.div(total, count, rounding_mode="floor")


def index_reduce(
    x: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    """Rows that are reduced into rows: `scatter_reduce` with one index a row."""
    if x.device.type != "cpu" or x.dim() == 0:
        return NotImplemented
    at = index.reshape([-1 if d == dim % x.dim() else 1 for d in range(x.dim())]).expand(source.shape)
    return aten.scatter_reduce.two(x, dim, at, source, reduce, include_self=include_self)


def masked_scatter(x: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """Elements of `source` in order, where the mask holds: its running sum says which."""
    if source.numel() == 0 or mask.dtype is not torch.bool:
        return NotImplemented
    x, mask = torch.broadcast_tensors(x, mask)
    at = mask.reshape(-1).cumsum(0).sub(1).clamp_min(0)
    return torch.where(mask, source.reshape(-1)[at].reshape(x.shape), x).contiguous()


def masked_scatter_backward(grad: Tensor, mask: Tensor, sizes: Any) -> Tensor:
    """The gradients of the elements that were taken, in order, and zeros."""
    if grad.device.type != "cpu" or math.prod(sizes) == 0:
        return NotImplemented
    taken = torch.where(mask, grad, 0).reshape(-1)
    at = mask.expand(grad.shape).reshape(-1).cumsum(0).sub(1).clamp_min(0)
    return grad.new_zeros(math.prod(sizes)).scatter_add(0, at, taken).reshape(sizes)


def diagonal_scatter(x: Tensor, source: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Tensor:
    """A diagonal written into a copy; where elements share memory what is written shows at each, and ATen has it."""
    if is_overlapping(*([compat.size_hint(s) for s in many] for many in (x.shape, x.stride()))):
        return NotImplemented
    length = source.shape[-1]
    if length == 0:
        return x.clone()
    at = torch.arange(length, device=x.device)
    last = x.movedim((dim1, dim2), (-2, -1))
    places = [None] * (x.dim() - 2) + [at + max(-offset, 0), at + max(offset, 0)]
    return aten.index_put(last, places, source).movedim((-2, -1), (dim1, dim2))


def _bounds(dtype: torch.dtype) -> tuple[float, float]:
    info = torch.iinfo(dtype)
    return info.min, info.max


TABLE: dict[Any, Callable[..., Any]] = {
    aten.scatter_reduce.two: scatter_reduce,
    aten.index_reduce.default: index_reduce,
    aten.masked_scatter.default: masked_scatter,
    aten.masked_scatter_backward.default: masked_scatter_backward,
    aten.diagonal_scatter.default: diagonal_scatter,
}
