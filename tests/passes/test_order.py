"""The order that fused kernels run in."""

from __future__ import annotations

from minifuse.passes.fuse.group import Group
from minifuse.passes.fuse.order import WORTH_BYTES, order


def groups(*edges: tuple[int, int], last: dict[int, int]) -> dict[int, Group]:
    made = {i: Group(i, f"k{i}", (f"n{i}",), at, at, lambda axes: 1) for i, at in last.items()}
    for a, b in edges:
        made[a].succs.add(b)
        made[b].preds.add(a)
    return made


def run(made: dict[int, Group], reads: dict[int, list[str]] | None = None, **nbytes: int) -> list[int]:
    writes = {i: [f"b{i}"] for i in made}
    sizes = {f"b{i}": 1 for i in made} | nbytes
    return order(made, {i: (reads or {}).get(i, []) for i in made}, writes, sizes, lambda name: True)


def test_groups_run_in_the_order_of_the_captured_graph() -> None:
    assert run(groups((0, 2), (1, 2), last={2: 5, 0: 1, 1: 3})) == [0, 1, 2]


def test_what_an_early_group_waits_for_runs_early_however_late_its_own_place_is() -> None:
    """Fusion put an operator that 1 reads into 4: without it everything up to 4 would be kept for later."""
    made = groups((0, 1), (4, 1), (0, 2), (2, 3), last={0: 0, 1: 1, 2: 2, 3: 3, 4: 90})
    assert run(made) == [0, 4, 1, 2, 3]


def test_a_group_that_frees_memory_runs_as_soon_as_it_can() -> None:
    made = groups((0, 1), (0, 2), (2, 3), last={0: 0, 1: 1, 2: 2, 3: 3})
    assert run(made, {2: ["b0"], 1: ["x"]}, b0=2 * WORTH_BYTES, x=1) == [0, 2, 1, 3]
