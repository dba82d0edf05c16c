"""Which library multiplies: oneDNN takes large float32 products of the CPU where the machine showed it to be faster.

ATen hands float32 products to MKL, or to another BLAS. oneDNN has an operator for `x @ w` that reads `w` either way
round and `x` by whole rows; by products of other forms it is slower. What is chosen depends on shapes alone, never on
what was fused, recomputed or how many threads there are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from minifuse import compat
from minifuse.ir.index import ONE
from minifuse.ir.plan import TensorRef

if TYPE_CHECKING:
    from .graph import Lowering

aten = torch.ops.aten
# The operator's way through torch is 15 µs longer: that is earned back by a product of so many flops (half a
# millisecond), or by weights of so many bytes, which no core's second cache holds. Of those, few rows gain most: 8 by
# 768 x 3072 take 0.41 ms for MKL's 0.62.
LEAST_FLOPS, LEAST_BYTES = 1e8, 2e6
# Rate of oneDNN over ATen's from which on it is preferred, by what is measured to two digits.
FASTER = 1.1


def by_onednn(lo: Lowering, node: fx.Node, args: Any) -> tuple[Any, tuple[Any, ...]] | None:
    """The operator and the arguments that compute a product faster than `node.target` of `args`, if any do.

    `args` are those of `mm` or `addmm`, as `Lowering.tree` gives them.
    """
    if node.target not in (aten.mm.default, aten.addmm.default) or lo.ctx.device.onednn < FASTER or node.kwargs:
        return None
    if compat.LINEAR is None or not torch.backends.mkldnn.enabled:
        return None
    *bias, x, w = args
    val = node.meta["val"]
    if val.device.type != "cpu" or val.dtype is not torch.float32:
        return None
    (rows, inner), columns = x.shape, w.shape[1]
    if bias and not (bias[0].shape == (columns,) and bias[0].stride == (ONE,)):
        return None
    weights = lo.hint(inner * columns)
    if 2 * lo.hint(rows) * weights < LEAST_FLOPS and 4 * weights < LEAST_BYTES:
        return None
    turned = w.stride == (ONE, inner)
    if x.stride != (inner, ONE) or not turned and (w.stride != (columns, ONE) or rows is ONE):
        return None
    weight = TensorRef(w.buffer, w.shape[::-1], w.stride[::-1], w.offset)
    return compat.LINEAR, (x, weight, bias[0] if bias else None, "none", [], "")
