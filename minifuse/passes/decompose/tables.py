"""Decompositions into what lowering knows: torch's own, less what ATen does better, and a few of ours."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from minifuse import compat
from minifuse.ir.lazy import lazy

from . import foreach, gradients, norms, optimisers, quantised, random, scatters, softmaxes

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
KEEP_ON_CPU = (
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


def round_decimals(x: Tensor, *, decimals: int) -> Tensor:
    """Rounding to a power of ten; half types are rounded once, at the end."""
    power, wide = 10.0 ** abs(decimals), x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return (torch.round(wide / power) * power if decimals < 0 else torch.round(wide * power) / power).to(x.dtype)


def _off_cpu(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A decomposition that leaves CPU tensors to the operator itself."""
    return lambda x, *args, **kw: NotImplemented if x.device.type == "cpu" else fn(x, *args, **kw)


_OURS: dict[Any, Callable[..., Any]] = {
    **gradients.TABLE,
    **scatters.TABLE,
    aten.round.decimals: round_decimals,
    aten._is_all_true.default: torch.all,
    aten._is_any_true.default: torch.any,
}


class Decompositions(Mapping[Any, Callable[..., Any]]):
    """Overload -> function. With rng="eager" dropout stays ATen's own.

    Made when somebody looks into it: a warm start does not. `seconds` is what its functions took so far, of the time
    of whoever traces them.
    """

    def __init__(self, rng: str) -> None:
        self.rng = rng
        self.seconds = 0.0
        self._inside = False

    @lazy
    def table(self) -> dict[Any, Callable[..., Any]]:
        fma = compat.registered_prim("fma")
        late = {} if fma is None else {fma: lambda a, b, c: a * b + c}
        table = {**_table(self.rng), **quantised.decompositions(), **late}
        return {op: self._timed(fn) for op, fn in table.items()}

    def _timed(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fn)
        def call(*args: Any, **kw: Any) -> Any:
            if self._inside:
                return fn(*args, **kw)
            self._inside, begin = True, time.perf_counter()
            try:
                return fn(*args, **kw)
            finally:
                self._inside = False
                self.seconds += time.perf_counter() - begin

        return call

    def __getitem__(self, op: Any) -> Callable[..., Any]:
        return self.table[op]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.table)

    def __len__(self) -> int:
        return len(self.table)


@functools.cache
def _table(rng: str) -> dict[Any, Callable[..., Any]]:
    keep = {"aten::" + name for name in [*_KEEP, *RESIZING]}
    table = {op: fn for op, fn in compat.core_decompositions().items() if op.name().split(".")[0] not in keep}
    for name in KEEP_ON_CPU:
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
    table.update(norms.decompositions(everything))
    table.update(softmaxes.decompositions({**everything, **table}))
    return table if rng == "eager" else {**table, **random.TABLE}
