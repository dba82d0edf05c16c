"""What the Triton dialect writes things with: literals, what joins, extents, and text put where it is used."""

from __future__ import annotations

import math
import re

import torch

from minifuse.ir import dtypes, ops
from minifuse.ir.index import ONE, Expr
from minifuse.ir.kernel import Kernel
from minifuse.ir.value import Const, IndexOf, Load, Reduce, Scan, Value

LIMIT = (1 << 31) - (1 << 16)
"""Extents from here on need 64 bits: lanes may run past the end of an axis by less than 2**16."""
INLINE_CHARS = 88
THREAD_WORDS, MOST_WARPS = 224, 16
"""What values may take of a thread's 255 registers, the rest being addresses; and the warps of the largest program."""


def extents_of(kernel: Kernel) -> tuple[Expr, ...]:
    """Upper bounds of what a kernel computes in integers of index width."""
    found = [a.size for a in kernel.axes]
    for param in kernel.params:
        last = ONE
        for size, stride in zip(param.shape, param.stride, strict=True):
            last = last + (size - 1) * stride
        found.append(last)
    for v in kernel.values():
        for e in () if isinstance(v, Load) else v.exprs:
            top = e.upper()
            found.append(Expr.of({(): LIMIT}) if top is None else top)
    return tuple(dict.fromkeys(found))


def register(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a value is held in: half types are float32 already rounded."""
    return torch.float32 if dtypes.is_half(dtype) else dtype


def literal(value: object, dtype: torch.dtype) -> str:
    """A constant as a Python literal, which takes the dtype of what it meets."""
    if isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, float):
        if math.isnan(value) or math.isinf(value):
            return f'float("{value}")'
        if dtypes.is_half(dtype):
            return literal(dtypes.rounded(value, dtype), torch.float32)
    return repr(value)


def fixed(v: Value) -> int | float | None:
    """The number that a value always is, or None."""
    if isinstance(v, Const):
        return v.value
    return v.expr.value if isinstance(v, IndexOf) and v.expr.is_const else None


def typed(value: object, dtype: torch.dtype) -> str:
    """A constant as a number of its own dtype."""
    return f"tl.full([], {literal(value, dtype)}, {dtypes.row(register(dtype)).triton})"


def combine(r: Reduce | Scan, into: tuple[str, ...], args: tuple[str, ...]) -> str:
    """An expression that joins what is there with more."""
    if isinstance(r, Reduce) and r.results > 1:
        return f"mf_{r.kind}({', '.join([*into, *args])})"
    text = ops.row(ops.REDUCTIONS[r.kind].combine).triton.replace("mf.", "mf_").format(into[0], args[0])
    return text[1:-1] if text.startswith("(") else text


_ASSIGN = re.compile(r"(\s*)(v\d+) = (.*)")
_AGAIN = re.compile(r"\s*(v\d+) = (v\d+)")


def inline(lines: list[str]) -> list[str]:
    """Put a value that is used once, soon and in the same block where it is used: fewer names to follow; and give what
    is another value again its name.

    Loads keep their place and their name.
    """
    again: dict[str, str] = {}
    for line in lines:
        if found := _AGAIN.fullmatch(line):
            again[found[1]] = again.get(found[2], found[2])
    named = re.compile(r"\bv\d+\b")
    lines = [named.sub(lambda m: again.get(m[0], m[0]), x) for x in lines if not _AGAIN.fullmatch(x)]
    uses: dict[str, int] = {}
    for line in lines:
        for name in re.findall(r"\bv\d+\b", line):
            uses[name] = uses.get(name, 0) + 1
    for k, line in enumerate(lines):
        found = _ASSIGN.fullmatch(line)
        if found is None or uses[found[2]] != 2 or "tl.load" in found[3] or "mf_sum(" in found[3]:
            continue
        indent, name, text = found.groups()
        word = re.compile(rf"\b{name}\b")
        for j in range(k + 1, len(lines)):
            depth = len(lines[j]) - len(lines[j].lstrip())
            if depth < len(indent):
                break
            if word.search(lines[j]):
                longer = len(lines[j].lstrip()) + len(text) > INLINE_CHARS
                if depth == len(indent) and not longer and not lines[j].lstrip().startswith("for "):
                    lines[j] = word.sub(lambda _, text=text: text, lines[j])  # type: ignore[misc]
                    lines[k] = ""
                break
    return [re.sub(r"= \((.*)\)$", _unwrap, line) for line in lines if line]


def _unwrap(found: re.Match[str]) -> str:
    """`= (a + b)` without its parentheses, where they are one pair."""
    depth = 0
    for c in found[1]:
        depth += (c == "(") - (c == ")")
        if depth < 0:
            return found[0]
    return f"= {found[1]}"


def warps(elements: int, words: int, rows: bool, vector: int) -> int:
    """Warps of a program: so that a thread has what it asks for at once, up to 32 elements, so that a row fits
    registers; where a row is reduced 32 at once, for the fewer warps, the less they wait for each other. More where so
    many words that are alive at once would not fit."""
    few = min(max(elements // (32 * (32 if rows else vector)), 1), 4)
    count = few if elements <= 4096 else 8 if elements <= 8192 else 16
    while count < MOST_WARPS and words > count * 32 * THREAD_WORDS:
        count *= 2
    return count
