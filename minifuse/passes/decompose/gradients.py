"""Gradients by gathers, comparisons and padding where torch's own would scatter or stay whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def nll_loss_backward(
    grad: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int, total: Tensor
) -> Tensor:
    """The gradient of the negative log likelihood as a comparison with the class index: no scatter."""
    if x.dim() not in (1, 2):
        return NotImplemented
    channel = x.dim() - 1
    classes = torch.arange(x.shape[channel], device=x.device)
    wanted = target.unsqueeze(channel)
    picked = classes.eq(wanted) & wanted.ne(ignore_index)
    if reduction == 1:
        grad = grad / total
    if weight is not None:
        grad = weight.unsqueeze(0) * grad.unsqueeze(channel) if x.dim() == 2 and grad.dim() == 1 else weight * grad
    elif x.dim() == 2 and grad.dim() == 1:
        grad = grad.unsqueeze(channel)
    return torch.where(picked, -grad, 0.0).to(x.dtype)


def slice_backward(grad: Tensor, sizes: Any, dim: int, start: int, end: int, step: int) -> Tensor:
    """The gradient of a slice is its padding with zeros."""
    if step != 1 or not isinstance(start, int) or start < 0:
        return aten.slice_scatter(grad.new_zeros(sizes), grad, dim, start, end, step)
    return _padded(grad, sizes, dim % len(sizes), start)


def select_backward(grad: Tensor, sizes: Any, dim: int, index: int) -> Tensor:
    """The gradient of a select is its padding with zeros."""
    dim %= len(sizes)
    return _padded(grad.unsqueeze(dim), sizes, dim, index + sizes[dim] if index < 0 else index)


def _padded(grad: Tensor, sizes: Any, dim: int, before: Any) -> Tensor:
    """Zeros of these sizes around what stands behind `before` of them along one dimension."""
    pad = [0] * (2 * len(sizes))
    position = 2 * (len(sizes) - 1 - dim)
    pad[position : position + 2] = before, sizes[dim] - before - grad.shape[dim]
    return aten.constant_pad_nd(grad, pad)


def weight_norm_backward(grad: Tensor, v: Tensor, g: Tensor, norms: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The gradients of `v * (g / norm(v))`, norms over all dimensions but one (Salimans and Kingma, "Weight
    Normalization", 2016)."""
    others = [d for d in range(v.dim()) if d != dim % v.dim()]
    along = (grad * v).sum(others, keepdim=True) if others else grad * v
    return g / norms * (grad - v * (along / (norms * norms))), along / norms


def shrink_backward(grad: Tensor, x: Tensor, limit: float) -> Tensor:
    """The gradient of a soft or hard shrinkage: none within the limit."""
    return torch.where((x >= -limit) & (x <= limit), 0, grad)


TABLE: dict[Any, Callable[..., Any]] = {
    aten.nll_loss_backward.default: nll_loss_backward,
    aten.slice_backward.default: slice_backward,
    aten.select_backward.default: select_backward,
    aten._weight_norm_interface_backward.default: weight_norm_backward,
    aten.hardshrink_backward.default: shrink_backward,
    aten.softshrink_backward.default: shrink_backward,
}
