"""Inputs of random programs: shapes, layouts in memory, and numbers."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LAYOUTS = ("permuted", "strided", "offset", "expanded", "channels_last", "overlapping", "alias")
SPECIAL = (math.nan, math.inf, -math.inf, -0.0, 0.0, 1e-41, 1.0, -2.5)


@dataclass(frozen=True)
class Input:
    """A tensor that a program takes. `layout` is how it lies in memory (one of `LAYOUTS`, or "contiguous"); "alias" is
    the memory of the input before it. `values`: "normal", "grid" (eighths, with ties), "special" (NaN, infinities,
    zeros), "index" (0 to 15, as indices and shifts are)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str = "contiguous"
    values: str = "normal"


def make(spec: Input, seed: int, before: Tensor | None = None) -> Tensor:
    """The tensor of an input."""
    g = torch.Generator().manual_seed(seed)
    if spec.layout == "alias" and before is not None:
        return before
    shape = list(spec.shape)
    base = list(shape)
    if spec.layout == "permuted":
        base = base[::-1]
    elif spec.layout in ("strided", "offset") and base:
        base[-1] = base[-1] * 6 + 3
    elif spec.layout == "expanded" and base:
        base[0] = 1
    elif spec.layout == "overlapping" and len(base) > 1:
        base = [base[0] + base[1], *base[2:]]
    x = _values(spec, base, g)
    if seed % 2:
        x = fenced(x)
    if spec.layout == "permuted":
        return x.permute(list(reversed(range(len(base)))))
    if spec.layout == "strided" and base:
        return x[..., 1 : 1 + 6 * shape[-1] : 6]
    if spec.layout == "offset" and base:
        return x[..., 3 : 3 + shape[-1]]
    if spec.layout == "expanded" and base:
        return x.expand(shape)
    if spec.layout == "overlapping" and len(shape) > 1:
        return x.as_strided(shape, (x.stride(0), x.stride(0), *x.stride()[1:]))
    if spec.layout == "channels_last" and len(shape) == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x


def _values(spec: Input, shape: Sequence[int], g: torch.Generator) -> Tensor:
    if spec.dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=g).bool()
    if not spec.dtype.is_floating_point:
        low, high = (0, 16) if spec.values == "index" else (0 if spec.dtype is torch.uint8 else -40, 41)
        return torch.randint(low, high, shape, generator=g).to(spec.dtype)
    if spec.values == "grid":
        return (torch.randint(-16, 17, shape, generator=g) / 8).to(spec.dtype)
    x = torch.randn(shape, generator=g).to(spec.dtype)
    if spec.values == "special":
        which = torch.randint(0, 2 * len(SPECIAL), shape, generator=g)
        for k, value in enumerate(SPECIAL):
            x = torch.where(which == k, torch.tensor(value, dtype=spec.dtype), x)
    return x


def fenced(x: Tensor) -> Tensor:
    """The tensor in memory that ends with a page that nothing may touch behind it: what reads on is a crash."""
    if not x.numel():
        return x
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, -(-x.nbytes // page) * page + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + len(memory) - page), ctypes.c_size_t(page), 0):
        return x
    return (
        torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=len(memory) - page - x.nbytes)
        .view(x.shape)
        .copy_(x)
    )
