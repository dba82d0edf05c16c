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
    " mse_loss smooth_l1_loss elu leaky_relu linalg_vector_norm dist ldexp narrow_copy permute_copy as_strided_copy"
    " unbind_copy tril_indices triu_indices rrelu_with_noise_backward batch_norm_backward _batch_norm_no_update"
    " _batch_norm_with_update_functional"
).split()
# Random numbers as arithmetic on uniform ones; ATen's own with rng="eager".
_RANDOM = "exponential cauchy geometric log_normal".split()


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
    """A diagonal written into a copy."""
    length = source.shape[-1]
    if length == 0:
        return x.clone()
    at = torch.arange(length, device=x.device)
    last = x.movedim((dim1, dim2), (-2, -1))
    places = [None] * (x.dim() - 2) + [at + max(-offset, 0), at + max(offset, 0)]
    return aten.index_put(last, places, source).movedim((-2, -1), (dim1, dim2))


def weight_norm_backward(grad: Tensor, v: Tensor, g: Tensor, norms: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The gradients of `v * (g / norm(v))`, norms over all dimensions but one (Salimans and Kingma, "Weight
    Normalization", 2016)."""
    others = [d for d in range(v.dim()) if d != dim % v.dim()]
    along = (grad * v).sum(others, keepdim=True) if others else grad * v
    return g / norms * (grad - v * (along / (norms * norms))), along / norms


def shrink_backward(grad: Tensor, x: Tensor, limit: float) -> Tensor:
    """The gradient of a soft or hard shrinkage: none within the limit."""
    return torch.where((x >= -limit) & (x <= limit), 0, grad)


def round_decimals(x: Tensor, *, decimals: int) -> Tensor:
    """Rounding to a power of ten."""
    power = 10.0 ** abs(decimals)
    return torch.round(x / power) * power if decimals < 0 else torch.round(x * power) / power


def _bounds(dtype: torch.dtype) -> tuple[float, float]:
    info = torch.iinfo(dtype)
    return info.min, info.max


def _off_cpu(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A decomposition that leaves CPU tensors to the operator itself."""
    return lambda x, *args, **kw: NotImplemented if x.device.type == "cpu" else fn(x, *args, **kw)


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


_DRAWN: dict[Any, Callable[..., Any]] = {
    aten.uniform.default: uniform,
    aten.normal_functional.default: normal_like,
    aten.normal.Tensor_float: normal,
    aten.normal.float_Tensor: normal,
    aten.normal.Tensor_Tensor: normal,
}
_OURS: dict[Any, Callable[..., Any]] = {
    aten.native_dropout.default: native_dropout,
    aten.nll_loss_backward.default: nll_loss_backward,
    aten.round.decimals: round_decimals,
    aten.hardshrink_backward.default: shrink_backward,
    aten.softshrink_backward.default: shrink_backward,
    aten._is_all_true.default: torch.all,
    aten._is_any_true.default: torch.any,
    aten._weight_norm_interface_backward.default: weight_norm_backward,
    aten.scatter_reduce.two: scatter_reduce,
    aten.index_reduce.default: index_reduce,
    aten.masked_scatter.default: masked_scatter,
    aten.masked_scatter_backward.default: masked_scatter_backward,
    aten.diagonal_scatter.default: diagonal_scatter,
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
    for name in [*_ALSO, *(_RANDOM if rng != "eager" else [])]:
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
    else:
        table.update(_DRAWN)
    return table
