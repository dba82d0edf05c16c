"""Computing a value where it is read, at whatever index: cheap producers duplicated into their readers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from minifuse.ir.index import Axis, Expr
from minifuse.ir.kernel import Store
from minifuse.ir.value import index_axes

from .body import NotInvertible, forward
from .cost import alone, moving, taken
from .graph import Graph, Moved
from .group import Group
from .rules import CHEAP, MAX_BUFFERS, MAX_VALUES, NUMBERS, Candidate, lengthens
from .unify import Refusal

if TYPE_CHECKING:
    from .search import Search

MAX_USES = 8
# Values of a producer that a kernel with reductions takes in: it runs once a pass over the row.
MAX_IN_REDUCTION = 60


def constants(search: Search) -> list[int]:
    """Kernels that read nothing are computed where they are used. Gives those that also store it, where it is small."""
    graph, stored = search.graph, list[int]()
    for g in list(graph.groups.values()):
        if g.fixed or g.reads or g.checks or not g.pure or g.cost > CHEAP:
            continue
        readers = {r: None for name in g.writes for r in sorted(graph.readers.get(name, ()))}
        for reader in [graph.groups[r] for r in readers]:
            if search.empty:
                return stored
            if not stands_alone(search, g, reader) and refusal(search, g, reader) is None:
                into(search, g, reader, "it reads nothing: computed where it is read")
        if not graph.bury(g) and sum(graph.bytes[n] for n in g.writes) < NUMBERS:
            stored.append(g.id)
    return stored


def ride(search: Search, stored: Sequence[int]) -> None:
    """Numbers that are stored for somebody else are stored by one of the kernels that computed them for itself."""
    graph = search.graph
    for i in stored:
        g = graph.groups.get(i)
        if g is None or g.version:
            continue
        users = (r for r in graph.groups.values() if r is not g and not r.fixed and g.nodes[0] in r.nodes)
        for user in itertools.islice(users, MAX_USES):
            c = Candidate(graph, *sorted((g, user), key=lambda x: x.first))
            if not search.empty and search.verdict(c, search.rules) is None:
                search.accept(c, "a number that is stored rides along")
                break


def stands_alone(search: Search, g: Group, reader: Group) -> bool:
    """Whether a reader of what reads nothing would read nothing either, and is stored: it is better one kernel with its
    like, which it would share no buffer with."""
    graph = search.graph
    stored = any(n in graph.kept or any(graph.groups[r].fixed for r in graph.readers.get(n, ())) for n in reader.writes)
    return stored and reader.reads.keys() <= g.writes.keys()


def picks(reader: Group, name: str) -> bool:
    """Whether a group reads a buffer at a computed index."""
    return any(not isinstance(i, Expr) for at in reader.reads.get(name, ()) for i in at)


def gathered(search: Search) -> None:
    """What a kernel picks elements of by a computed index is computed at those elements alone."""
    graph = search.graph
    for reader in list(graph.groups.values()):
        again = not reader.fixed
        while again:
            again = False
            for name, places in list(reader.reads.items()):
                maker = graph.groups.get(graph.writer.get(name, -1))
                if maker is None or maker.fixed or not maker.pure or maker.checks or name in search.plan.mutated:
                    continue
                if graph.overwritten(maker) or not picks(reader, name):
                    continue
                axes = [
                    frozenset(a for i in at for a in (i.axes() if isinstance(i, Expr) else i.axes)) for at in places
                ]
                picked = sum(map(graph.extent, axes))
                small = picked * max(len(maker.reads), 1) * 4 < graph.bytes[name]
                if small and reader.size + maker.size <= MAX_VALUES and not search.empty:
                    again = gather(search, maker, reader) or again


def gather(search: Search, maker: Group, reader: Group) -> bool:
    if search.forbids(maker, reader) is not None:
        return False
    try:
        into(search, maker, reader, "computed at the elements that are picked, not stored")
    except NotInvertible:
        return False
    search.graph.bury(maker)
    return True


def refusal(search: Search, a: Group, reader: Group) -> Refusal | None:
    """Why a's values cannot be computed at the places where a group reads them; None where they can."""
    graph = search.graph
    if (forbidden := search.forbids(a, reader)) is not None:
        return forbidden
    names = [n for n in a.writes if n in reader.reads]
    if not names or a.fixed or reader.fixed:
        return Refusal("inline", "{name} reads nothing that {maker} stores", {"name": reader.name, "maker": a.name})
    if not a.pure or a.checks or graph.overwritten(a) or not graph.plan.mutated.isdisjoint(a.writes):
        return Refusal("inline", "{maker} reduces, checks, or touches what is overwritten", {"maker": a.name})
    if any(picks(reader, n) for n in names):
        return Refusal("gathered", "{buffer} is read at an index that is computed", {"buffer": names[0]})
    if any(isinstance(i, Expr) and not isinstance(i.atom, Axis) and not i.is_const for n in names for i in a.writes[n]):
        return Refusal("inline", "{maker} stores at places that are no plain axes", {"maker": a.name})
    return None


def obey(search: Search, a: Group, reader: Group) -> None:
    """What a log says: a's values are computed where the reader loads them."""
    refused = refusal(search, a, reader)
    if refused is not None and refused.rule != "gathered":
        search.ctx.decisions.append(search.decision(refused.rule, a, reader, False, refused.reason, refused.facts))
        return
    try:
        into(search, a, reader, "computed where it is read, as the log says")
    except NotInvertible as why:
        search.ctx.decisions.append(search.decision("inline", a, reader, False, "{why}", {"why": str(why)}))
        return
    search.graph.bury(a)


def duplicate(search: Search, a: Group, b: Group) -> bool:
    """Compute a's values where b loads them, at whatever index; a stays for its other readers.

    Pays when all of a's readers are kernels, a is cheap, and what they would read moves fewer bytes than storing a's
    result and reading it back.
    """
    graph = search.graph
    if not a.pure or len(a.writes) != 1:
        return False
    (name,) = a.writes
    if name in graph.kept or name not in b.reads or len(graph.readers[name]) > MAX_USES:
        return False
    readers = [graph.groups[r] for r in sorted(graph.readers[name] - {a.id})]
    uses = sum(len(r.reads.get(name, ())) for r in readers)
    if a.cost * uses > CHEAP and uses > 1 or uses > MAX_USES or any(r.fixed for r in readers):
        return False
    if any(r.size + a.size > MAX_VALUES or r.reduced and a.size > MAX_IN_REDUCTION for r in readers):
        return False
    if any(len({*a.reads, *r.reads, *r.writes} - {name}) > MAX_BUFFERS for r in readers):
        return False
    if len(readers) == 1 and lengthens(Candidate(graph, a, b)) is not None:
        return False
    before = graph.bytes[name] + sum(graph.moved(name, r.reads[name]).nbytes for r in readers)
    before += sum(graph.moved(n, at).nbytes for n, at in a.reads.items())
    after = sum(more(graph, a, r, name).nbytes for r in readers)
    if after >= before or any(refusal(search, a, r) is not None for r in readers) or slower(graph, a, readers, name):
        return False
    for reader in readers:
        if search.empty:
            break
        into(search, a, reader, "computed where it is read, saves {saved_bytes} over all readers", before - after)
        search.rewritten(reader)
    graph.bury(a)
    return True


def slower(graph: Graph, a: Group, readers: list[Group], name: str) -> bool:
    """Whether kernels that compute a's values themselves, once at each point that reads them, take longer than now."""
    now = alone(graph, a)
    then = 0.0
    for r in readers:
        now += alone(graph, r)
        memory = moving(graph, r) + more(graph, a, r, name).seconds - graph.moved(name, r.reads[name]).seconds
        times = sum(runs(graph, a, r, index_axes(at)) for at in r.reads[name])
        then += taken(graph, memory, r.instructions + a.cost * times)
    return then > now


def runs(graph: Graph, a: Group, reader: Group, axes: frozenset[Axis]) -> int:
    """How often a group computes, in all, a's value over these axes: in each pass over a row that is too long to be
    held and, if it is not cheap, at each point of loops whose vectors run along one of them."""
    space = axes
    if a.cost > CHEAP and graph.innermost(reader) in axes:
        space = max((s for s in reader.spaces if axes <= s), key=graph.extent, default=axes)
    long = not axes.isdisjoint(reader.reduced) and not graph.holds(reader.reduced)
    return graph.extent(space) * (reader.passes() if long else 1)


def points(graph: Graph, reader: Group, name: str) -> int:
    """How many elements of a buffer a group reads, one at each point of each place."""
    return sum(graph.extent(index_axes(index)) for index in reader.reads[name])


def more(graph: Graph, a: Group, reader: Group, name: str) -> Moved:
    """What a reader of `name` moves besides to compute it itself: its share of what a reads."""
    share = min(points(graph, reader, name) / max(graph.extent(a.stored[name].space), 1), 1.0)
    each = [graph.moved(n, at) for n, at in a.reads.items() if n not in reader.reads]
    return Moved(int(share * sum(m.nbytes for m in each)), share * sum(m.seconds for m in each))


def into(search: Search, a: Group, reader: Group, reason: str, saved: int | None = None) -> None:
    """Replace a reader's loads of what a stores by its values.

    Raises NotInvertible, with nothing changed.
    """
    graph = search.graph
    stores = {r.param: r for r in forward(*a.body()) if isinstance(r, Store) and r.param in reader.reads}
    reader.replace_loads(stores)
    facts = {} if saved is None else {"saved_bytes": saved}
    search.ctx.decisions.append(search.decision("inline", a, reader, True, reason, facts))
    search.spend()
    graph.lost += 1
    for name in stores:
        graph.readers[name].discard(reader.id)
    for n in a.reads:
        if n not in a.writes:
            graph.readers[n].add(reader.id)
            if n in graph.writer:
                graph.edge(graph.writer[n], reader.id)
    reader.nodes = (*a.nodes, *(n for n in reader.nodes if n not in a.nodes))
    reader.copies = True
    reader.version += 1
