"""One row a dtype: its short name in the IR's text, its size, and its name in each target."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DTypeRow:
    """What the compiler knows of a dtype. `compute` is what arithmetic on it is done in."""

    dtype: torch.dtype
    name: str
    itemsize: int
    c_storage: str
    triton: str
    compute: torch.dtype
    is_float: bool = False


_ROWS = (
    DTypeRow(torch.float64, "f64", 8, "double", "tl.float64", torch.float64, True),
    DTypeRow(torch.float32, "f32", 4, "float", "tl.float32", torch.float32, True),
    DTypeRow(torch.bfloat16, "bf16", 2, "uint16_t", "tl.bfloat16", torch.float32, True),
    DTypeRow(torch.float16, "f16", 2, "_Float16", "tl.float16", torch.float32, True),
    DTypeRow(torch.float8_e4m3fn, "e4m3", 1, "uint8_t", "tl.uint8", torch.float32, True),
    DTypeRow(torch.float8_e5m2, "e5m2", 1, "uint8_t", "tl.uint8", torch.float32, True),
    DTypeRow(torch.int64, "i64", 8, "int64_t", "tl.int64", torch.int64),
    DTypeRow(torch.int32, "i32", 4, "int32_t", "tl.int32", torch.int32),
    DTypeRow(torch.int16, "i16", 2, "int16_t", "tl.int16", torch.int16),
    DTypeRow(torch.int8, "i8", 1, "int8_t", "tl.int8", torch.int8),
    DTypeRow(torch.uint8, "u8", 1, "uint8_t", "tl.uint8", torch.uint8),
    DTypeRow(torch.bool, "bool", 1, "uint8_t", "tl.int1", torch.bool),
)
TABLE = {row.dtype: row for row in _ROWS}
BY_NAME = {row.name: row.dtype for row in _ROWS}


def row(dtype: torch.dtype) -> DTypeRow:
    """The row of a dtype. Raises KeyError naming the dtypes that kernels handle."""
    try:
        return TABLE[dtype]
    except KeyError:
        raise KeyError(f"{dtype} has no kernels; known: {', '.join(BY_NAME)}") from None


def supported(dtype: torch.dtype) -> bool:
    return dtype in TABLE


def name(dtype: torch.dtype) -> str:
    return row(dtype).name


def itemsize(dtype: torch.dtype) -> int:
    """Bytes of one element, for any dtype of torch."""
    return TABLE[dtype].itemsize if dtype in TABLE else dtype.itemsize


def is_float(dtype: torch.dtype) -> bool:
    return TABLE[dtype].is_float


def is_half(dtype: torch.dtype) -> bool:
    """Whether values of a floating dtype are held in float32, rounded to the dtype."""
    return is_float(dtype) and itemsize(dtype) < 4


def rounded(value: float, dtype: torch.dtype) -> float:
    """The number of a floating dtype that is nearest to a float."""
    if dtype is torch.float64:
        return value
    if dtype is torch.float32:
        return ctypes.c_float(value).value  # a tensor takes a millisecond where fake ones are made
    return float(torch.tensor(value, dtype=dtype, device="cpu").item())


@dataclass(frozen=True)
class ByteFloat:
    """A format of 8 bits (Micikevicius et al., "FP8 Formats for Deep Learning", 2022) beside float32's.

    `cut`: the bits of the fraction that it lacks; `away`: between the exponents' zeros; `unit`: the exponent of a
    float32 whose last place is the format's least number; `over`: the bits, as float32, of the first number that is
    too large, `beyond` of what that becomes.
    """

    cut: int
    away: int
    unit: int
    over: int
    beyond: int


def _beyond(dtype: torch.dtype) -> int:
    """What torch makes of a number out of range: float8_e4m3fn's is NaN, in later releases the greatest number."""
    return int(torch.tensor(1e9, device="cpu").to(dtype).float().view(torch.int32))


BYTE_FLOATS = {
    "e4m3": ByteFloat(20, 120, 14, 0x43F00000, _beyond(torch.float8_e4m3fn)),
    "e5m2": ByteFloat(21, 112, 7, 0x47800000, _beyond(torch.float8_e5m2)),
}
