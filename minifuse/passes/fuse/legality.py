"""When two kernels may become one: each rule gives a refusal with the values that broke it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod

from minifuse.ir.index import Axis, Expr
from minifuse.ir.kernel import Store
from minifuse.ir.plan import Buffer, Plan

from .group import Group, grid_axes, innermost
from .unify import Equation, Refusal, Unified, image, unify

MAX_BUFFERS = 28
MAX_VALUES = 600
MIN_GRID = 32
SMALL_WORK = 16_384
CHEAP = 24.0
NEAR_STEPS = 24
LONG_BYTES = 65_536
MAX_COLUMNS = 32_768


class Legality:
    """The rules, over what the fuser knows of the plan: sizes, readers, and an order of the groups."""

    plan: Plan
    buffers: Mapping[str, Buffer]
    bytes: dict[str, int]
    groups: dict[int, Group]
    readers: dict[str, set[int]]
    rank: dict[int, int]
    kept: set[str]
    least_rows: int

    def path(self, a: Group, b: Group) -> bool:
        """Whether one of two groups depends on the other through a third."""
        raise TypeError("the fuser answers this")

    def legal(self, a: Group, b: Group) -> Unified | Refusal:
        if self.path(a, b):
            return Refusal("cycle", "another step between them depends on one and feeds the other", {})
        buffers = len({*a.reads, *b.reads, *a.writes, *b.writes})
        if buffers > MAX_BUFFERS:
            return Refusal(
                "too many buffers", "{found} buffers, at most {limit}", {"found": buffers, "limit": MAX_BUFFERS}
            )
        if a.size + b.size > MAX_VALUES:
            return Refusal(
                "too large", "{found} values, at most {limit}", {"found": a.size + b.size, "limit": MAX_VALUES}
            )
        devices = {self.buffers[n].device for n in [*a.writes, *b.writes, *a.reads, *b.reads]}
        if len(devices) > 1:
            return Refusal("devices", "on {devices}", {"devices": sorted(map(str, devices))})
        apart = self.scattered(a, b)
        if apart is not None:
            return apart
        hard: list[Equation] = []
        soft: list[Equation] = []
        for name in [n for n in a.writes if n in b.reads] + [n for n in b.writes if n in a.reads]:
            ahead, behind = (a, b) if name in a.writes else (b, a)
            for index in behind.reads[name]:
                if not all(isinstance(i, Expr) for i in index):
                    return Refusal("gathered", "{buffer} is read at an index that is computed", {"buffer": name})
                pairs = zip(ahead.writes[name], index, strict=True)
                for w, r in pairs:
                    assert isinstance(w, Expr) and isinstance(r, Expr)
                    hard.append((w, r) if ahead is a else (r, w))
        for name in a.reads:
            if name in b.reads:
                left, right = a.reads[name], b.reads[name]
                if len(left) == 1 and len(right) == 1:
                    for x, y in zip(next(iter(left)), next(iter(right)), strict=True):
                        if isinstance(x, Expr) and isinstance(y, Expr):
                            soft.append((x, y))
        vertical = bool(hard)
        found = unify(hard if vertical else self.sibling_equations(a, b, soft), soft, a.axes, b.axes, a.reduced)
        if isinstance(found, Refusal):
            return found
        chunked = self.by_chunks(a, b, found)
        refused = self.unsound(a, b, found) or (None if chunked else self.parallel(a, b, found)) or self.lengthens(a, b)
        return refused or replace(found, chunked=chunked)

    def scattered(self, a: Group, b: Group) -> Refusal | None:
        """What runs through rows one behind the other takes in what it alone reads, and nothing else."""
        if not a.scattered and not b.scattered:
            return None
        if not a.scattered and b.scattered.isdisjoint(a.reads) and self.dies(a, b):
            return None
        return Refusal("scattered", "{name} stores at places that are computed, one behind the other",
                       {"name": (a if a.scattered else b).name})  # fmt: skip

    def lengthens(self, a: Group, b: Group) -> Refusal | None:
        """One kernel runs when the earlier of the two is needed; what the other writes then waits for its reader.

        Bytes that wait over more than a few steps must be paid for by inputs that die earlier.
        """
        need_a, need_b = self.first_use(a, b), self.first_use(b, a)
        late = b if need_b > need_a else a
        distance = abs(need_a - need_b)
        if distance <= NEAR_STEPS:
            return None
        other = a if late is b else b
        waits = sum(self.bytes[n] for n in late.writes if not self.readers.get(n, set()) <= {a.id, b.id})
        dies = sum(self.bytes[n] for n in late.reads if self.readers[n] <= {a.id, b.id} and n not in other.writes)
        if waits <= dies or waits < LONG_BYTES:
            return None
        return Refusal("lengthens memory", "{waiting_bytes} more would wait over {steps} steps",
                       {"waiting_bytes": waits - dies, "steps": distance})  # fmt: skip

    def first_use(self, g: Group, but: Group) -> int:
        """The rank of the first step that waits for a group, itself where none does."""
        return min((self.rank[s] for s in g.succs if s != but.id), default=self.rank[g.id])

    def sibling_equations(self, a: Group, b: Group, soft: list[Equation]) -> list[Equation]:
        """Siblings must agree on how they walk what they share, or sharing saves nothing."""
        return [(x, y) for x, y in soft if isinstance(x.atom, Axis) or isinstance(y.atom, Axis) or x.axes() or y.axes()]

    def unsound(self, a: Group, b: Group, how: Unified) -> Refusal | None:
        """The merged kernel must reduce by the same trees, and store each element once."""
        trees: set[tuple[Axis, int]] = set()
        for g, env in ((a, how.first), (b, how.second)):
            for x, lanes in g.trees:
                image = env[x].atom if x in env else x
                if not isinstance(image, Axis):
                    return Refusal("splits a reduction", "{axis} is reduced and would be cut in two", {"axis": str(x)})
                trees.add((image, lanes))
            joined: dict[Axis, set[Axis]] = {}
            for x in g.axes:
                for y in env[x].axes() if x in env else ():
                    joined.setdefault(y, set()).add(x)
            for r in g.body if joined else ():
                if isinstance(r, Store) and (
                    r.param in self.kept or not self.readers.get(r.param, set()) <= {a.id, b.id}
                ):
                    if any(0 < len(xs & r.space) < len(xs) for xs in joined.values()):
                        return Refusal("partial rows", "{name} would be stored more than once", {"name": r.param})
        if (a.scanned or b.scanned) and len({x for x, _ in trees}) > 1:
            return Refusal("two orders", "one scans an axis, the other reduces or scans another", {})
        if len({x for x, _ in trees}) < len(trees):
            return Refusal("different trees", "one reduces a row and the other a column along one axis", {})
        return None

    def parallel(self, a: Group, b: Group, how: Unified) -> Refusal | None:
        """The merged kernel must keep enough independent work and its rows."""
        if a.chunked or b.chunked:
            return Refusal("different rows", "{name} sums columns by chunks of rows, and could not with the other",
                           {"name": a.name if a.chunked else b.name})  # fmt: skip

        spaces_a, reduced_a = [image(s, how.first) for s in a.spaces], image(a.reduced, how.first)
        spaces_b, reduced_b = [image(s, how.second) for s in b.spaces], image(b.reduced, how.second)
        dead = self.dies(a, b)
        if dead and not a.reduced:
            spaces_a = []
        spaces, reduced = spaces_a + spaces_b, reduced_a | reduced_b
        grid = grid_axes(spaces, reduced)
        work = max((self.extent(s) for s in spaces), default=1)
        before = [(grid_axes(s, r), g) for s, r, g in ((spaces_a, reduced_a, a), (spaces_b, reduced_b, b)) if s]
        heavy = [self.extent(g) for (g, _), s in zip(before, (x for x in (spaces_a, spaces_b) if x), strict=True)
                 if max(self.extent(axes) for axes in s) > SMALL_WORK]  # fmt: skip
        if heavy and self.extent(grid) < min(MIN_GRID, max(heavy)):
            return Refusal("loses parallelism", "{left} independent rows of {before}",
                           {"left": self.extent(grid), "before": max(heavy)})  # fmt: skip
        for old, g in before:
            env = how.first if g is a else how.second
            inner = innermost(g, self.buffers)
            inside = frozenset() if inner is None else image([inner], env)
            lost = old - grid - reduced - inside
            if lost and work > SMALL_WORK:
                return Refusal("different rows", "{name} runs over {lost}, which the other does not have",
                               {"name": g.name, "lost": sorted(map(str, lost))})  # fmt: skip
        if dead and not a.reduced and a.cost > CHEAP and spaces_b:
            ran = image(a.axes, how.first)
            times = work / max(self.extent(ran), 1)
            inner = innermost(b, self.buffers)
            if times > 1 and inner in ran:
                return Refusal("recomputes", "{name} would run {times} times", {"name": a.name, "times": round(times)})
        return None

    def by_chunks(self, a: Group, b: Group, how: Unified) -> bool:
        """Whether column sums ride along with what walks the same data row by row: a launch over chunks of rows does
        both, and one behind it joins the chunks' sums (`passes.split`)."""
        if not (a.splits and b.splits):
            return False
        trees = {
            (x, lanes) for g, env in ((a, how.first), (b, how.second)) for y, lanes in g.trees for x in image([y], env)
        }
        columns = {x for x, lanes in trees if lanes == 1}
        if len(columns) != 1 or any(x in columns for x, lanes in trees if lanes > 1):
            return False
        (over,) = columns
        if self.extent({over}) < self.least_rows:
            return False
        work = 0
        for g, other, env in ((a, b, how.first), (b, a, how.second)):
            late = not other.summed.isdisjoint(g.reads)
            for r in g.body:
                later = late or isinstance(r, Store) and r.param in g.summed
                space = image(r.space, env)
                work = max(work, self.extent(space))
                if (over in space) == later:
                    return False
            for axes, lanes in g.folds:
                space = image(axes, env)
                work = max(work, self.extent(space))
                if late or over not in space or lanes == 1 and self.extent(space - {over}) > MAX_COLUMNS:
                    return False
        return work > SMALL_WORK

    def dies(self, a: Group, b: Group) -> bool:
        """Whether nothing outside b reads what a stores."""
        return not a.checks and all(n not in self.kept and self.readers.get(n, set()) <= {a.id, b.id} for n in a.writes)

    def extent(self, axes: Iterable[Axis]) -> int:
        return prod(self.plan.hint(x.size) for x in axes)
