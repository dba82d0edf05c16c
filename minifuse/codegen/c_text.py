"""Words of C that kernels are made of: register types, literals, identities, and how two values combine."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from minifuse.ir import dtypes, ops
from minifuse.ir.index import Expr
from minifuse.ir.kernel import Param
from minifuse.ir.shape import product
from minifuse.ir.value import Reduce, Scan

from .printer import Printer, floors

REGISTER = {row.dtype: torch.float32 for row in dtypes.TABLE.values() if dtypes.is_half(row.dtype)}
SCALAR = {
    "f64": "double", "f32": "float", "i64": "int64_t", "i32": "int32_t", "i16": "int16_t", "i8": "int8_t",
    "u8": "uint8_t", "bool": "int32_t",
}  # fmt: skip
MAX_LOCAL = 262_144
LAST_INDEX = "INT64_MAX"
# Bytes between what a row reads and what it asks for, and what a parameter must have to be read from memory.
AHEAD = 4096
STREAMED = 1 << 20


def register(dtype: torch.dtype) -> str:
    """The name of the dtype that a value of `dtype` is held in."""
    return dtypes.name(REGISTER.get(dtype, dtype))


def pointer(p: Printer, param: Param) -> str:
    return f"p{p.kernel.params.index(param)}"


def literal(value: object, dtype: torch.dtype) -> str:
    """A constant in C, exact."""
    if isinstance(value, bool):
        return "-1" if value else "0"
    if isinstance(value, int):
        if dtype is torch.int64:
            return "INT64_MIN" if value == -(1 << 63) else f"INT64_C({value})"
        return f"({SCALAR[register(dtype)]})({value})"
    assert isinstance(value, float)
    suffix = "" if dtype is torch.float64 else "f"
    if math.isnan(value):
        return f'__builtin_nan{suffix}("")'
    if math.isinf(value):
        return f"{'-' if value < 0 else ''}__builtin_inf{suffix}()"
    if dtype is not torch.float64:
        value = dtypes.rounded(value, dtype)
        if math.isinf(value):
            return f"{'-' if value < 0 else ''}__builtin_inff()"
    text = value.hex() + suffix
    return f"({text})" if text.startswith("-") else text


@dataclass(frozen=True)
class Local:
    """A buffer of a kernel's own: one row of `size` elements a result, with `rows` lanes of a tree."""

    names: tuple[str, ...]
    size: str
    rows: int
    dtypes: tuple[torch.dtype, ...]


@dataclass(frozen=True)
class Place:
    """Where an access is: the address but for what differs between lanes, and the element offset as what is an
    expression, what is loaded for all lanes, and what is loaded for each."""

    base: str
    offset: Expr
    uniform: str
    varying: str


def identity(kind: str, dtype: torch.dtype) -> str:
    """What the reduction of nothing gives."""
    return literal(ops.REDUCTIONS[kind].identity(dtype), dtype)


def identities(r: Reduce) -> tuple[str, ...]:
    """What an empty fold holds: the identity, and for an argument reduction an index that never wins."""
    rest = [LAST_INDEX if a.dtype is torch.int64 else literal(0.0, a.dtype) for a in r.parts[1:]]
    return (identity(r.kind, r.dtype), *rest)


def combine(r: Reduce, into: tuple[str, ...] | list[str], args: list[str], suffix: str) -> str:
    """A statement that folds `args` into `into`."""
    if r.results > 1:
        return f"mf_{r.kind}_{register(r.dtype)}{suffix}({', '.join([*(f'&{n}' for n in into), *args])});"
    return joined(ops.REDUCTIONS[r.kind].combine, r.args[0].dtype, into[0], args[0], suffix)


def joined(op: str, dtype: torch.dtype, into: str, arg: str, suffix: str) -> str:
    """A statement that joins `arg` to `into` by an operator."""
    row = ops.row(op)
    if row.c.startswith("@"):
        return f"{into} = mf_{row.c[1:]}_{register(dtype)}{suffix}({into}, {arg});"
    return f"{into} = {row.c.format(into, arg)};"


def streams(p: Printer, param: Param, offset: Expr, seen: set[Param]) -> bool:
    """Whether this first access of a parameter, contiguous over the lane, walks on through memory in long rows."""
    k = len(p.loops) - 1
    if p.loops[k].kind != "lane" or param in seen:
        return False
    seen.add(param)
    size, row = param.dtype.itemsize, p.loops[k].axis.size
    if not may_reach(product(param.shape) * size, STREAMED) or p.previous(k) not in (None, k - 1):
        return False
    # The next row begins where this one ends, or this one is long.
    follows = k == 0 or p.loops[k - 1].axis is p.lane or offset.coefficient(p.loops[k - 1].axis) == row
    return follows or may_reach(row * size, 4 * AHEAD)


def may_reach(size: Expr, least: int) -> bool:
    """Whether a size may be that large, as far as is known."""
    return not size.is_const or size.value >= least


def ahead(at: str, write: bool = False) -> str:
    """Asks for what a row needs soon: the machine's own prefetch stops at each page, and waits for a core to ask before
    it makes a line writable."""
    return f"__builtin_prefetch((const char*)({at}) + {AHEAD}, {int(write)})"


def divisions(e: Expr) -> tuple[str, str]:
    """C's own division and remainder where they round as Python's do, else helpers that do."""
    return ("MF_FLOORDIV(", "MF_MOD(") if floors(e) else ("/", "%")


# Elements above which the running result of floats that are added or multiplied is a double: of 4 million uniform
# numbers a float's was 1e-5 off, where ATen's is 6e-8.
LONG_SCAN = 1024


def wide(v: Scan) -> bool:
    """Whether the running result of a scan by lanes is a double where its elements are floats."""
    long = not v.over.size.is_const or v.over.size.value > LONG_SCAN
    return long and v.dtype is torch.float32 and v.kind in ("sum", "prod")
