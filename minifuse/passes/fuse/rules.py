"""When two groups may become one kernel: a table of rules, each a small function over a candidate.

A rule gives None where it is kept, else the values that break it. The first that is broken refuses the pair. Those
before `UNIFIED` look at the groups as they are; those behind it also at how their loops become one (`Candidate.how`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import Any, NamedTuple

from minifuse.ir.index import Axis, Expr
from minifuse.ir.lazy import lazy
from minifuse.ir.plan import Plan
from minifuse.passes.pressure import live_words
from minifuse.passes.schedule_triton import ROW_BLOCK, power_of_2

from .body import forward
from .chunks import SMALL_WORK, by_chunks
from .cost import Saving, saving
from .graph import Graph, TooFarError
from .group import Group, grid_axes
from .unify import Equation, Refusal, Unified, along, image, unify

MAX_BUFFERS = 28
MAX_VALUES = 600
MIN_GRID, COLUMNS_A_ROW = 32, 64
CHEAP = 24.0
# Passes over a row that are ever made.
MOST_PASSES = 8
NEAR_STEPS = 24
LONG_BYTES = 65_536
NUMBERS = 64

Facts = Mapping[str, Any]


class Candidate:
    """Two groups that might become one, the first being the earlier one in the captured graph.

    What a rule may ask: the groups `a` and `b` (their `nodes`, `reads`, `writes`, `axes`, `reduced`, `cost`), the
    `graph` (its `buffers` and their `bytes`), what fusing saves (`saving`), and `how` their loops unify.
    """

    def __init__(self, graph: Graph, a: Group, b: Group) -> None:
        self.graph, self.a, self.b = graph, a, b
        self.first, self.second, self.lost = a.version, b.version, graph.lost

    @property
    def fresh(self) -> bool:
        """Whether the two groups, and who reads what they store, are as they were."""
        return self.first == self.a.version and self.second == self.b.version and self.lost == self.graph.lost

    @lazy
    def saving(self) -> Saving:
        """Bytes and seconds that one kernel takes less than two."""
        return saving(self.graph, self.a, self.b)

    @lazy
    def cyclic(self) -> bool | None:
        """Whether a third group lies between the two; None where that took too long to find out."""
        try:
            return self.graph.cyclic(self.a, self.b)
        except TooFarError:
            return None

    @lazy
    def soft(self) -> list[Equation]:
        """What both read: how they would walk it alike."""
        found: list[Equation] = []
        b = self.b.reads
        for name, left in self.a.reads.items():
            right = b.get(name)
            if right is not None and len(left) == 1 and len(right) == 1:
                for x, y in zip(next(iter(left)), next(iter(right)), strict=True):
                    if isinstance(x, Expr) and isinstance(y, Expr):
                        found.append((x, y))
        return found

    @lazy
    def hard(self) -> list[Equation] | str:
        """Where one stores what the other reads; the name of a buffer that is read at a computed place."""
        a, b = self.a, self.b
        found: list[Equation] = []
        for name in [n for n in a.writes if n in b.reads] + [n for n in b.writes if n in a.reads]:
            ahead, behind = (a, b) if name in a.writes else (b, a)
            for index in behind.reads[name]:
                if not all(isinstance(i, Expr) for i in index):
                    return name
                for w, r in zip(ahead.writes[name], index, strict=True):
                    assert isinstance(w, Expr) and isinstance(r, Expr)
                    found.append((w, r) if ahead is a else (r, w))
        return found

    @lazy
    def how(self) -> Unified | Refusal:
        """How the loops of the two become one, or why they cannot."""
        hard = self.hard
        assert not isinstance(hard, str)
        if not hard:
            # Siblings must agree on how they walk what they share, or sharing saves nothing.
            hard = [(x, y) for x, y in self.soft if x.axes() or y.axes()]
        found = unify(hard, self.soft, self.a.axes, self.b.axes, self.a.reduced)
        if (self.a.reduced or self.b.reduced) and self.unfit(found):
            turned = along([(y, x) for x, y in hard], [(y, x) for x, y in self.soft], self.b.axes, self.a.axes)
            ways = (along(hard, self.soft, self.a.axes, self.b.axes), turned and Unified(turned.second, turned.first))
            found = next((w for w in ways if w and not self.unfit(w)), found)
        return found._replace(chunked=True) if isinstance(found, Unified) and by_chunks(self, found) else found

    def unfit(self, how: Unified | Refusal) -> bool:
        """Whether each keeps loops of its own, or a reduction would be cut in two."""
        if isinstance(how, Refusal) or how.apart(self.a.axes, self.b.axes):
            return True
        return cut(self.a, how.first) is not None or cut(self.b, how.second) is not None

    @lazy
    def unified(self) -> Unified:
        assert isinstance(self.how, Unified)
        return self.how

    @lazy
    def walk(self) -> Walk | None:
        """The loops before and after; None where these are the same, and where chunks of rows are walked: what is
        parallel is theirs."""
        a, b, how = self.a, self.b, self.unified
        alike = not how.first and not how.second and a.spaces == b.spaces and not a.ordered and not b.ordered
        return None if how.chunked or alike and len(a.spaces) == 1 else Walk.of(self)

    @lazy
    def both(self) -> tuple[tuple[Group, Mapping[Axis, Expr]], tuple[Group, Mapping[Axis, Expr]]]:
        """Each group, and its axes in terms of the merged one's."""
        return (self.a, self.unified.first), (self.b, self.unified.second)

    def extent(self, axes: Iterable[Axis]) -> int:
        """Points of a space of loops, dynamic sizes at their hints."""
        return self.graph.extent(frozenset(axes))


@dataclass(frozen=True)
class Rule:
    """A condition for fusing two groups.

    `sentence` says it to a user; `reason` is a template over the facts that `broken` gives where it does not hold
    (None where it does). `legal` rules guard meaning and are never lifted; the others guard speed and memory, and give
    way to `Force`.
    """

    name: str
    sentence: str
    reason: str
    broken: Callable[[Candidate], Facts | None]
    legal: bool = True


@dataclass(frozen=True)
class Force:
    """Fusions that a user asks for: tried first, and held to the `legal` rules alone. `names` are patterns of the nodes
    or operators of the two, for pairs that share no buffer; `matches` says whether a candidate is meant."""

    matches: Callable[[Candidate], bool]
    names: tuple[str, str] | None = None


def holds(c: Candidate, *patterns: str) -> bool:
    """Whether one of the two groups has a node or an operator that the first pattern matches, and the other one that
    the second does; one pattern alone may match in either. Patterns are those of `fnmatch`."""

    def match(g: Group, pattern: str) -> bool:
        return named(c.graph.plan, g, pattern)

    if len(patterns) == 1:
        return match(c.a, patterns[0]) or match(c.b, patterns[0])
    one, two = patterns
    return match(c.a, one) and match(c.b, two) or match(c.a, two) and match(c.b, one)


def named(plan: Plan, g: Group, pattern: str) -> bool:
    """Whether a pattern matches one of a group's nodes or of their operators."""
    return any(fnmatchcase(n, pattern) or fnmatchcase(plan.targets.get(n, ""), pattern) for n in g.nodes)


def forbid(*which: str | Callable[[Candidate], bool]) -> Rule:
    """A rule against fusions: of what a pattern matches (a node's name, or an operator's as `aten.add.*`), of what two
    patterns match with each other, or of candidates for which a function is true.

    Raises ValueError for anything else.
    """
    test, _ = _chosen(which, "forbid")
    said = " with ".join(map(str, which))
    return Rule("forbidden", f"The user forbade it: {said}.", "forbidden by the user: {which}",
                lambda c: {"which": said} if test(c) else None)  # fmt: skip


def force(*which: str | Callable[[Candidate], bool]) -> Force:
    """Fusions to make wherever they are legal: of what two patterns match, or of candidates for which a function is
    true. See `forbid`."""
    return Force(*_chosen(which, "force"))


def _chosen(which: Sequence[Any], verb: str) -> tuple[Callable[[Candidate], bool], tuple[str, str] | None]:
    if len(which) == 1 and callable(which[0]):
        return which[0], None
    least = 2 if verb == "force" else 1
    if not least <= len(which) <= 2 or not all(isinstance(w, str) for w in which):
        wanted = "two patterns" if least == 2 else "one pattern or two"
        raise ValueError(f"{verb}{tuple(which)}: expected {wanted} of nodes or operators, or a function of a candidate")
    return lambda c: holds(c, *which), (which[0], which[1]) if len(which) == 2 else None


# -- before the loops are looked at -----------------------------------------------------------------
def _cycle(c: Candidate) -> Facts | None:
    return {} if c.cyclic is True else None


def _too_far(c: Candidate) -> Facts | None:
    return {"steps": abs(c.graph.rank[c.a.id] - c.graph.rank[c.b.id]) - 1} if c.cyclic is None else None


def _buffers(c: Candidate) -> Facts | None:
    a, b = c.a, c.b
    if len(a.reads) + len(b.reads) + len(a.writes) + len(b.writes) <= MAX_BUFFERS:
        return None
    stored = {n for n in (*a.writes, *b.writes) if not c.graph.only_between(n, a, b)}
    found = len(stored.union(a.external, b.external) - ({*a.writes, *b.writes} - stored))
    return {"found": found, "limit": MAX_BUFFERS} if found > MAX_BUFFERS else None


def _values(c: Candidate) -> Facts | None:
    found = c.a.size + c.b.size
    return {"found": found, "limit": MAX_VALUES} if found > MAX_VALUES else None


def _devices(c: Candidate) -> Facts | None:
    if len(c.graph.devices) == 1:
        return None
    buffers = c.graph.buffers
    found = {buffers[n].device for g in (c.a, c.b) for names in (g.writes, g.reads) for n in names}
    return {"devices": ", ".join(sorted(map(str, found)))} if len(found) > 1 else None


def _scattered(c: Candidate) -> Facts | None:
    """What runs through rows one behind the other takes in what it alone reads, and nothing else."""
    a, b = c.a, c.b
    if not a.scattered and not b.scattered:
        return None
    if not a.scattered and b.scattered.isdisjoint(a.reads) and c.graph.dies(a, b):
        return None
    return {"name": (a if a.scattered else b).name}


def _gathered(c: Candidate) -> Facts | None:
    return {"buffer": c.hard} if isinstance(c.hard, str) else None


def _little_shared(c: Candidate) -> Facts | None:
    """Kernels that have nothing but numbers in common are better one kernel run for many tensors (`passes.batch`)."""
    if c.hard or c.saving.nbytes >= NUMBERS:
        return None
    moves = min(sum(c.graph.bytes[n] for n in (*g.external, *g.writes)) for g in (c.a, c.b))
    return {"shared_bytes": c.saving.nbytes, "moved_bytes": moves} if moves >= 4 * NUMBERS else None


# -- how the loops unify ----------------------------------------------------------------------------
def _unifies(rule: str) -> Callable[[Candidate], Facts | None]:
    def broken(c: Candidate) -> Facts | None:
        return c.how.facts if isinstance(c.how, Refusal) and c.how.rule == rule else None

    return broken


def cut(g: Group, env: Mapping[Axis, Expr]) -> Axis | None:
    """An axis that a group reduces or scans and that would be several."""
    return next((x for x, _ in g.ordered if x in env and not isinstance(env[x].atom, Axis)), None) if env else None


def _splits_reduction(c: Candidate) -> Facts | None:
    axis = next(filter(None, (cut(g, env) for g, env in c.both)), None)
    return None if axis is None else {"axis": str(axis)}


def _stored_twice(c: Candidate) -> Facts | None:
    for g, env in c.both:
        joined: dict[Axis, set[Axis]] = {}
        for x in g.axes if env else ():
            for y in env[x].axes() if x in env else ():
                joined.setdefault(y, set()).add(x)
        for name, stored in g.stored.items() if joined else ():
            if not c.graph.only_between(name, c.a, c.b):
                if any(0 < len(xs & stored.space) < len(xs) for xs in joined.values()):
                    return {"name": name}
    return None


def _trees(c: Candidate) -> set[tuple[Axis, int]]:
    return {(y, lanes) for g, env in c.both for x, lanes in g.ordered for y in image([x], env)}


def _two_orders(c: Candidate) -> Facts | None:
    return {} if (c.a.scanned or c.b.scanned) and len({x for x, _ in _trees(c)}) > 1 else None


def _different_trees(c: Candidate) -> Facts | None:
    trees = _trees(c) if c.a.ordered and c.b.ordered else set()
    return {} if len({x for x, _ in trees}) < len(trees) else None


# -- what the merged kernel is worth ------------------------------------------------------------------
def _chunked(c: Candidate) -> Facts | None:
    if c.unified.chunked or not (c.a.chunked or c.b.chunked):
        return None
    return {"name": c.a.name if c.a.chunked else c.b.name}


class Walk(NamedTuple):
    """The loops of two groups and of what they become: spaces in the merged kernel's axes (none of what runs inside
    the other alone), the axes that are parallel before and after, and the points of the largest space."""

    spaces: tuple[list[frozenset[Axis]], list[frozenset[Axis]]]
    reduced: frozenset[Axis]
    before: list[tuple[frozenset[Axis], Group, Mapping[Axis, Expr]]]
    grid: frozenset[Axis]
    work: int
    inside: bool

    @classmethod
    def of(cls, c: Candidate) -> Walk:
        (a, first), (b, second) = c.both
        spaces_a, reduced_a = [image(s, first) for s in a.spaces], image(a.reduced, first)
        spaces_b, reduced_b = [image(s, second) for s in b.spaces], image(b.reduced, second)
        inside = not a.reduced and c.graph.dies(a, b)
        if inside:
            spaces_a = []
        spaces, reduced = spaces_a + spaces_b, reduced_a | reduced_b
        parts = ((spaces_a, reduced_a, a, first), (spaces_b, reduced_b, b, second))
        before = [(grid_axes(s, r), g, env) for s, r, g, env in parts if s]
        work = max((c.extent(s) for s in dict.fromkeys(spaces)), default=1)
        return cls((spaces_a, spaces_b), reduced, before, grid_axes(spaces, reduced), work, inside)


def _parallelism(c: Candidate) -> Facts | None:
    w = c.walk
    if w is None or w.work <= SMALL_WORK or c.extent(w.grid) >= MIN_GRID * COLUMNS_A_ROW:
        return None
    along = along_memory(c)

    def rows(grid: frozenset[Axis]) -> int:
        return c.extent(grid - along) * -(-c.extent(grid & along) // COLUMNS_A_ROW)

    heavy = [rows(old) for (old, _, _), s in zip(w.before, (s for s in w.spaces if s), strict=True)
             if max(c.extent(axes) for axes in s) > SMALL_WORK]  # fmt: skip
    if not heavy:
        return None
    left, least = rows(w.grid), min(MIN_GRID, max(heavy))
    return {"left": left, "before": max(heavy)} if left < least else None


def along_memory(c: Candidate) -> frozenset[Axis]:
    """The axes of unit stride in the largest accesses of the two: vectors run along them."""
    found = ((c.graph.innermost(g), env) for g, env in c.both)
    return frozenset().union(*(image([axis], env) for axis, env in found if axis is not None))


def _unshared_loop(c: Candidate) -> Facts | None:
    w = c.walk
    if w is None or w.work <= SMALL_WORK:
        return None
    for old, g, env in w.before:
        lost = old - w.grid - w.reduced
        if lost:
            inner = c.graph.innermost(g)
            lost -= frozenset() if inner is None else image([inner], env)
        if lost:
            return {"name": g.name, "lost": ", ".join(sorted(map(str, lost)))}
    return None


def _recomputes(c: Candidate) -> Facts | None:
    w = c.walk
    if w is None or not w.inside or c.a.cost <= CHEAP or not w.spaces[1]:
        return None
    ran = image(c.a.axes, c.unified.first)
    times = w.work / max(c.extent(ran), 1)
    if times > 1 and c.graph.innermost(c.b) in ran:
        return {"name": c.a.name, "times": round(times)}
    return None


def _walked_again(c: Candidate) -> Facts | None:
    """What feeds a row that is too long to be held is computed in each pass over the row."""
    w, a, b, rate = c.walk, c.a, c.b, c.graph.device.vector
    if w is None or a.reduced or not b.reduced or MOST_PASSES * a.cost * w.work <= c.saving.seconds * rate:
        return None
    walked = image(a.axes, c.unified.first)
    if walked.isdisjoint(w.reduced) or c.graph.holds(w.reduced):
        return None
    times = b.passes()
    seconds = (times - 1) * a.cost * c.extent(walked) / rate
    return {"name": a.name, "times": times} if seconds > c.saving.seconds else None


def _spills(c: Candidate) -> Facts | None:
    """A GPU holds a row in registers from its first reduction to what is stored behind the last."""
    room, w = c.graph.device.registers, c.walk
    if not room or w is None or not w.reduced:
        return None
    blocks = {x: power_of_2(c.extent({x})) for x, lanes in _trees(c) if lanes > 1}
    row = prod(blocks.values())
    if row > ROW_BLOCK or row * (c.a.size + c.b.size) <= room:
        return None
    both = c.a.copy()
    both.join(c.b, c.unified)
    words = live_words(forward(*both.body(), c.graph.plan.mutated), blocks)
    return {"words": words, "limit": room, "row": row} if words > room else None


def lengthens(c: Candidate) -> Facts | None:
    """One kernel runs when both can and when the earlier of the two is needed: what the earlier one reads waits for the
    later one's inputs, and so does what operators that read its results would free; what the later one writes waits for
    its own readers. Bytes that wait over more than a few steps must be paid for by others that die earlier."""
    graph, both = c.graph, {c.a.id, c.b.id}
    first, last = graph.in_order(c.a, c.b)
    distance = graph.rank[last.id] - graph.rank[first.id]
    if distance > NEAR_STEPS:
        held = [n for n in first.reads if n not in last.reads and graph.readers[n] <= both and graph.mortal(n)]
        gone = sum(graph.bytes[n] for n in first.writes if graph.only_between(n, first, last))
        waits = sum(graph.bytes[n] for n in held) - gone + graph.freed_between(first, last)
        if waits >= LONG_BYTES:
            return {"waiting_bytes": waits, "steps": distance}
    needs = graph.first_use(first, last), graph.first_use(last, first)
    if needs[0] is None or needs[1] is None or abs(needs[0] - needs[1]) <= NEAR_STEPS:
        return None
    late, other = (last, first) if needs[1] > needs[0] else (first, last)
    waits = sum(graph.bytes[n] for n in late.writes if not graph.readers.get(n, set()) <= both)
    dies = sum(graph.bytes[n] for n in late.reads if graph.readers[n] <= both and n not in other.writes)
    if waits <= dies or waits < LONG_BYTES:
        return None
    return {"waiting_bytes": waits - dies, "steps": abs(needs[0] - needs[1])}


RULES: tuple[Rule, ...] = (
    Rule("too many buffers", "A kernel touches at most 28 buffers.",
         "{found} buffers, at most {limit}", _buffers, False),
    Rule("too large", "A kernel is made of at most 600 values, the loads between its operators counted.",
         "{found} values, at most {limit}", _values, False),
    Rule("devices", "A kernel runs on one device.", "on {devices}", _devices),
    Rule("cycle", "No step may lie between the two: one that needs the first and that the second needs.",
         "another step between them depends on one and feeds the other", _cycle),
    Rule("too far apart", "The steps between the two can be looked through for a cycle.",
         "{steps} steps between them may depend on one and feed the other", _too_far),
    Rule("scattered", "What stores at computed places, one behind the other, takes in only what it alone reads.",
         "{name} stores at places that are computed, one behind the other", _scattered),
    Rule("little shared", "Siblings share 64 bytes or more, or are as small as that themselves.",
         "they share {shared_bytes} of {moved_bytes}", _little_shared, False),
    Rule("gathered", "What is read at a computed place is in memory before the kernel starts.",
         "{buffer} is read at an index that is computed", _gathered),
    Rule("different rows", "Both walk what they share by the same loops.",
         "one is at {left} where the other is at {right}", _unifies("different rows")),
    Rule("partial rows", "The loops of one run over all of the other's.",
         "{images} does not run over the whole of {axes}", _unifies("partial rows")),
    Rule("splits a reduction", "A reduced or scanned axis stays one axis.",
         "{axis} is reduced and would be cut in two", _splits_reduction),
    Rule("stored twice", "Each element is stored once.", "{name} would be stored more than once", _stored_twice),
    Rule("two orders", "What scans an axis reduces and scans no other.",
         "one scans an axis, the other reduces or scans another", _two_orders),
    Rule("different trees", "One axis is reduced by one tree: along a row, or down a column.",
         "one reduces a row and the other a column along one axis", _different_trees),
    Rule("chunks", "Column sums that ride along with rows, chunk by chunk, take in what fits their chunks.",
         "{name} sums columns by chunks of rows, and could not with the other", _chunked),
    Rule("loses parallelism", "A large kernel keeps at least 32 independent rows; 64 columns are one.",
         "{left} independent rows of {before}", _parallelism, False),
    Rule("unshared loop", "A large kernel keeps its loops that can run in parallel.",
         "{name} runs over {lost}, which the other does not have", _unshared_loop, False),
    Rule("recomputes", "What costs more than 24 instructions runs once an element.",
         "{name} would run {times} times", _recomputes, False),
    Rule("walked again", "What feeds a row that is too long to be held costs less in each pass than it saves.",
         "{name} would be computed in {times} passes over a row", _walked_again, False),
    Rule("spills", "What is alive at once of a row that a GPU holds fits the registers of one multiprocessor.",
         "{words} numbers of rows of {row} would be alive at once, in {limit} registers", _spills, False),
    Rule("lengthens memory", "No fusion holds bytes over more than 24 steps that no dying input pays for.",
         "{waiting_bytes} more would wait over {steps} steps", lengthens, False),
)  # fmt: skip
