"""Quantisation as arithmetic: to integers and back (`quantized_decomposed`), and both at once for training.

The rounding of each scale's inverse is eager's: another would move numbers over a quantisation step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

aten = torch.ops.aten
_HALVES = (torch.float16, torch.bfloat16)


def _quantize(x: Tensor, scale: Any, zero: Any, low: Any, high: Any, dtype: torch.dtype) -> Tensor:
    x = x.float() if x.dtype in _HALVES else x
    return torch.clamp(torch.round(x * (1.0 / scale)) + zero, low, high).to(dtype)


def _dequantize(
    x: Tensor, scale: Any, zero: Any, low: Any, high: Any, dtype: torch.dtype, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    out = (x.to(out_dtype or torch.float32) - zero) * scale
    return out if out_dtype is None else out.to(out_dtype)


def _channels(x: Tensor, of: Tensor | None, axis: int) -> Any:
    """A number a channel, ready to be broadcast along an axis of x."""
    return 0 if of is None else of.reshape([-1 if d == axis % x.dim() else 1 for d in range(x.dim())])


def _by_channel(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def over(x: Tensor, scales: Tensor, zeros: Tensor | None, axis: int, *rest: Any, **kw: Any) -> Tensor:
        return fn(x, _channels(x, scales, axis), _channels(x, zeros, axis), *rest, **kw)

    return over


def _fake(x: Tensor, scale: Any, inverse: Any, zero: Any, low: int, high: int) -> tuple[Tensor, Tensor]:
    q = torch.round(x * inverse) + zero
    return ((q.clamp(low, high) - zero) * scale).to(x.dtype), (q >= low) & (q <= high)


def _fake_per_tensor(x: Tensor, scale: float, zero: int, low: int, high: int) -> tuple[Tensor, Tensor]:
    single = np.float32(scale)
    return _fake(x, float(single), float(np.float32(1.0) / single), zero, low, high)


def _fake_per_channel(x: Tensor, scale: Tensor, zero: Tensor, axis: int, low: int, high: int) -> tuple[Tensor, Tensor]:
    scale, zero = _channels(x, scale, axis), _channels(x, zero, axis)
    return _fake(x, scale, 1.0 / scale, zero, low, high)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Overload -> its arithmetic; of `quantized_decomposed` once torch has loaded it."""
    table: dict[Any, Callable[..., Any]] = {
        aten.fake_quantize_per_tensor_affine_cachemask.default: _fake_per_tensor,
        aten.fake_quantize_per_channel_affine_cachemask.default: _fake_per_channel,
    }
    for verb, fn in (("quantize", _quantize), ("dequantize", _dequantize)):
        for name, parts in ((f"{verb}_per_tensor", fn), (f"{verb}_per_channel", _by_channel(fn))):
            packet = getattr(torch.ops.quantized_decomposed, name, None)
            for overload in () if packet is None else packet.overloads():
                table[getattr(packet, overload)] = parts
    return table
