"""Decompositions into what lowering knows: torch's own, less what ATen does better, and a few of ours."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minifuse import compat

from . import foreach, optimisers, quantised

aten = torch.ops.aten

# Resizing, which torch takes apart into gathers, and its gradient into scatters of them.
RESIZING = (
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d"
    " _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d"
).split()
# Decomposed by torch into core ATen, but kept whole here: ATen's kernel is better than its parts.
_KEEP = (
    "addmm addmv addbmm baddbmm embedding_dense_backward embedding_bag _scaled_dot_product_flash_attention_for_cpu"
    " _scaled_dot_product_flash_attention_for_cpu_backward _scaled_dot_product_efficient_attention"
    " _scaled_dot_product_flash_attention max_pool2d_with_indices _cdist_forward"
    " grid_sampler_2d linear matmul rand_like randn_like randint_like bernoulli native_dropout select_scatter"
    " addcmul addcdiv"
).split()
# Kept whole on a CPU alone: gathers and masked sums of their parts took 4 to 30 times as long as ATen's copies of rows.
_KEEP_ON_CPU = (
    "reflection_pad1d reflection_pad2d reflection_pad3d reflection_pad1d_backward reflection_pad2d_backward"
    " reflection_pad3d_backward replication_pad1d replication_pad2d replication_pad3d"
).split()
# Not core ATen's to decompose, but parts fuse: norms, softmax, activations and losses.
_ALSO = (
    "native_layer_norm native_layer_norm_backward _softmax _softmax_backward_data _log_softmax"
    " _log_softmax_backward_data gelu gelu_backward native_group_norm native_group_norm_backward"
    " native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_functional"
    " _native_batch_norm_legit_no_training native_batch_norm_backward var std_mean std silu_backward"
    " mse_loss smooth_l1_loss elu leaky_relu linalg_vector_norm"
).split()


def native_dropout(x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    """Dropout by a drawn uniform number; the kept elements are scaled by 1/(1-p)."""
    if train is False or p == 0:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    if p == 1:
        return torch.zeros_like(x), torch.zeros_like(x, dtype=torch.bool)
    keep = torch.rand_like(x, dtype=torch.float32) >= p
    return torch.where(keep, x * (1.0 / (1.0 - p)), 0.0), keep


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
    pad = [0] * (2 * len(sizes))
    dim %= len(sizes)
    position = 2 * (len(sizes) - 1 - dim)
    pad[position] = start
    pad[position + 1] = sizes[dim] - start - grad.shape[dim]
    return aten.constant_pad_nd(grad, pad)


def select_backward(grad: Tensor, sizes: Any, dim: int, index: int) -> Tensor:
    """The gradient of a select is its padding with zeros."""
    dim %= len(sizes)
    if index < 0:
        index = index + sizes[dim]
    pad = [0] * (2 * len(sizes))
    position = 2 * (len(sizes) - 1 - dim)
    pad[position], pad[position + 1] = index, sizes[dim] - index - 1
    return aten.constant_pad_nd(grad.unsqueeze(dim), pad)


def scatter_reduce(
    x: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    """A mean as a sum and a count; what is not to count is replaced by the identity where something is scattered."""
    if x.device.type != "cpu" or x.dim() == 0 or index.dim() == 0 or reduce != "mean" and include_self:
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


def _bounds(dtype: torch.dtype) -> tuple[float, float]:
    info = torch.iinfo(dtype)
    return info.min, info.max


def _off_cpu(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A decomposition that leaves CPU tensors to the operator itself."""
    return lambda x, *args, **kw: NotImplemented if x.device.type == "cpu" else fn(x, *args, **kw)


_OURS: dict[Any, Callable[..., Any]] = {
    aten.native_dropout.default: native_dropout,
    aten.nll_loss_backward.default: nll_loss_backward,
    aten.scatter_reduce.two: scatter_reduce,
    aten.slice_backward.default: slice_backward,
    aten.select_backward.default: select_backward,
}


def decompositions(rng: str) -> dict[Any, Callable[..., Any]]:
    """Overload -> function. With rng="eager" dropout stays ATen's own."""
    fma = compat.registered_prim("fma")
    late = {} if fma is None else {fma: lambda a, b, c: a * b + c}
    return {**_table(rng), **quantised.decompositions(), **late}


@functools.cache
def _table(rng: str) -> dict[Any, Callable[..., Any]]:
    keep = {"aten::" + name for name in [*_KEEP, *RESIZING]}
    table = {op: fn for op, fn in compat.core_decompositions().items() if op.name().split(".")[0] not in keep}
    for name in _KEEP_ON_CPU:
        op = getattr(aten, name).default
        table[op] = _off_cpu(table[op])
    everything = compat.all_decompositions()
    for name in _ALSO:
        packet = getattr(aten, name)
        for overload in packet.overloads():
            op = getattr(packet, overload)
            if op in everything:
                table[op] = everything[op]
    table.update(foreach.decompositions())
    table.update(optimisers.decompositions())
    table.update(_OURS)
    if rng == "eager":
        table.pop(aten.native_dropout.default, None)
    return table
