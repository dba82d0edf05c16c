"""Column sums that ride along with what walks the same data row by row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .unify import Unified, image

if TYPE_CHECKING:
    from .rules import Candidate

# Points of a kernel below which its loops do not matter, and columns whose sums a chunk of rows can hold.
SMALL_WORK, MAX_COLUMNS = 16_384, 32_768


def by_chunks(c: Candidate, how: Unified) -> bool:
    """Whether column sums ride along with what walks the same data row by row: a launch over chunks of rows does
    both, and one behind it joins the chunks' sums (`passes.split`)."""
    a, b = c.a, c.b
    if not (a.splits and b.splits and (a.folds or b.folds)):
        return False
    parts = ((a, b, how.first), (b, a, how.second))
    trees = {(y, lanes) for g, _, env in parts for x, lanes in g.ordered for y in image([x], env)}
    columns = {x for x, lanes in trees if lanes == 1}
    if len(columns) != 1 or any(x in columns for x, lanes in trees if lanes > 1):
        return False
    (over,) = columns
    if c.extent({over}) < c.graph.least_rows:
        return False
    work = 0
    for g, other, env in parts:
        late = not other.summed.isdisjoint(g.reads)
        roots = [(s.space, n in g.summed) for n, s in g.stored.items()]
        for space, summed in [*roots, *((s, False) for s in (*g.checks, *g.begun))]:
            walked = image(space, env)
            work = max(work, c.extent(walked))
            if (over in walked) == (late or summed):
                return False
        for f in g.folds:
            walked = image(f.space, env)
            work = max(work, c.extent(walked))
            if late or over not in walked or f.lanes == 1 and c.extent(walked - {over}) > MAX_COLUMNS:
                return False
    return work > SMALL_WORK
