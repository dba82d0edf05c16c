"""Schedules for Triton: what is a program of the grid, what is a block of lanes, what is a loop.

Where C has one vector of 16 lanes, Triton has blocks of up to three axes. A grid axis with a tile is a
block of that many points a program; an axis that is a lane alone lies in one block whole, padded to a
power of two and masked; a lane behind a tiled loop walks its axis block by block.

The tree of a reduction on this target, a function of its kind, its extent and its dtype:

* A row (`Reduce.lanes` > 1) of at most `ROW_BLOCK` elements is one block: partial results join by
  halves, then by neighbours, in the order that `triton_prelude.mf_sum` writes down.
* A longer row is cut into pieces of `PIECE`, whose results are a row in turn. A piece is taken `LONG_BLOCK` elements at
  a time: four neighbours are joined as a row is, results at equal places of the blocks are folded in order, and what is
  there at the end is a row of one block. So threads wait for each other once a piece. A row whose length is not known
  until the call is cut into blocks of a size taken from its hint; their results are a column.
* What joins several values passes twice over a row of one block. Means and squares about them (`welford`) would divide
  at every element, so the results of a piece's blocks are a row of partial results, as the pieces' are.
* A column folds its elements in order, `COLUMN_BLOCK` at a time; the results are a column in turn.

So a reduction with too few independent points for a GPU is split into a launch over the blocks of its
own tree and one that joins their results, and no bit changes.

A scan takes the blocks of a row of its extent one after another: within a block by `triton_prelude.mf_scan`, where
the running result of what lies before joins all of it. The running result of a column joins its elements in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

from minifuse.ir.index import Axis, Expr
from minifuse.ir.kernel import Kernel, Loop, Root, Schedule, Store, rewrite
from minifuse.ir.plan import Buffer, Plan
from minifuse.ir.shape import cdiv, product
from minifuse.ir.value import LANES, Load, Op, Pick, Reduce, Scan, Value, topological
from minifuse.options import Options
from minifuse.passes.context import CompileContext
from minifuse.passes.schedule import (
    Hint,
    common,
    depth,
    lane_axis,
    main_strides,
    scheduled,
    tile_sizes,
    transposed_axis,
    unit_weights,
)
from minifuse.passes.split import Tree, closed, halves, new_buffer, results_of, splits

ROW_BLOCK = 16_384
LONG_BLOCK, PIECE = 4096, 32_768
COLUMN_BLOCK = 32
SHORTEST_DYNAMIC, LONGEST_DYNAMIC = 256, 4096
POINTS, MORE_POINTS = 1024, 4096
"""Elements that a program has at hand where it can choose: eight a thread of four warps, or more where much is the same
for all of them."""
SAME = 8
"""So much are operators that are done once a program and not once an element."""
WARP, VECTOR_BYTES = 32, 16
"""Threads of a warp, and the bytes that one of them asks for at once."""
COLUMNS = 256
TRANSPOSE = 64
NESTED = 4096
"""Elements of a row and what is walked or reduced beside it: 32 a thread of four warps."""
HELD = 32_768
"""The most elements a program holds: a row of as many float32 fits the registers of 16 warps."""
LEAST_ROWS = 64 * COLUMN_BLOCK
"""How many rows make enough blocks to be a grid: what sums their columns may then walk them row by row."""
PROGRAMS = 512
"""Fewer programs than this leave parts of a large GPU idle."""
SPLIT_WORK = 4096


def target(plan: Plan, options: Options) -> str:
    """What a plan's kernels are written in: the option's target, `auto` by the device of its buffers."""
    if options.target != "auto":
        return options.target
    return "triton" if any(b.device.type == "cuda" for b in plan.buffers.values()) else "c"


def schedule(plan: Plan, ctx: CompileContext) -> Plan:
    """Give each launch a schedule; a reduction with too few points is split along its own tree."""
    return scheduled(plan, ctx, pieces, choose)


def pieces(kernel: Kernel, name: str, hint: Hint, buffers: dict[str, Buffer]) -> list[Kernel]:
    """The kernels that one launch becomes: one where it can be, else one a root, and one for what a root reduces first,
    each split in turn."""
    found: list[Kernel] = []
    for k in split(kernel, name, hint, buffers):
        parts: Sequence[Kernel] = ()
        if not set(k.reads) & set(k.writes) and problem(k, choose(k, hint)) is not None:
            if len(k.body) > 1:
                parts = [closed(replace(k, body=(root,))) for root in k.body]
            elif inner := _reduced_first(k):
                parts = _inner_first(k, inner, f"{name}_first", hint, buffers)
        for n, part in enumerate(parts):
            found += pieces(part, f"{name}_{n}", hint, buffers)
        if not parts:
            found.append(k)
    return found


def elements(kernel: Kernel, held: dict[Axis, int]) -> int:
    """Elements of the largest block that a program has at hand; no value varies over lanes that it has not."""
    spaces = [*kernel.spaces, *(v.axes for v in kernel.values())]
    return max((prod(n for a, n in held.items() if a in space) for space in spaces), default=1)


def problem(kernel: Kernel, s: Schedule) -> str | None:
    """Why Triton cannot run a kernel in these loops, or None: what a program keeps must be blocks of known size."""
    held = blocks(s)
    if (most := elements(kernel, held)) > HELD or len(held) > 3:
        return f"a block of {most} elements in {len(held)} dimensions"
    found: list[Reduce | Scan] = [*kernel.reductions, *kernel.scans]
    for r in found:
        if (r.over in held) != (r.lanes > 1):
            return f"{r.over} is reduced or scanned as a row and as a column"
        first = next((k for k, loop in enumerate(s.loops) if loop.axis is r.over and loop.kind == "loop"), None)
        kept = r.axes - {r.over}
        if first is not None and any(loop.kind == "loop" and loop.axis in kept for loop in s.loops[first:]):
            return f"a {r.kind} over {r.over} keeps a row that no block holds"
    return None


# -- trees ------------------------------------------------------------------------------------------
def power_of_2(n: int) -> int:
    """The least power of two that is at least n, and at least 1."""
    return 1 << max(n - 1, 0).bit_length()


def tree(r: Reduce | Scan, hint: Hint) -> Tree:
    """The tree of a reduction, or the blocks of a scan (see the module's head)."""
    size = r.over.size
    if r.lanes == 1:
        return Tree(COLUMN_BLOCK, 1)
    if size.is_const:
        return Tree(PIECE if size.value > ROW_BLOCK else power_of_2(size.value), LANES)
    return Tree(min(max(power_of_2(hint(size)), SHORTEST_DYNAMIC), LONGEST_DYNAMIC), 1)


def tile_steps(r: Reduce | Scan, hint: Hint) -> list[int]:
    """Steps, outermost first, of the tiled loops that a reduction's or a scan's blocks need."""
    size, t = r.over.size, tree(r, hint)
    if t.lanes > 1:
        return [*([PIECE] if size.value > PIECE else []), LONG_BLOCK] if size.value > ROW_BLOCK else []
    steps = tile_sizes(t.block, COLUMN_BLOCK, size.value if size.is_const else hint(size))
    return [t.block] if r.lanes > 1 and not steps else steps


# -- splitting reductions ---------------------------------------------------------------------------
def split(kernel: Kernel, name: str, hint: Hint, buffers: dict[str, Buffer]) -> list[Kernel]:
    """The launches of a kernel: itself, or blocks of a reduction's tree, then the rest over their results.

    The first launch also runs what walks the reduced axis and needs no result of it.
    """
    found = _splittable(kernel, hint)
    first = _nested(kernel, hint) or ([] if found else _rows_first(kernel, hint))
    if first:
        return _inner_first(kernel, first, name, hint, buffers)
    results, narrow = ([], []) if found else _results_first(kernel, hint)
    if results:
        return _inner_first(kernel, results, name, hint, buffers, narrow)
    if not found:
        return [kernel]
    over, cut = found[0].over, tree(found[0], hint)
    made = halves(kernel, found, cut, name, buffers)
    rest = Kernel((made.part, *kernel.axes), made.params, made.rest, kernel.origins)
    if not any(over in r.space for r in made.rest) and not any(r.over is over for r in rest.reductions):
        return [made.first, *split(closed(rest), f"{name}_join", hint, buffers)]
    # the axis is walked again with the result: join in a launch of its own, then the rest
    joins = [r for r in rest.reductions if r.over is made.part]
    return [made.first, *_inner_first(rest, joins, name, hint, buffers)]


def _inner_first(
    kernel: Kernel, inner: Sequence[Reduce], name: str, hint: Hint, buffers: dict[str, Buffer],
    early: Sequence[Root] = (),
) -> list[Kernel]:  # fmt: skip
    """A launch that stores the results of some reductions and does what is `early`, and the rest, which loads them."""
    stores: list[Root] = list(early)
    results: dict[Value, Load] = {}
    params = {p.name: p for p in kernel.params}
    for k, r in enumerate(v for found in inner for v in results_of(found)):
        rest = [a for a in kernel.axes if a in r.axes]
        at = tuple(a.expr for a in rest)
        buffer = new_buffer(f"{name}_whole{k}", r.dtype, rest, kernel, buffers)
        params[buffer.name] = buffer.as_param()
        stores.append(Store(buffer.name, at, r))
        results[r] = Load.of(buffer.name, at, r.dtype)
    first = closed(Kernel(kernel.axes, tuple(params.values()), tuple(stores), kernel.origins))
    after = rewrite([r for r in kernel.body if r not in early], None, lambda v: results.get(v))
    last = closed(Kernel(kernel.axes, tuple(params.values()), after, kernel.origins))
    return [*split(first, f"{name}_a", hint, buffers), *split(last, f"{name}_b", hint, buffers)]


def _reduced_first(kernel: Kernel) -> list[Reduce]:
    """The reductions of single values that need none before them, where another one needs theirs or the only root runs
    over more axes than they do."""
    (root,) = kernel.body
    needed = {v for r in kernel.reductions for v in topological(r.args) if isinstance(v, Reduce) and v is not r}
    free = [r for r in kernel.reductions if not any(isinstance(v, Reduce) for v in topological(r.args))]
    return [r for r in free if (r in needed or r.axes < root.space) and len(r.args) == 1]


def _nested(kernel: Kernel, hint: Hint) -> list[Reduce]:
    """Reductions inside a row's reduction over another axis, where the two blocks are too many elements."""
    for r in kernel.reductions:
        if r.lanes == 1:
            continue
        found = [v for v in topological(r.args) if isinstance(v, Reduce) and v.over is not r.over and r.over in v.axes]
        outer = [v for v in found if not any(v is not w and v in topological([w]) for w in found)]
        if any(tree(v, hint).block * tree(r, hint).block > NESTED for v in outer):
            return outer
    return []


def _rows_first(kernel: Kernel, hint: Hint) -> list[Reduce]:
    """The inner reductions of sums over several axes, where these have too few points to fill a GPU."""
    grid = hint(product(a.size for a in common(kernel)))
    if any(kernel.scans) or grid >= PROGRAMS or hint(product(a.size for a in kernel.axes)) < SPLIT_WORK * grid:
        return []
    found: dict[Reduce, None] = {}
    for outer in kernel.reductions:
        inner = outer.args[0].value if isinstance(outer.args[0], Pick) else outer.args[0]
        if isinstance(inner, Reduce) and splits(inner):
            # a mean that the inner one needs, over an axis that this one walks, comes first
            before = [v for v in topological(inner.args) if isinstance(v, Reduce) and v.over in inner.axes]
            found.update(dict.fromkeys(before[-1:] or [inner]))
    return list(found)


def _results_first(kernel: Kernel, hint: Hint) -> tuple[list[Reduce], list[Root]]:
    """The reductions that roots over more axes read, where they have too few points to fill a GPU, those roots not, and
    what is reduced is walked again; and the other roots, which stay with them: they write over nothing that the first
    ones load."""
    grid = hint(product(a.size for a in common(kernel)))
    wide = [r for r in kernel.body if hint(product(a.size for a in r.space)) >= SPLIT_WORK * grid]
    if any(kernel.scans) or grid >= PROGRAMS:
        return [], []
    found: dict[Reduce, None] = {}
    waiting = [v for root in wide for v in root.values]
    while waiting:
        v = waiting.pop()
        if isinstance(v, Reduce):
            found[v] = None
        else:
            waiting += v.args
    held = all(r.lanes > 1 and not tile_steps(r, hint) for r in found)  # by the block that has reduced it
    early = [r for r in kernel.body if r not in wide]
    written = {r.param for r in early if isinstance(r, Store)}
    late = any(isinstance(v, Load) and v.param in written for root in wide for v in topological(root.values))
    if held or late or any(len(r.axes) >= len(root.space) for r in found for root in wide):
        return [], []
    return list(found), early


def _splittable(kernel: Kernel, hint: Hint) -> list[Reduce]:
    """The reductions over one axis that are worth a launch over blocks, those needing no other of them."""
    if any(kernel.scans) or hint(product(a.size for a in kernel.axes)) < SPLIT_WORK:
        return []  # a block of a scan does not stand alone
    reductions = list(kernel.reductions)
    grid = common(kernel)
    for over in dict.fromkeys(r.over for r in reductions):
        mine = [r for r in reductions if r.over is over]
        if len({r.lanes for r in mine}) > 1 or not all(map(splits, mine)):
            continue
        points = hint(product(a.size for a in grid))
        programs, least = (points, 1) if mine[0].lanes > 1 else (points // COLUMNS, 2)
        if programs >= PROGRAMS or hint(over.size) <= least * tree(mine[0], hint).block:
            continue
        return [r for r in mine if not any(v in mine for v in topological(r.args))]
    return []


# -- choosing loops ---------------------------------------------------------------------------------
def choose(kernel: Kernel, hint: Hint) -> Schedule:
    """The grid, the loops and the blocks of a kernel, from its strides and extents."""
    reductions = list(kernel.reductions)
    scans = {s.over: s for s in kernel.scans}
    along: list[Reduce | Scan] = [*scans.values(), *reductions]
    rows = {r.over: r for r in along if r.lanes > 1}
    columns = {r.over: r for r in reductions if r.lanes == 1 and r.over not in rows}
    running = {s.over for s in scans.values() if s.lanes == 1}
    weight, stride = unit_weights(kernel, hint), main_strides(kernel, hint)
    grid = sorted(common(kernel), key=lambda a: (-stride.get(a, 0), a.name))
    inner = [a for a in kernel.axes if a not in grid]
    # a column that is scanned runs inside of what walks its rows, each with a running result of its own
    inner.sort(key=lambda a: (a in running, a not in columns, -depth(a, reductions), -stride.get(a, 0), a.name))
    fast = lane_axis(kernel, {r.over: r for r in reductions}, weight, hint)
    loops: list[Loop] = []
    blocks: dict[Axis, int] = {}
    row_steps = {a: tile_steps(rows[a], hint) for a in inner if a in rows}
    # rows are blocks as their trees are; what walks beside them takes what room they leave
    held = prod(steps[-1] if steps else power_of_2(a.size.value) for a, steps in row_steps.items())
    for a in inner:
        if a in columns or a in running:
            loops += [Loop(a, "loop", step) for step in (tile_steps(columns[a], hint) if a in columns else [])]
            loops.append(Loop(a, "loop"))
            continue
        steps = row_steps[a] if a in rows else _walk(a, NESTED // held)
        block = steps[-1] if steps else power_of_2(a.size.value)
        if a not in rows and (block == 1 or len(blocks) == 2):
            loops.append(Loop(a, "loop"))
            continue
        loops += [Loop(a, "loop", step) for step in steps]
        blocks[a] = block
        held *= 1 if a in rows else block
    across = None if kernel.ordered else transposed_axis(grid, fast, weight)
    points = MORE_POINTS if fast is not None and fast in grid and _same(kernel, fast) >= SAME else POINTS
    walks, least = bool(columns) or bool(running), WARP * vector(kernel)
    tiles = _tiles(grid, fast, points // held, 3 if held == 1 else 1, least, walks, hint, across)
    blocks.update(tiles)
    lanes = sorted(blocks, key=lambda a: (a is fast, -stride.get(a, 0), a.name))
    return Schedule((
        *(Loop(a, "grid", tiles.get(a, 1)) for a in grid),
        *loops,
        *(Loop(a, "lane") for a in lanes),
    ))  # fmt: skip


def _walk(axis: Axis, room: int) -> list[int]:
    """The tiled loop of an axis that a program walks without reducing it: none where one block holds it."""
    block = max(min(room, POINTS), 1)
    whole = axis.size.is_const and power_of_2(axis.size.value) <= max(block, min(room, ROW_BLOCK))
    return [] if whole else [block]


def vector(kernel: Kernel) -> int:
    """Elements that a thread asks for at once, of the narrowest tensor that it reads or writes."""
    return VECTOR_BYTES // min((min(p.dtype.itemsize, VECTOR_BYTES) for p in kernel.params if p.shape), default=4)


def _same(kernel: Kernel, fast: Axis) -> int:
    """Operators and loads whose results vary over the grid, but not along its fastest axis."""
    return sum(isinstance(v, (Op, Load)) and bool(v.axes) and fast not in v.axes for v in kernel.values())


def _tiles(
    grid: Sequence[Axis], fast: Axis | None, room: int, most: int, fewest: int, columns: bool, hint: Hint,
    across: Axis | None,
) -> dict[Axis, int]:  # fmt: skip
    """How many points of each grid axis a program takes, where that is more than one: `room` of them in all, along
    `most` axes; at least the `fewest` that a warp asks for at once, where they lie side by side; of columns as many as
    it has threads, since each is walked."""
    tiles: dict[Axis, int] = {}
    room = max(room, 1)
    if across is not None and fast is not None and fast in grid:
        wide = {a: min(TRANSPOSE, power_of_2(hint(a.size))) for a in (fast, across)}
        return {a: n for a, n in wide.items() if n > 1}
    if columns:
        room = min(room, COLUMNS)
    order = [a for a in grid if a is fast] + [a for a in grid[::-1] if a is not fast]
    programs = hint(product(a.size for a in grid))
    least = WARP if columns else fewest if fast in grid else 1
    while room > least and programs // room < PROGRAMS:
        room //= 2
    for a in order:
        n = min(room, power_of_2(hint(a.size)))
        if n > 1 and len(tiles) < most:
            tiles[a] = n
            room //= n
    return tiles


def blocks(s: Schedule) -> dict[Axis, int]:
    """The lanes of a schedule in order, with how many elements of each are a block."""
    found: dict[Axis, int] = {}
    for loop in s.loops:
        if loop.kind == "lane":
            steps = [before.step for before in s.loops if before.axis is loop.axis and before.step > 1]
            found[loop.axis] = steps[-1] if steps else power_of_2(loop.axis.size.value)
    return found


def grid_size(s: Schedule) -> Expr:
    """How many programs a launch has."""
    return product(cdiv(loop.axis.size, loop.step) for loop in s.grid)
