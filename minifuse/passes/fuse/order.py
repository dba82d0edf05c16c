"""The order of steps: that of the captured graph, but for steps that free memory, which run as soon as they can."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Mapping
from typing import Protocol

WORTH_BYTES = 65_536


class Step(Protocol):
    """What runs as one: its place in the captured graph, and what it depends on and what depends on it."""

    @property
    def last(self) -> int: ...

    @property
    def preds(self) -> Collection[int]: ...

    @property
    def succs(self) -> Collection[int]: ...


def order(
    groups: Mapping[int, Step],
    reads: Mapping[int, Collection[str]],
    writes: Mapping[int, Collection[str]],
    nbytes: Mapping[str, int],
    dies: Callable[[str], bool],
) -> list[int]:
    """Groups in dependency order. List scheduling with the bytes a step allocates less those that it frees as its
    priority, where it frees more by `WORTH_BYTES`; the place in the captured graph otherwise, or that of the first to
    wait for it where fusion put something early into something late.

    A gradient of a weight, say, is the last reader of a saved activation: computed before the gradient of the layer's
    input, it makes room for that. `dies` says of a buffer whether its memory is free once its last reader has run.
    """
    readers: dict[str, set[int]] = {}
    for i, names in reads.items():
        for name in names:
            if dies(name):
                readers.setdefault(name, set()).add(i)

    def net(i: int) -> int:
        freed = sum(nbytes[n] for n in reads[i] if len(readers.get(n, ())) == 1)
        return sum(nbytes[n] for n in writes[i]) - freed

    place = wanted(groups)
    waiting = {i: len(g.preds) for i, g in groups.items()}
    ready: list[tuple[int, int]] = []
    freeing: list[tuple[int, int, int]] = []
    out: dict[int, None] = {}

    def consider(i: int) -> None:
        if waiting[i] == 0 and i not in out and (n := net(i)) < -WORTH_BYTES:
            heapq.heappush(freeing, (n, place[i], i))

    def admit(i: int) -> None:
        heapq.heappush(ready, (place[i], i))
        consider(i)

    for i, left in waiting.items():
        if left == 0:
            admit(i)
    while ready:
        i = heapq.heappop(freeing)[-1] if freeing else heapq.heappop(ready)[-1]
        if i in out:
            continue
        out[i] = None
        for name in reads[i]:
            left_readers = readers.get(name, set())
            left_readers.discard(i)
            if len(left_readers) == 1:
                consider(*left_readers)
        for s in groups[i].succs:
            waiting[s] -= 1
            if waiting[s] == 0:
                admit(s)
    if len(out) != len(groups):
        raise AssertionError("fusion made a cycle")
    return list(out)


def wanted(groups: Mapping[int, Step]) -> dict[int, int]:
    """The place of each group, no later than that of any group that depends on it."""
    place = {i: g.last for i, g in groups.items()}
    left = {i: len(g.succs) for i, g in groups.items()}
    stack = [i for i, n in left.items() if not n]
    while stack:
        i = stack.pop()
        for p in groups[i].preds:
            place[p] = min(place[p], place[i])
            left[p] -= 1
            if not left[p]:
                stack.append(p)
    return place
