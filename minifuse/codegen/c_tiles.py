"""Loads across the rows of memory: a tile is turned once, in front of its loops, so that each line is read once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minifuse.ir import dtypes
from minifuse.ir.index import ONE, Expr
from minifuse.ir.value import LANES, Load

from .c_text import pointer
from .printer import Printer

if TYPE_CHECKING:
    from .c import CDialect


def staged(d: CDialect, p: Printer, v: Load, offset: Expr, step: Expr) -> str | None:
    """Where a load is in a copy of its tile; `step` elements are between its lanes in memory. None where the grid has
    no tile of such rows."""
    across = next((loop.axis for loop in p.loops if loop.kind == "loop" and p.start(loop.axis) is not None), None)
    begin = None if p.lane is None else p.start(p.lane)
    if across is None or begin is None or offset.coefficient(across) is not ONE:
        return None
    lane, other = p.loops[begin].axis, p.start(across)
    innermost = max(k for k, loop in enumerate(p.loops) if loop.kind == "grid")
    rest = offset - across.expr - lane.expr * step
    if other is None or any(p.last_loop(a) > innermost for a in rest.axes()):
        return None
    row, columns = p.loops[begin].step + LANES, p.loops[other].step
    here, there = d.var(p, other), d.var(p, begin)
    if v not in d.tiles:
        name = d.tiles[v] = p.fresh("t")
        param, t = p.param(v.param), dtypes.row(v.dtype)
        first = f"{pointer(p, param)} + {d.expr(rest)} + {here} + ({d.expr(step)}) * {there}"
        counts = f"e_{here} - {here}, e_{there} - {there}"
        next(s for s in p.scopes if s.loop == innermost).lines += [
            f"{t.c_storage} {name}[{columns * row}] __attribute__((aligned(64)));",
            f"mf_stage_{dtypes.name(v.dtype)}({name}, {row}, {first}, {d.expr(step)}, {counts});",
        ]
    return f"{d.tiles[v]} + ({d.axis(across)} - {here}) * {row} + ({d.axis(lane)} - {there})"
