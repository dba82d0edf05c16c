"""The loop tree: a kernel and its schedule as nested loops with what runs in each.

Roots are stores, checks, reductions and values held in a row buffer. A root runs over the loops of
its axes, in the schedule's order. Roots that need the same loop share it unless one needs another's
finished reduction; then it gets a loop of its own behind. Everything else is computed where it is
first needed, at the outermost loop that it varies over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod

from minifuse.ir.index import Axis
from minifuse.ir.kernel import Check, Kernel, Loop, Schedule, Store
from minifuse.ir.value import Load, Pick, Reduce, Value
from minifuse.passes.schedule import HOLD_BYTES, HOLD_COST, tile_elements, value_costs


@dataclass(frozen=True)
class Fold:
    """One level of a reduction: at the innermost level values fold into it, above it partial results."""

    value: Reduce
    loop: int
    level: int


@dataclass(frozen=True)
class Hold:
    """Keep a value in a row buffer for later loops over the same row."""

    value: Value


Item = Store | Check | Fold | Hold


@dataclass
class Node:
    """A loop (None at the top) and what runs in it, in order."""

    loop: int | None
    items: list[Item | Node] = field(default_factory=list)

    def walk(self, above: tuple[Node, ...] = ()) -> Iterator[tuple[Item, tuple[Node, ...]]]:
        """What runs inside, in order, each with the loops around it."""
        for item in self.items:
            if isinstance(item, Node):
                yield from item.walk((*above, self))
            else:
                yield item, (*above, self)


@dataclass(frozen=True)
class LoopTree:
    """`paths[item]` is the loops an item runs in; `folds[r]` the levels of a reduction, the last one finishes it.

    `late[store]` are loads that stores at the same point still need of what this one overwrites.
    """

    kernel: Kernel
    schedule: Schedule
    root: Node
    paths: dict[Item, tuple[int, ...]]
    folds: dict[Reduce, tuple[Fold, ...]]
    late: dict[Store, tuple[Load, ...]]

    @property
    def loops(self) -> tuple[Loop, ...]:
        return self.schedule.loops

    def loops_of(self, axes: Iterable[Axis]) -> tuple[int, ...]:
        """The loops, outermost first, that a value over these axes varies with."""
        return _loops_of(self.loops, axes)


def _loops_of(loops: Sequence[Loop], axes: Iterable[Axis]) -> tuple[int, ...]:
    wanted = set(axes)
    return tuple(k for k, loop in enumerate(loops) if loop.axis in wanted)


def build(kernel: Kernel, schedule: Schedule) -> LoopTree:
    """Nest the roots; deterministic. A reduction whose axis has no loop is an expression, with no folds.

    Raises ValueError when a root cannot run under the grid.
    """
    loops = schedule.loops
    order: list[Item] = []
    paths: dict[Item, tuple[int, ...]] = {}
    folds: dict[Reduce, tuple[Fold, ...]] = {}
    maker: dict[Value, Item] = {}
    held = set(schedule.held)
    for v in kernel.values():
        if isinstance(v, Reduce):
            levels = [k for k, loop in enumerate(loops) if loop.axis is v.over and loop.kind != "grid"]
            made = []
            path = _loops_of(loops, v.axes | {v.over})
            for depth, k in enumerate(reversed(levels)):
                fold = Fold(v, k, depth)
                # partial results are joined as a whole, outside of the loops that they vary over
                paths[fold] = tuple(p for p in path if p <= k or depth == 0)
                order.append(fold)
                made.append(fold)
            folds[v] = tuple(made)
            if made:
                maker[v] = made[-1]
        if v in held:
            hold = Hold(v)
            order.append(hold)
            paths[hold] = _loops_of(loops, v.axes)
            maker[v] = hold
    for root in kernel.body:
        order.append(root)
        paths[root] = _loops_of(loops, root.space)
    needs = {item: _needs(item, maker, folds) for item in order}
    late, behind = _stores_last(order, needs, paths, maker, frozenset(kernel.reads))
    grid = tuple(k for k, loop in enumerate(loops) if loop.kind == "grid")
    for item in order:
        if any(k not in paths[item] for k in grid):
            raise ValueError(f"{item} does not run over the grid {[str(loops[k]) for k in grid]}")
    top = Node(None)
    _nest(top, _sorted(order, {item: needs[item] | behind.get(item, set()) for item in order}), 0, paths, needs, behind)
    return LoopTree(kernel, schedule, top, paths, folds, late)


def _item_values(item: Item) -> tuple[Value, ...]:
    if isinstance(item, Fold):
        return item.value.args if item.level == 0 else ()
    return item.values if isinstance(item, (Store, Check)) else (item.value,)


def _needs(item: Item, maker: dict[Value, Item], folds: dict[Reduce, tuple[Fold, ...]]) -> set[Item]:
    """Items whose result an item uses directly."""
    if isinstance(item, Fold) and item.level > 0:
        return {folds[item.value][item.level - 1]}
    if isinstance(item, Hold) and isinstance(item.value, Reduce):
        return {folds[item.value][-1]}
    return {maker[v] for v in _direct(item, maker) if v in maker}


def _direct(item: Item, maker: dict[Value, Item]) -> dict[Value, None]:
    """Values that an item computes or uses, down to the results of other items."""
    stack = list(item.value.args if isinstance(item, Hold) else _item_values(item))
    seen: dict[Value, None] = {}
    while stack:
        v = stack.pop()
        if v in seen:
            continue
        seen[v] = None
        if v not in maker:
            stack.extend(reversed(v.args))
    return seen


def _stores_last(
    order: list[Item],
    needs: dict[Item, set[Item]],
    paths: dict[Item, tuple[int, ...]],
    maker: dict[Value, Item],
    read: frozenset[str],
) -> tuple[dict[Store, tuple[Load, ...]], dict[Item, set[Item]]]:
    """A store over something that the kernel reads waits for every item that reads it.

    Stores that read what another overwrites in turn run over the same axes, for a load is at the
    stored index: these wait for the same items and run at one point, loads first. A store runs behind what folds or
    keeps the element at the same point (the second result), where the loads are done and nothing is computed twice.
    """
    over = [item for item in order if isinstance(item, Store) and item.param in read]
    loads = {item: [v for v in _direct(item, maker) if isinstance(v, Load)] for item in order if over}
    behind: dict[Item, set[Item]] = {}
    for store in over:
        for other, found in loads.items():
            if not any(v.param == store.param for v in found):
                continue
            # what joins several values may read a whole row where it lies, later
            at_once = isinstance(other, Hold) or isinstance(other, Fold) and other.value.results == 1
            if at_once and paths[other] == paths[store]:
                behind.setdefault(store, set()).add(other)
            elif not (other in over and paths[other] == paths[store]):
                needs[store].add(other)
    late: dict[Store, tuple[Load, ...]] = {}
    for store in over:
        here = [other for other in over if paths[other] == paths[store]]
        needs[store] |= {n for other in here for n in needs[other]}
        behind[store] = {n for other in here for n in behind.get(other, ())}
        late[store] = tuple(v for other in here if other is not store for v in loads[other] if v.param == store.param)
    return late, behind


def _sorted(order: list[Item], needs: dict[Item, set[Item]]) -> list[Item]:
    """Items after what they need, otherwise in the order given."""
    out: dict[Item, None] = {}
    for first in order:
        stack = [first]
        while stack:
            item = stack[-1]
            waiting = [n for n in order if n in needs[item] and n not in out] if needs[item] else []
            if waiting:
                stack.extend(reversed(waiting))
                continue
            out.setdefault(stack.pop())
    return list(out)


def _nest(
    node: Node,
    items: list[Item],
    depth: int,
    paths: dict[Item, tuple[int, ...]],
    needs: dict[Item, set[Item]],
    behind: dict[Item, set[Item]],
) -> None:
    """Place items under a node whose enclosing loops are the first `depth` of each item's path: after what they need is
    finished, and after what they only run behind has run at the same point."""
    segments: list[tuple[int | None, list[Item]]] = []
    place: dict[Item, int] = {}
    for item in items:
        path = paths[item]
        if len(path) == depth:
            segments.append((None, [item]))
            place[item] = len(segments) - 1
            continue
        loop = path[depth]
        after = -1
        for need in needs[item]:
            if need not in place:
                continue
            at = place[need]
            finished_by_loop = isinstance(need, Fold) and need.loop == loop
            inside = segments[at][0] == loop and not finished_by_loop
            after = max(after, at if inside else at + 1)
        after = max([after, *(place[other] for other in behind.get(item, ()) if other in place)])
        free = range(max(after, 0), len(segments))
        found = next((k for k in free if segments[k][0] == loop), None)
        if found is None:
            segments.append((loop, [item]))
            found = len(segments) - 1
        else:
            segments[found][1].append(item)
        place[item] = found
    for loop_or_none, members in segments:
        if loop_or_none is None:
            node.items.extend(members)
            continue
        child = Node(loop_or_none)
        node.items.append(child)
        _nest(child, members, depth + 1, paths, needs, behind)


# -- row buffers ------------------------------------------------------------------------------------
def with_held(kernel: Kernel, schedule: Schedule) -> LoopTree:
    """The tree, with values kept in a buffer that several loops over one row need: results of
    reductions, and what is dear to compute again."""
    tree = _with_results(kernel, schedule)
    worth = tuple(v for v in _worth_holding(tree) if v not in tree.schedule.held)
    return _with_results(kernel, replace(schedule, held=tree.schedule.held + worth)) if worth else tree


def _with_results(kernel: Kernel, schedule: Schedule) -> LoopTree:
    """The tree that holds the results of reductions that another loop reads; a value held may part loops that were
    one, so it is asked again until none is missing."""
    tree = build(kernel, schedule)
    while lost := tuple(v for v in _lost(tree) if v not in tree.schedule.held):
        tree = build(kernel, replace(schedule, held=tree.schedule.held + lost))
    return tree


def _lost(tree: LoopTree) -> tuple[Value, ...]:
    """Results of reductions that are used in another loop over the rows than the one that makes them."""
    inside = {item: tuple(map(id, above)) for item, above in tree.root.walk()}
    maker: dict[Value, Item] = {r: folds[-1] for r, folds in tree.folds.items()}
    found: dict[Value, None] = {}
    for item in inside:
        if isinstance(item, Fold) and item.level > 0:
            continue
        values = _direct(item, maker)
        for v in values:
            r = v.value if isinstance(v, Pick) else v
            if not isinstance(r, Reduce) or r.results > 1 and v is r:
                continue
            last = tree.folds[r][-1]
            depth = sum(k < last.loop for k in tree.paths[last])
            if inside[last][: depth + 1] != inside[item][: depth + 1]:
                found[v] = None
    return tuple(found)


def _parts_loops(tree: LoopTree, v: Value, leaves: Iterable[list[Item]]) -> bool:
    """Whether a value would have to be held before a loop that all of its readers run in."""
    around = set.intersection(*(set(tree.paths[item]) for items in leaves for item in items))
    return not around - {k for k, loop in enumerate(tree.loops) if loop.kind == "lane"} <= set(tree.loops_of(v.axes))


def _each_time(tree: LoopTree, v: Value, leaf: list[Item]) -> bool:
    """Whether a loop that a value does not vary over runs around one that it does: it would be computed each time."""
    mine = tree.loops_of(v.axes)
    others = (k for k in tree.paths[leaf[0]] if tree.loops[k].kind != "grid" and k not in mine)
    outermost = next(others, len(tree.loops))
    return any(k > outermost for k in mine)


def _worth_holding(tree: LoopTree) -> tuple[Value, ...]:
    loops: dict[int, list[Item]] = {}
    for item, above in tree.root.walk():
        loops.setdefault(id(above[-1]), []).append(item)
    leaves = list(loops.values())
    used: dict[Value, set[int]] = {}
    lane = tree.schedule.lane
    for k, items in enumerate(leaves):
        for v in (v for item in items for v in _item_values(item)):
            used.setdefault(v, set()).add(k)
    costs = value_costs(tree.kernel.values())
    room, needed = HOLD_BYTES, {lane, *(loop.axis for loop in tree.schedule.grid)}
    found: list[Value] = []
    for v in reversed(tree.kernel.values()):
        if isinstance(v, Reduce):
            continue
        readers = [leaves[k] for k in used.get(v, ())]
        again = len(readers) > 1 and not _parts_loops(tree, v, readers)
        again = again or any(_each_time(tree, v, leaf) for leaf in readers)
        sizes = [tile_elements(tree.loops, a) for a in v.axes if not _only_grid(tree, a)]
        if again and needed <= v.axes and costs[v] >= HOLD_COST and all(s.is_const for s in sizes):
            nbytes = 8 * prod(s.value + 15 for s in sizes)
            if nbytes <= room:
                room -= nbytes
                found.append(v)
                continue  # what it is made of is needed once for it
        for a in v.args:
            used.setdefault(a, set()).update(used.get(v, ()))
    return tuple(found)


def _only_grid(tree: LoopTree, axis: Axis) -> bool:
    return all(loop.kind == "grid" for loop in tree.loops if loop.axis is axis)
