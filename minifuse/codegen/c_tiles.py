"""Accesses across the rows of memory: a tile is turned as a whole, in front of its loops where it is loaded and behind
them where it is stored, so that each line of memory is touched once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from minifuse.ir import dtypes
from minifuse.ir.index import ONE, Axis, Expr
from minifuse.ir.kernel import Param, Store
from minifuse.ir.value import LANES, Load, Value
from minifuse.passes.schedule import TILE_BYTES

from .c_text import pointer
from .printer import Printer

if TYPE_CHECKING:
    from .c import CDialect


@dataclass(frozen=True)
class _Range:
    """Where a part of an axis begins and how many elements it has, as C; at most `most`."""

    start: str
    count: str
    most: int


@dataclass(frozen=True)
class _Tile:
    """A tile whose columns lie in memory one behind the other, and whose rows, `step` apart, are the lanes.

    `across` and `lane` are its axes, `columns` and `rows` what it has of them, `row` the elements from one column of
    its copy to the next, `memory` its first element, `scope` the loop that it belongs to.
    """

    across: Axis
    lane: Axis
    columns: _Range
    rows: _Range
    row: int
    memory: str
    scope: int

    def place(self, d: CDialect, name: str) -> str:
        """Where the current vector is in the copy."""
        column, row = f"{d.axis(self.across)} - {self.columns.start}", f"{d.axis(self.lane)} - {self.rows.start}"
        return f"{name} + ({column}) * {self.row} + ({row})"

    def declare(self, p: Printer, storage: str, name: str) -> None:
        p.scope_of([self.scope]).lines.append(
            f"{storage} {name}[{self.columns.most * self.row}] __attribute__((aligned(64)));"
        )


def _tile(d: CDialect, p: Printer, param: Param, offset: Expr, step: Expr) -> _Tile | None:
    """The tile that an access walks through below the grid; None where there is none of such rows, or a large one."""
    lane = p.lane
    across = next((a for a in offset.axes() if a is not lane and offset.coefficient(a) is ONE), None)
    grid = [k for k, loop in enumerate(p.loops) if loop.kind == "grid"]
    if lane is None or across is None or not grid or across.size.is_const and across.size.value < LANES:
        return None  # of few columns the lines are read again while they are at hand
    rest = offset - across.expr - lane.expr * step
    if step.axes() or any(p.last_loop(a) > grid[-1] for a in rest.axes()):
        return None
    columns, rows = _range(d, p, across), _range(d, p, lane)
    if columns is None or rows is None:
        return None
    row = -(-rows.most // LANES) * LANES + LANES  # rows a power of two apart would meet in one set of the cache
    if columns.most * row * param.dtype.itemsize > TILE_BYTES:
        return None
    memory = f"{pointer(p, param)} + {d.expr(rest)} + {columns.start} + ({d.expr(step)}) * {rows.start}"
    return _Tile(across, lane, columns, rows, row, memory, grid[-1])


def _range(d: CDialect, p: Printer, axis: Axis) -> _Range | None:
    """What of an axis there is below the grid: a tile of it, or all of a short one."""
    k = p.start(axis)
    if k is not None:
        return _Range(d.var(p, k), f"e_{d.var(p, k)} - {d.var(p, k)}", p.loops[k].step)
    if not axis.size.is_const or any(loop.axis is axis and loop.kind == "grid" for loop in p.loops):
        return None
    return _Range("0", str(axis.size), axis.size.value)


def staged(d: CDialect, p: Printer, v: Load, offset: Expr, step: Expr) -> str | None:
    """Where a load is in a copy of its tile; `step` elements are between its lanes in memory. None of what a mask
    guards, where nothing may be, and of what is looked up."""
    param = p.param(v.param)
    plain = v.mask is None and not any(isinstance(i, Value) for i in v.index)
    tile = _tile(d, p, param, offset, step) if plain else None
    if tile is None:
        return None
    if v not in d.tiles:
        name, t = d.tiles.setdefault(v, p.fresh("t")), dtypes.row(v.dtype)
        tile.declare(p, t.c_storage, name)
        p.scope_of([tile.scope]).lines.append(
            f"mf_stage_{dtypes.name(v.dtype)}({name}, {tile.row}, {tile.memory}, {d.expr(step)}, "
            f"{tile.columns.count}, {tile.rows.count});"
        )
    return tile.place(d, d.tiles[v])


def gathered(d: CDialect, p: Printer, root: Store, offset: Expr, step: Expr) -> str | None:
    """Where a store puts its vector in a copy of its tile, which goes to memory behind the tile's loops."""
    param = p.param(root.param)
    again = any(v.param == root.param and v not in d.tiles for v in p.kernel.loads)
    looked_up = any(isinstance(i, Value) for i in root.index)
    if root.mask is not None or looked_up or again or sum(s.param == root.param for s in p.kernel.stores) > 1:
        return None
    tile = _tile(d, p, param, offset, step)
    if tile is None:
        return None
    name = p.fresh("t")
    tile.declare(p, dtypes.row(param.dtype).c_storage, name)
    d.behind.append(
        f"mf_stage_{dtypes.name(param.dtype)}({tile.memory}, {d.expr(step)}, {name}, {tile.row}, "
        f"{tile.rows.count}, {tile.columns.count});"
    )
    return tile.place(d, name)


# -- the helpers --------------------------------------------------------------------------------------
TILES = {
    "stage": """
/* A tile of rows that lie `step` apart, as columns `ld` apart: each line of memory is read once, whole. Of rows on
   pages of their own no processor sees the next one coming: they are asked for 32 rows ahead. */
MF_ONCE void mf_stage_$T($S* t, int64_t ld, const $S* p, int64_t step, int64_t columns, int64_t rows) {
  int64_t r = 0;
#if defined(__AVX512BW__)
  for (; (sizeof *p == 2 || sizeof *p == 4) && r + 16 <= rows; r += 16) {
    int64_t c = 0;
    for (; c + 16 <= columns; c += 16) {
      if (step * (int64_t)sizeof *p >= 4096)
        for (int k = 32; k < 48; ++k) __builtin_prefetch(p + (r + k) * step + c, 0, 2);
      mf_turn_$T(t + c * ld + r, ld, p + r * step + c, step);
    }
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
