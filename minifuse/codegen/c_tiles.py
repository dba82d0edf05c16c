"""Accesses across the rows of memory: a tile is turned as a whole, in front of its loops where it is loaded and behind
them where it is stored, so that each line of memory is touched once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from minifuse.ir import dtypes
from minifuse.ir.index import ONE, Axis, Expr
from minifuse.ir.kernel import Param, Store
from minifuse.ir.value import LANES, Load

from .c_text import pointer
from .printer import Printer

if TYPE_CHECKING:
    from .c import CDialect


@dataclass(frozen=True)
class _Tile:
    """A tile whose columns lie in memory one behind the other, and whose rows, `step` apart, are the lanes.

    `across` and `lane` are its axes, `here` and `there` where it begins along them, `row` the elements that its copy
    has room for along the lane, `memory` its first element.
    """

    across: Axis
    lane: Axis
    here: str
    there: str
    row: int
    columns: int
    memory: str
    scope: int

    def place(self, d: CDialect, name: str) -> str:
        """Where the current vector is in the copy."""
        return f"{name} + ({d.axis(self.across)} - {self.here}) * {self.row} + ({d.axis(self.lane)} - {self.there})"

    def declare(self, p: Printer, storage: str, name: str) -> None:
        scope = next(s for s in p.scopes if s.loop == self.scope)
        scope.lines.append(f"{storage} {name}[{self.columns * self.row}] __attribute__((aligned(64)));")


def _tile(d: CDialect, p: Printer, param: Param, offset: Expr, step: Expr) -> _Tile | None:
    """The tile of the grid that an access walks through; None where the grid has none of such rows."""
    across = next((loop.axis for loop in p.loops if loop.kind == "loop" and p.start(loop.axis) is not None), None)
    begin = None if p.lane is None else p.start(p.lane)
    if across is None or begin is None or offset.coefficient(across) is not ONE:
        return None
    if across.size.is_const and across.size.value < LANES:
        return None  # its lines are read again while they are at hand
    lane, other = p.loops[begin].axis, p.start(across)
    innermost = max(k for k, loop in enumerate(p.loops) if loop.kind == "grid")
    rest = offset - across.expr - lane.expr * step
    if other is None or any(p.last_loop(a) > innermost for a in rest.axes()):
        return None
    here, there = d.var(p, other), d.var(p, begin)
    memory = f"{pointer(p, param)} + {d.expr(rest)} + {here} + ({d.expr(step)}) * {there}"
    return _Tile(across, lane, here, there, p.loops[begin].step + LANES, p.loops[other].step, memory, innermost)


def staged(d: CDialect, p: Printer, v: Load, offset: Expr, step: Expr) -> str | None:
    """Where a load is in a copy of its tile; `step` elements are between its lanes in memory. None of what a mask
    guards: nothing may be there."""
    param = p.param(v.param)
    tile = _tile(d, p, param, offset, step) if v.mask is None else None
    if tile is None:
        return None
    if v not in d.tiles:
        name, t = d.tiles.setdefault(v, p.fresh("t")), dtypes.row(v.dtype)
        tile.declare(p, t.c_storage, name)
        next(s for s in p.scopes if s.loop == tile.scope).lines.append(
            f"mf_stage_{dtypes.name(v.dtype)}({name}, {tile.row}, {tile.memory}, {d.expr(step)}, "
            f"e_{tile.here} - {tile.here}, e_{tile.there} - {tile.there});"
        )
    return tile.place(d, d.tiles[v])


def gathered(d: CDialect, p: Printer, root: Store, offset: Expr, step: Expr) -> str | None:
    """Where a store puts its vector in a copy of its tile, which goes to memory behind the tile's loops."""
    param = p.param(root.param)
    if root.mask is not None or root.param in p.kernel.reads or sum(s.param == root.param for s in p.kernel.stores) > 1:
        return None
    tile = _tile(d, p, param, offset, step)
    if tile is None:
        return None
    name = p.fresh("t")
    tile.declare(p, dtypes.row(param.dtype).c_storage, name)
    d.behind.append(
        f"mf_stage_{dtypes.name(param.dtype)}({tile.memory}, {d.expr(step)}, {name}, {tile.row}, "
        f"e_{tile.there} - {tile.there}, e_{tile.here} - {tile.here});"
    )
    return tile.place(d, name)


# -- the helpers --------------------------------------------------------------------------------------
TILES = {
    "stage": """
/* A tile of rows that lie `step` apart, as columns `ld` apart: each line of memory is read once, whole. */
MF_ONCE void mf_stage_$T($S* t, int64_t ld, const $S* p, int64_t step, int64_t columns, int64_t rows) {
  int64_t r = 0;
#if defined(__AVX512BW__)
  for (; (sizeof *p == 2 || sizeof *p == 4) && r + 16 <= rows; r += 16) {
    int64_t c = 0;
    for (; c + 16 <= columns; c += 16) mf_turn_$T(t + c * ld + r, ld, p + r * step + c, step);
    for (; c < columns; ++c) for (int k = 0; k < 16; ++k) t[c * ld + r + k] = p[(r + k) * step + c];
  }
#endif
  for (; r < rows; ++r) for (int64_t c = 0; c < columns; ++c) t[c * ld + r] = p[r * step + c];
}""",
    "turn": """
/* 16 rows of 16, turned: four times each of the first eight rows takes turns with the one that lies eight below. */
MF void mf_turn_$T($S* t, int64_t ld, const $S* p, int64_t step) {
  typedef $Q row __attribute__((vector_size(16 * sizeof($S)), aligned(sizeof($S)), may_alias));
  row a[16], b[16];
#define MF_TURNS(n) _Pragma("GCC unroll 16") for (int k = 0; k < n; ++k)
#define MF_TURN(to, from) MF_TURNS(8) { \\
  to[2 * k] = __builtin_shufflevector(from[k], from[k + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23); \\
  to[2 * k + 1] = \\
    __builtin_shufflevector(from[k], from[k + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31); }
  MF_TURNS(16) a[k] = *(const row*)(p + k * step);
  MF_TURN(b, a) MF_TURN(a, b) MF_TURN(b, a) MF_TURN(a, b)
  MF_TURNS(16) *(row*)(t + k * ld) = a[k];
}""",
}
