"""Schedules: which loops a kernel runs, in which order, what is parallel and what is the vector lane.

First a kernel's axes are normalised: neighbouring axes that every access walks as one become one,
and an axis that accesses cut by a division is cut. Then the lane is chosen by unit strides, weighed
by bytes, and the rest are ordered. None of this can change a bit: a reduction's tree belongs to its
meaning (`ir.kernel.Reduce`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from minifuse.ir import dtypes, ops
from minifuse.ir.index import ONE, ZERO, Axis, Expr, FloorDiv, Mod, as_expr
from minifuse.ir.kernel import Check, Kernel, Loop, Param, Schedule, Store, rewrite
from minifuse.ir.plan import Buffer, Launch, Plan, Step
from minifuse.ir.shape import product
from minifuse.ir.value import COLUMN_CHUNK, LANES, Cast, Load, Op, Random, Reduce, Scan, Value, topological
from minifuse.passes.context import CompileContext
from minifuse.passes.split import Tree, closed, divide, halves, splits

LANE_TILE = 4096
COLUMN_TILE = 256
# Bytes of a tile's running results: half of the nearest cache.
COLUMN_BYTES = 16_384
# Columns of a tile that is turned: 16 fill a line of memory, 64 leave its page for fewer others.
TRANSPOSE_TILES = (64, 16)
# The longest row that is turned whole, and the bytes of a turned copy: it shares a core's second cache.
TURNED_ROW = 1024
TILE_BYTES = 98_304
MIN_PARALLEL = 16
SPLIT_WORK = 65_536
# Elements of a column sum that are read faster row by row: a tile of columns asks for a piece of every page.
SPLIT_COLUMNS = 1 << 19
LEAST_ROWS = 4 * COLUMN_CHUNK
"""How many rows make enough chunks to be a grid: what sums their columns may then walk them row by row."""
HOLD_BYTES = 131_072
HOLD_COST = 8.0

Hint = Callable[[Expr], int]


Pieces = Callable[[Kernel, str, Hint, dict[str, Buffer]], list[Kernel]]


def schedule(plan: Plan, ctx: CompileContext) -> Plan:
    """Give each launch a schedule; a reduction that is better run by chunks is split in two launches."""
    return scheduled(plan, ctx, split_reduction, choose)


def scheduled(plan: Plan, ctx: CompileContext, pieces: Pieces, loops: Callable[[Kernel, Hint], Schedule]) -> Plan:
    """The launches that each kernel becomes, by `pieces`, with the loops that a target chooses for them."""
    steps: list[Step] = []
    buffers = dict(plan.buffers)
    for step in plan.steps:
        if not isinstance(step, Launch):
            steps.append(step)
            continue
        for first, part in apart(step.kernel, step.name):
            made = pieces(collapse(split_axes(part)), first, plan.hint, buffers)
            for k, kernel in enumerate(made):
                final = canonical(kernel)
                name = first if k == 0 else f"{first}_join" if len(made) == 2 else f"{first}_{k}"
                steps.append(Launch(final, tuple(p.name for p in kernel.params), loops(final, plan.hint), name))
            if len(made) > 1:
                ctx.record("split", first, taken=True, reason="{launches} launches along the trees of its reductions",
                           launches=len(made), where=plan.origins.get(step.name, ""))  # fmt: skip
    return replace(plan, steps=tuple(steps), buffers=buffers)


def apart(kernel: Kernel, name: str) -> list[tuple[str, Kernel]]:
    """A kernel with its name, or two where it scatters: what is there first, parallel over all of it, and the rest."""
    late = [r for r in kernel.body if isinstance(r, Check) or r.mode]
    first = [r for r in kernel.body if r not in late]
    if not first or len(late) == sum(isinstance(r, Check) for r in late):
        return [(name, kernel)]
    return [(n, closed(replace(kernel, body=tuple(b)))) for n, b in ((f"{name}_base", first), (name, late))]


# -- normalising axes -------------------------------------------------------------------------------
def index_exprs(kernel: Kernel) -> Iterable[Expr]:
    """Every expression over axes: element offsets of loads and stores, indices as values, counters."""
    params = {p.name: p for p in kernel.params}
    for v in kernel.values():
        if isinstance(v, Load):
            yield params[v.param].offset(v.index)
        else:
            yield from v.exprs
    for s in kernel.stores:
        yield params[s.param].offset(s.index)


def split_axes(kernel: Kernel) -> Kernel:
    """Cut an axis that offsets divide by a constant: `j // 64` and `j % 64` become two axes."""
    for _ in range(8):
        cuts = (cut for e in index_exprs(kernel) for cut in divisions(e))
        cut = next(((a, width) for a, width in cuts if width.is_const and a not in kernel.ordered), None)
        if cut is None:
            return kernel
        axis, width = cut
        high, low = digits(axis, width)
        names = {a.name for a in kernel.axes}
        if high.name in names or low.name in names:
            return kernel
        env = {axis: high.expr * width + low.expr}
        axes = tuple(x for a in kernel.axes for x in ((high, low) if a is axis else (a,)))
        kernel = replace(kernel, axes=axes, body=rewrite(kernel.body, env))
    return kernel


def digits(axis: Axis, width: Expr) -> tuple[Axis, Axis]:
    """The two axes that one is, the last of them of this width."""
    return Axis(f"{axis.name}h", axis.size // width), Axis(f"{axis.name}l", width)


def divisions(e: Expr) -> Iterable[tuple[Axis, Expr]]:
    """The axes that an expression divides, each by a size that divides its own."""
    for mono, _ in e.terms:
        for a in mono:
            if isinstance(a, (FloorDiv, Mod)):
                axis = a.num.atom
                if isinstance(axis, Axis) and not a.den.axes() and (axis.size % a.den) is ZERO:
                    yield axis, a.den
                yield from divisions(a.num)


def collapse(kernel: Kernel) -> Kernel:
    """Join two axes that every access walks as one long axis."""
    spaces = kernel.spaces
    joined = True
    while joined:
        joined = False
        exprs = list(dict.fromkeys(index_exprs(kernel)))
        for outer in kernel.axes:
            for inner in kernel.axes:
                if outer is inner or outer in kernel.ordered or inner in kernel.ordered:
                    continue
                if any((outer in s) != (inner in s) for s in spaces) or not _joins(exprs, outer, inner):
                    continue
                axis = Axis(outer.name + inner.name.lstrip("i"), outer.size * inner.size)
                if any(a.name == axis.name for a in kernel.axes):
                    continue
                env = {outer: axis.expr // inner.size, inner: axis.expr % inner.size}
                axes = tuple(axis if a is outer else a for a in kernel.axes if a is not inner)
                kernel = replace(kernel, axes=axes, body=rewrite(kernel.body, env))
                spaces = kernel.spaces
                joined = True
                break
            if joined:
                break
    return kernel


def _joins(exprs: Iterable[Expr], outer: Axis, inner: Axis) -> bool:
    for e in exprs:
        if outer not in e.atoms() and inner not in e.atoms():
            continue
        a, b = e.coefficient(outer), e.coefficient(inner)
        if a is None or b is None or b is ZERO or a is not b * inner.size:
            return False
        if a.axes() or b.axes():
            return False
    return True


def canonical(kernel: Kernel) -> Kernel:
    """The same kernel with axes i0, i1… and parameters p0, p1…, so that equal kernels are one kernel."""
    env = {a: Axis(f"i{k}", a.size) for k, a in enumerate(kernel.axes)}
    names = {p.name: f"p{k}" for k, p in enumerate(kernel.params)}

    def renamed(v: Value) -> Value | None:
        return v.rename(names[v.param]) if isinstance(v, Load) else None

    # two steps: a new name may be an old one of another axis
    apart = {a: Axis(f"_{k}", a.size) for k, a in enumerate(kernel.axes)}
    body = rewrite(kernel.body, {a: x.expr for a, x in apart.items()})
    body = rewrite(body, {x: env[a].expr for a, x in apart.items()}, renamed)
    body = tuple(replace(r, param=names[r.param]) if isinstance(r, Store) else r for r in body)
    params = tuple(replace(p, name=names[p.name]) for p in kernel.params)
    return Kernel(tuple(env.values()), params, body, kernel.origins)


# -- splitting reductions ---------------------------------------------------------------------------
def split_reduction(kernel: Kernel, name: str, hint: Hint, buffers: dict[str, Buffer]) -> list[Kernel]:
    """Two kernels where a reduction is better run by chunks: one over these, one that joins their results."""
    found = splittable(kernel, hint)
    if not found:
        return [kernel]
    made = halves(kernel, found, Tree(found[0].chunk, 1), name, buffers)
    return [made.first, closed(Kernel((made.part, *kernel.axes), made.params, made.rest, kernel.origins))]


def splittable(kernel: Kernel, hint: Hint) -> list[Reduce]:
    """The reductions, all over one axis, that are run by chunks: those with too few independent rows, and column sums
    beside what walks the same data row by row."""
    reductions = [] if any(kernel.scans) or kernel.joins else list(kernel.reductions)
    for over in dict.fromkeys(r.over for r in reductions):
        found = [r for r in reductions if r.over is over]
        first = found[0]
        if any(not splits(r) or r.lanes != first.lanes for r in found) or hint(over.size) <= first.chunk:
            continue
        if any(v in found for r in reductions for v in topological(r.args)):
            continue
        beside, later = divide(kernel, found)
        rest = reductions != found or bool(beside)
        if any(over in r.space for r in later):
            continue
        if any(over not in r.axes for r in reductions if r not in found):
            continue
        column = first.lanes == 1
        others = hint(product(a.size for a in kernel.axes if a is not over))
        if (rest or others * hint(over.size) >= SPLIT_COLUMNS) and column and hint(over.size) >= LEAST_ROWS:
            return found
        if not rest and others < MIN_PARALLEL and others * hint(over.size) >= SPLIT_WORK:
            return found
    return []


# -- choosing loops ---------------------------------------------------------------------------------
def choose(kernel: Kernel, hint: Hint) -> Schedule:
    """The loops of a kernel, from its strides and extents."""
    reductions = list(kernel.reductions)
    reduced = {r.over: r for r in reductions}
    weight, stride = unit_weights(kernel, hint), main_strides(kernel, hint)
    grid = sorted(common(kernel), key=lambda a: (-stride.get(a, 0), a.name))
    lane = lane_axis(kernel, reduced, weight, hint)
    # What is scanned as a column runs inside of the lanes, each with a running result of its own.
    inside = [a for a in kernel.axes if any(s.over is a and s.lanes == 1 for s in kernel.scans)]
    rest = [a for a in kernel.axes if a not in grid and a is not lane and a not in inside]
    rest.sort(key=lambda a: (-depth(a, reductions), -stride.get(a, 0), a.name))
    whole = lane is not None and lane not in grid and lane.size.is_const and lane.size.value <= TURNED_ROW
    across = transposed_axis(grid, lane, weight) if whole or not reduced else None
    lane_tile = 1
    if lane in grid:
        assert lane is not None
        inner_work = any(a not in grid for a in kernel.axes)
        wide = COLUMN_TILE if across is not None else LANE_TILE
        if inner_work and across is None:
            results = sum(r.results * max(r.dtype.itemsize, 4) for r in reductions)
            wide = max(COLUMN_TILE, 1 << (COLUMN_BYTES // max(results, 4)).bit_length() - 1)
        if hint(lane.size) > wide or inner_work or across is not None or not lane.size.is_const:
            lane_tile = wide
            others = hint(product(a.size for a in grid if a is not lane))
            while inner_work and lane_tile > 64 and others * (hint(lane.size) // lane_tile) < MIN_PARALLEL:
                lane_tile //= 2
            columns = [a for a in reduced if a.size.is_const and weight.get(a, 0) * 8 > weight.get(lane, 0)]
            if columns:  # they are turned, as much of the lane as there is room for
                lane_tile = min(lane_tile, turned_tile(max(a.size.value for a in columns), kernel))
    loops = [Loop(a, "grid") for a in grid if a is not lane]
    if across is not None and lane is not None:
        points = hint(product(a.size for a in grid if a is not lane)) * -(-hint(lane.size) // lane_tile)
        tile = next((t for t in TRANSPOSE_TILES if points >= t * MIN_PARALLEL), TRANSPOSE_TILES[-1])
        if reduced:
            tile = min(tile, turned_tile(lane.size.value, kernel))
        loops = [replace(loop, step=tile) if loop.axis is across else loop for loop in loops]
    if lane in grid and lane is not None and lane_tile > 1:
        loops.append(Loop(lane, "grid", lane_tile))
    if across is not None:
        loops.append(Loop(across, "loop"))
    for a in [*rest, *([lane] if lane is not None else []), *inside]:
        loops += [Loop(a, "loop", step) for step in chunk_steps(reduced.get(a))]
        loops.append(Loop(a, "lane" if a is lane else "loop"))
    return Schedule(tuple(loops))


def common(kernel: Kernel) -> list[Axis]:
    """The axes that every root and reduction runs over and none reduces or scans: those that can be a grid."""
    spaces = kernel.spaces
    shared = frozenset.intersection(*spaces) if spaces else frozenset()
    return [a for a in kernel.axes if a in shared and a not in kernel.ordered]


def chunk_steps(r: Reduce | None) -> list[int]:
    """Tile sizes, outermost first, of the loops that a reduction's chunks need."""
    if r is None:
        return []
    return tile_sizes(r.chunk, COLUMN_CHUNK, r.over.size.value if r.over.size.is_const else 1 << 31)


def tile_sizes(step: int, factor: int, limit: int) -> list[int]:
    """Steps below a limit, outermost first, each so many times the one inside."""
    steps = []
    while step < limit:
        steps.append(step)
        step *= factor
    return steps[::-1]


def depth(axis: Axis, reductions: Iterable[Reduce]) -> int:
    """1 for an axis that is reduced after others were, which is then an outer loop."""
    mine = (r for r in reductions if r.over is axis)
    return int(any(isinstance(v, Reduce) for r in mine for v in topological(r.args)))


def _accesses(kernel: Kernel) -> Iterable[tuple[Param, Expr, int]]:
    params = {p.name: p for p in kernel.params}
    for access in kernel.accesses:
        param = params[access.param]
        yield param, param.offset(access.index), 1 if isinstance(access, Load) else 2


def unit_weights(kernel: Kernel, hint: Hint) -> dict[Axis, int]:
    """Bytes of the accesses that walk memory with unit stride along each axis; stores count twice."""
    weight: dict[Axis, int] = {}
    for param, offset, factor in _accesses(kernel):
        size = hint(product(a.size for a in offset.axes())) * dtypes.itemsize(param.dtype) * factor
        for a in offset.axes():
            if offset.coefficient(a) is ONE:
                weight[a] = weight.get(a, 0) + size
    return weight


def main_strides(kernel: Kernel, hint: Hint) -> dict[Axis, int]:
    """Each axis' stride in elements in the kernel's largest access."""
    best: tuple[int, Expr] | None = None
    for _, offset, factor in _accesses(kernel):
        size = hint(product(a.size for a in offset.axes())) * factor
        if best is None or size > best[0]:
            best = (size, offset)
    out = {}
    if best is not None:
        for a in best[1].axes():
            c = best[1].coefficient(a)
            out[a] = 1 if c is None or c.axes() else max(hint(c), 0)
    return out


def lane_axis(kernel: Kernel, reduced: dict[Axis, Reduce], weight: dict[Axis, int], hint: Hint) -> Axis | None:
    """The vector axis: one scanned by lanes, else the most bytes at unit stride; never one whose tree is a column."""
    scanned = {s.over: s.lanes for s in kernel.scans}
    able = [a for a in kernel.axes if (a not in reduced or reduced[a].lanes == LANES) and scanned.get(a) != 1]
    able = [a for a in able if scanned.get(a) == LANES] or able
    scattered = {s.over for s in kernel.stores if s.mode}
    if scattered:
        able = [a for a in able if a not in scattered and weight.get(a)]
    if not able:
        return None
    # What is reduced by lanes is the lane, where turning the rest takes no more than to walk it with strides.
    most = max(weight.get(a, 0) for a in able)
    rows = [a for a in able if a in reduced and a.size.is_const and LANES <= a.size.value <= TURNED_ROW]
    able = [a for a in rows if 4 * weight.get(a, 0) >= most] or able
    return max(able, key=lambda a: (weight.get(a, 0) * min(hint(a.size), LANES), a in reduced, hint(a.size), a.name))


def transposed_axis(grid: list[Axis], lane: Axis | None, weight: dict[Axis, int]) -> Axis | None:
    """An axis along which much is read at unit stride while the lane runs along another."""
    if lane is None:
        return None
    others = [a for a in grid if a is not lane and weight.get(a, 0) * 8 > weight.get(lane, 0)]
    return max(others, key=lambda a: weight.get(a, 0), default=None)


def turned_tile(row: int, kernel: Kernel) -> int:
    """How many rows of so many elements are turned at once."""
    nbytes = max((p.dtype.itemsize for p in kernel.params), default=4)
    return next((t for t in TRANSPOSE_TILES if t * (row + LANES) * nbytes <= TILE_BYTES), TRANSPOSE_TILES[-1])


def value_costs(values: Iterable[Value]) -> dict[Value, float]:
    """Instructions an element to compute each value from memory, reductions taken as known."""
    own: dict[Value, float] = {}
    for v in values:
        base = 0.0
        if isinstance(v, Op):
            base = ops.TABLE[v.name].cost
        elif isinstance(v, Random):
            base = 40.0
        elif isinstance(v, (Load, Cast)):
            base = 1.0
        elif isinstance(v, Scan):
            base = 4.0
        own[v] = base if isinstance(v, Reduce) else base + sum(own[a] for a in v.args)
    return own


def tile_elements(loops: tuple[Loop, ...], axis: Axis) -> Expr:
    """How many elements of an axis a kernel has at hand below its grid: the tile, or all of it."""
    tile = next((loop.step for loop in loops if loop.axis is axis and loop.kind == "grid" and loop.step > 1), None)
    return as_expr(tile) if tile is not None else axis.size
