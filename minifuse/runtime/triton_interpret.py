"""What Triton's interpreter lacks, rounds otherwise or does element by element, with torch in its place.

The interpreter runs generated modules on CPU tensors. It has no libdevice, rounds halves of bfloat16 up
instead of to even, and calls a reduction's function once an element. `install` puts these into a loaded
module; every other helper runs as it is written.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch

from minifuse import compat_triton

_LIBDEVICE: dict[str, Callable[..., torch.Tensor]] = {
    name: getattr(torch, name)
    for name in (
        "exp exp2 expm1 log log2 log10 log1p sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh erf erfc "
        "pow atan2 hypot fmod trunc copysign"
    ).split()
}
_LIBDEVICE["rint"] = torch.round


def install(module: ModuleType) -> None:
    """Give a loaded module of kernels what the interpreter lacks."""
    if isinstance(module.libdevice, Libdevice):
        return
    compat_triton.mend_triton_interpreter()
    module.libdevice = Libdevice()  # type: ignore[attr-defined]
    for name, function in STAND_INS.items():
        if hasattr(module, name):
            setattr(module, name, function)


class Libdevice:
    """libdevice's functions over the interpreter's tensors."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = _LIBDEVICE[name]

        def call(*args: Any) -> Any:
            like = next(a for a in args if compat_triton.is_triton_tensor(a))
            kind = _torch(like).dtype
            taken = [_torch(a) if compat_triton.is_triton_tensor(a) else torch.tensor(a, dtype=kind) for a in args]
            return _like(like, function(*torch.broadcast_tensors(*taken)))

        return call


def _torch(x: Any) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(compat_triton.triton_array(x))).reshape([int(n) for n in x.shape])


def _like(x: Any, found: torch.Tensor) -> Any:
    return compat_triton.triton_tensor(found.numpy(), x.dtype)


def _left(x: Any, found: torch.Tensor, before: int, after: int) -> Any:
    """What a row's reduction gives: a number, or the `before * after` of them."""
    return _like(x, found.reshape(()) if before * after == 1 else found.reshape(before * after))


def _rounded(dtype: torch.dtype) -> Callable[[Any], Any]:
    return lambda x: _like(x, _torch(x).to(dtype).to(torch.float32))


def _row(reduce: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    def call(x: Any, before: int, n: int, after: int) -> Any:
        found = reduce(_torch(x).reshape(before, n, after), 1)
        return _left(x, found, before, after)

    return call


def _pairs(pick: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    def call(x: Any, i: Any, before: int, n: int, after: int) -> Any:
        values, index = (_torch(v).reshape(before, n, after) for v in (x, i))
        at = pick(values, 1, keepdim=True)
        first = values.gather(1, at)
        same = (values == first) | (values.isnan() & first.isnan())
        least = torch.where(same, index, torch.iinfo(index.dtype).max).amin(1)
        return _left(x, first, before, after), _left(i, least, before, after)

    return call


STAND_INS: dict[str, Callable[..., Any]] = {
    "mf_bf16": _rounded(torch.bfloat16),
    "mf_f16": _rounded(torch.float16),
    "mf_max": _row(torch.amax),
    "mf_min": _row(torch.amin),
    "mf_any": _row(torch.any),
    "mf_all": _row(torch.all),
    "mf_rowargmax": _pairs(torch.argmax),
    "mf_rowargmin": _pairs(torch.argmin),
}
