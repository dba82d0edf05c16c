"""Softmax, its logarithm and logsumexp of rows that are too long to be held between two passes.

What torch takes them apart into walks such a row for its maximum, then for the sum of exponentials, then to write. Both
statistics are found in one walk (`ir.prims.softmax_statistics`). That depends on the length alone, which must be known,
so that no bit of a result depends on what it is fused with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from minifuse.ir import prims
from minifuse.ir.value import LONG_ROW

aten = torch.ops.aten
_HALVES = (torch.float16, torch.bfloat16)


def is_long(x: Tensor, dim: Any) -> bool:
    """Whether it is floats whose rows along a dimension lie in memory and are known to be too long to be held. Along a
    column every element would be joined for itself: twice the time of two walks on a CPU."""
    if not x.is_floating_point() or not isinstance(dim, int) or not x.dim():
        return False
    size, stride = x.shape[dim], x.stride(dim)
    return isinstance(size, int) and size > LONG_ROW and isinstance(stride, int) and stride == 1


def widened(x: Tensor) -> Tensor:
    """What halves are computed in, as eager does."""
    return x.float() if x.dtype in _HALVES else x


def softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    wide = widened(x)
    most, total = prims.softmax_statistics(wide, dim)
    found = torch.exp(wide - most) / total
    return found if half_to_float else found.to(x.dtype)


def log_softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    wide = widened(x)
    most, total = prims.softmax_statistics(wide, dim)
    found = wide - most - torch.log(total)
    return found if half_to_float else found.to(x.dtype)


def logsumexp(x: Tensor, dim: int, keepdim: bool) -> Tensor:
    most, total = prims.softmax_statistics(widened(x), dim)
    found = torch.where(most.abs() == float("inf"), most, most + torch.log(total)).to(x.dtype)
    return found if keepdim else found.squeeze(dim)


def decompositions(others: Mapping[Any, Callable[..., Any]]) -> dict[Any, Callable[..., Any]]:
    """Overload -> its parts; `others` holds torch's own, for rows that are held or of unknown length."""

    def along(op: Any, ours: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def parts(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
            x = x.contiguous()
            return (ours if is_long(x, dim) else others[op])(x, dim, half_to_float)

        return parts

    def over(x: Tensor, dim: Any, keepdim: bool = False) -> Tensor:
        one = dim[0] if isinstance(dim, (list, tuple)) and len(dim) == 1 else dim
        if is_long(x, one):
            return logsumexp(x, one, keepdim)
        return others[aten.logsumexp.default](x, dim, keepdim)

    return {
        aten._softmax.default: along(aten._softmax.default, softmax),
        aten._log_softmax.default: along(aten._log_softmax.default, log_softmax),
        aten.logsumexp.default: over,
    }
