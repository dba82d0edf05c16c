"""Dynamic tensor rematerialisation, run ahead on the schedule."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from examples.remat_policies.schedule import Schedule, Storage, limits, searched
from minifuse.remat import Problem, RematPlan

# A walk that spends so many steps' seconds on computing again is thrashing: it counts as out of memory.
_THRASHING = 8


@dataclass(frozen=True)
class DTRGreedy:
    """Out of memory, evict what is cheap, large and long unused; what the backward finds evicted is recomputed.

    Marisa Kirisame and others, "Dynamic Tensor Rematerialization", ICLR 2021: no plan is made there; an allocation that
    does not fit evicts the tensor of the least h = c / (m s), with c its cost and that of its evicted neighbourhood
    (h_DTR_eq: connected parts in a union-find, which one that is computed again leaves only by its cost), m its bytes
    and s the seconds since it was read; a tensor that is needed again is computed again, and what it needs before it.
    Here that runs ahead of time, through the forward and then the backward. An n-layer chain is trained so in
    O(sqrt(n)) memory with O(n) operators (theorem 3.1).

    A plan computes a value again at most once and keeps it until its last reader, where a run of DTR may evict it any
    number of times. So the walk is made at `tried` limits, and both what is evicted as the backward begins and what is
    as it is first read there are plans; `within` chooses. Without a budget nothing is evicted.
    """

    tried: int = 24
    name: str = field(default="dtr_greedy", init=False)

    def plan(self, problem: Problem) -> RematPlan:
        return searched(problem, self.name, lambda s, limit: self.candidates(s))

    def candidates(self, s: Schedule) -> Iterator[RematPlan]:
        """The plans of a walk at each limit, from the peak without evictions down to where it runs out of memory."""
        seen: set[frozenset[str]] = set()
        for limit in limits(s.everything.peak_bytes, s.everything.peak_bytes / 8, self.tried):
            walk = Walk(s, limit)
            found = [again for again in walk.run() if again not in seen]
            seen.update(found)
            yield from (s.plan(self.name, again) for again in found)
            if not found and walk.is_out:
                return


class Walk:
    """A step under a limit of memory: what is resident, what was evicted, and the clock, in seconds."""

    def __init__(self, s: Schedule, limit: float) -> None:
        self.s, self.limit = s, limit
        self.resident: dict[str, float] = {}  # when each was read last
        self.held = 0
        self.clock = self.spent = 0.0
        self.parent: dict[str, str] = {}
        self.cost: dict[str, float] = {}  # of the connected parts of what is evicted
        self.uses = {v.name: len(v.uses) for v in s.storages.values()}
        self.is_out = False

    def run(self) -> Iterator[frozenset[str]]:
        """What is evicted as the backward begins, and what is as it is first read there; ends out of memory."""
        s = self.s
        again: set[str] = set()
        made: dict[int, list[Storage]] = {}
        last: dict[int, list[Storage]] = {}
        read: dict[int, list[Storage]] = {}
        for v in s.storages.values():
            made.setdefault(v.made, []).append(v)
            last.setdefault(v.last, []).append(v)
            for step in v.uses:
                read.setdefault(step, []).append(v)
        for step, seconds in enumerate(s.seconds):
            new, needed = made.get(step, []), read.get(step, [])
            if step < s.forward:
                needed = [s.storages[i] for v in new for i in v.inputs if s.storages[i].made < step]
            if step == s.forward:
                yield frozenset(v.name for v in s.movable if v.name not in self.resident)
            locked = {v.name for v in (*needed, *new)}
            for v in needed:
                self.bring(v, step, locked, again)
            for v in new:
                self.admit(v, step, locked)
            if self.is_out:
                return
            self.clock += seconds
            for v in needed:
                self.uses[v.name] -= step >= s.forward
            for v in (*needed, *last.get(step, ())):
                if v.name in self.resident and self.is_dead(v, step):
                    self.evict(v)
        yield frozenset(again)

    def is_dead(self, v: Storage, step: int) -> bool:
        """Whether nothing reads it any more but what may be computed again."""
        return v.last <= step and not self.uses[v.name] and not v.fixed

    def bring(self, v: Storage, step: int, locked: Collection[str], again: set[str]) -> None:
        """Read it, computing it and what it needs again where they were evicted."""
        order, stack = [], [v.name]
        while stack:
            n = stack.pop()
            if n in self.resident:
                self.resident[n] = self.clock
            elif n not in order:
                order.append(n)
                stack.extend(self.s.storages[n].inputs)
        for name in sorted(order, key=lambda n: self.s.storages[n].made):
            u = self.s.storages[name]
            self.spent += u.seconds
            self.clock += u.seconds
            if step >= self.s.forward:
                again.add(name)
            self.admit(u, step, locked)
            root = self.find(name)
            self.cost[root] = self.cost.get(root, 0.0) - u.seconds
            self.parent.pop(name, None)
        for name in order:
            if name not in locked and name in self.resident and self.is_dead(self.s.storages[name], step):
                self.evict(self.s.storages[name])

    def admit(self, v: Storage, step: int, locked: Collection[str]) -> None:
        self.make_room(v.nbytes, step, locked)
        self.resident[v.name] = self.clock
        self.held += v.nbytes

    def make_room(self, nbytes: int, step: int, locked: Collection[str]) -> None:
        """Evict until so many bytes fit beside what the step holds, or nothing is left that may go."""
        while self.held + nbytes + self.s.others[step] > self.limit:
            found = [self.s.storages[n] for n in self.resident if n not in locked]
            found = [v for v in found if not v.fixed and v.nbytes]
            self.is_out = not found or self.spent > _THRASHING * sum(self.s.seconds)
            if self.is_out:
                return
            self.evict(min(found, key=self.h))

    def h(self, v: Storage) -> float:
        near = {self.find(n) for n in (*v.inputs, *self.s.readers[v.name]) if n in self.parent}
        cost = v.seconds + sum(self.cost[r] for r in near)
        return cost / (v.nbytes * (self.clock - self.resident[v.name] + 1e-9))

    def evict(self, v: Storage) -> None:
        del self.resident[v.name]
        self.held -= v.nbytes
        self.parent[v.name], self.cost[v.name] = v.name, v.seconds
        for n in (*v.inputs, *self.s.readers[v.name]):
            if n in self.parent and (a := self.find(n)) != (b := self.find(v.name)):
                self.parent[a] = b
                self.cost[b] += self.cost[a]

    def find(self, name: str) -> str:
        while self.parent.get(name, name) != name:
            name = self.parent[name]
        return name
