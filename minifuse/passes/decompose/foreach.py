"""Operators over lists of tensors (`torch._foreach_*`) as their elementwise parts.

Each list operator becomes one operator a tensor; fusion then sees an optimiser's step as one chain a parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def _bound(smaller: bool) -> Callable[..., Tensor]:
    def fn(x: Tensor, other: Any) -> Tensor:
        if isinstance(other, Tensor):
            return torch.minimum(x, other) if smaller else torch.maximum(x, other)
        return torch.clamp_max(x, other) if smaller else torch.clamp_min(x, other)

    return fn


def _with_value(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda a, b, c, value=1: fn(a, b, c, value=value)


# What an element of a list goes through, where that is not the function of the same name in torch.
_PARTS: dict[str, Callable[..., Any]] = {
    "addcmul": _with_value(torch.addcmul),
    "addcdiv": _with_value(torch.addcdiv),
    "maximum": _bound(smaller=False),
    "clamp_min": _bound(smaller=False),
    "minimum": _bound(smaller=True),
    "clamp_max": _bound(smaller=True),
    "norm": lambda x, ord=2, dtype=None: torch.linalg.vector_norm(x, ord, dtype=dtype),
    "max": lambda x: x.max(),
    "zero": torch.zeros_like,
    "copy": lambda x, source, non_blocking=False: source.to(x.dtype).expand(x.shape).clone(),
}
_NAMES = (
    "abs acos add addcdiv addcmul asin atan ceil clamp_max clamp_min clone copy cos cosh div erf erfc exp expm1 floor"
    " frac lerp lgamma log log10 log1p log2 max maximum minimum mul neg norm pow reciprocal round rsqrt sigmoid sign"
    " sin sinh sqrt sub tan tanh trunc zero"
).split()


def _each(fn: Callable[..., Any]) -> Callable[..., list[Any]]:
    """`fn` over lists: a list among the arguments gives each call its element, anything else goes to all."""

    def over(*args: Any, **kwargs: Any) -> list[Any]:
        count = next(len(a) for a in args if isinstance(a, (list, tuple)))

        def pick(a: Any, k: int) -> Any:
            return a[k] if isinstance(a, (list, tuple)) else a

        return [fn(*(pick(a, k) for a in args), **{n: pick(a, k) for n, a in kwargs.items()}) for k in range(count)]

    return over


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Overload -> its parts, for the list operators without side effects."""
    table: dict[Any, Callable[..., Any]] = {}
    for name in _NAMES:
        packet = getattr(aten, f"_foreach_{name}", None)  # not every release has all of them
        for overload in () if packet is None else packet.overloads():
            op = getattr(packet, overload)
            # A tensor of scalars would have to be read on the host.
            plain = not any(str(a.type) == "Tensor" and a.name == "scalars" for a in op._schema.arguments)
            if plain and not op._schema.is_mutable and not overload.endswith("out"):
                table[op] = _each(_PARTS.get(name) or getattr(torch, name))
    return table
