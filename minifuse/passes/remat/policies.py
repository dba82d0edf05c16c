"""The policies by name."""

from __future__ import annotations

from minifuse.errors import RematError

from .baselines import RecomputeAll, SaveAll
from .mincut import MinCut
from .plan import RematPolicy

POLICIES: dict[str, RematPolicy] = {p.name: p for p in (MinCut(), SaveAll(), RecomputeAll())}


def resolve(policy: str | RematPolicy) -> RematPolicy:
    """A policy from its name, or itself. Raises RematError that lists the names."""
    if not isinstance(policy, str):
        if callable(getattr(policy, "plan", None)) and isinstance(getattr(policy, "name", None), str):
            return policy
        raise RematError(f"a rematerialisation policy has a `name` and a `plan(problem)`, found {policy!r}")
    if policy not in POLICIES:
        raise RematError(f"no rematerialisation policy {policy!r}; policies: {', '.join(POLICIES)}")
    return POLICIES[policy]
