"""Arithmetic on shapes and strides, and expressions read back from text."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache

from .index import ONE, ZERO, Atom, Expr, IntLike, Monomial, as_expr, divmod_expr


def product(sizes: Iterable[IntLike]) -> Expr:
    total = ONE
    for s in sizes:
        total = total * s
    return total


def contiguous_strides(shape: Iterable[IntLike]) -> tuple[Expr, ...]:
    """Row-major strides in elements; a size of zero counts as one, as torch does."""
    out: list[Expr] = []
    step = ONE
    for s in reversed([as_expr(s) for s in shape]):
        out.append(step)
        step = step * (ONE if s is ZERO else s)
    return tuple(reversed(out))


def linearize(index: Iterable[IntLike], strides: Iterable[IntLike]) -> Expr:
    return _linearize(tuple(index), tuple(strides))


@lru_cache(4096)
def _linearize(index: tuple[IntLike, ...], strides: tuple[IntLike, ...]) -> Expr:
    terms: dict[Monomial, int] = {}
    for i, s in zip(index, strides, strict=True):
        for mono, coef in (as_expr(i) * s).terms:
            terms[mono] = terms.get(mono, 0) + coef
    return Expr.of(terms)


def delinearize(offset: Expr, shape: Iterable[IntLike]) -> tuple[Expr, ...]:
    """Row-major coordinates of a linear index; the first needs no remainder."""
    sizes = [as_expr(s) for s in shape]
    out: list[Expr] = []
    for size in reversed(sizes[1:]):
        if size is ZERO:
            out.append(ZERO)
            continue
        offset, coordinate = divmod_expr(offset, size)
        out.append(coordinate)
    if sizes:
        out.append(offset)
    return tuple(reversed(out))


def is_injective(shape: Iterable[int], stride: Iterable[int]) -> bool:
    """Whether every element has its own memory, gaps allowed: a stride steps over all that the smaller ones reach."""
    reach = 1
    for step, size in sorted(zip(stride, shape, strict=True)):
        if size > 1 and step < reach:
            return False
        reach += max(size - 1, 0) * step
    return True


def is_overlapping(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether elements share memory other than by being expanded."""
    expanded = any(step == 0 and size > 1 for size, step in zip(shape, stride, strict=True))
    return not expanded and not is_injective(shape, stride)


def cdiv(a: IntLike, b: IntLike) -> Expr:
    """`a / b` rounded up."""
    return (as_expr(a) + as_expr(b) - 1) // b


_OPERATORS: dict[type[ast.operator], Callable[[Expr, Expr], Expr]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}  # fmt: skip


def parse(text: str, names: Mapping[str, Atom]) -> Expr:
    """Read what `repr` prints. Raises ValueError on an unknown name or another operator."""

    def walk(node: ast.expr) -> Expr:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return as_expr(node.value)
        if isinstance(node, ast.Name):
            if node.id not in names:
                raise ValueError(f"unknown name {node.id!r} in {text!r}; known: {sorted(names)}")
            return names[node.id].expr
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -walk(node.operand)
        if isinstance(node, ast.BinOp):
            left, right = walk(node.left), walk(node.right)
            if type(node.op) in _OPERATORS:
                return _OPERATORS[type(node.op)](left, right)
        raise ValueError(f"expected integers, names and + - * // %, found {text!r}")

    return walk(ast.parse(text, mode="eval").body)
