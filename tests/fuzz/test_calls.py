"""Some dozens of random programs as callers see them; `python -m tests.fuzz --calls` runs thousands."""

from __future__ import annotations

import pytest
import torch

from minifuse.passes.lower import graph

from .calls import BATCH, Call, check, generate, shrink

FIRST = 100_000


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("batch", range(4))
def test_compiled_functions_look_like_eagers_to_their_callers(batch: int) -> None:
    begin = FIRST + batch * BATCH
    failures = check(generate(seed) for seed in range(begin, begin + BATCH))
    assert not failures, "\n".join(str(shrink(f)) if k == 0 else f"seed {f.seed}" for k, f in enumerate(failures))


def test_a_seed_always_makes_the_same_call() -> None:
    assert generate(7) == generate(7)


def test_a_call_that_goes_wrong_is_found_and_shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(graph.ROWS, torch.ops.aten.neg.default, graph.ROWS[torch.ops.aten.abs.default])
    call = Call(
        0,
        ("s0 = grid(0, (4, 6), torch.float32)", "s1 = s0", "a0 = s0[1:]"),
        ("a0",),
        ("v0 = a0 + 1", "a0.mul_(2)", "v2 = v0.t()", "v3 = -a0", "v4 = v3 * 2"),
        "(v4, v2)",
    )
    (failure,) = check([call])
    assert failure.kind.startswith("values of an output")
    assert shrink(failure).call.body == ("v3 = -a0", "v4 = v3 * 2")
