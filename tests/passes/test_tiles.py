"""Kernels whose outermost rows are the same run tile by tile; no bit depends on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minifuse.ir.device import CPU
from minifuse.ir.plan import Free, Launch, Plan
from minifuse.ir.text import print_plan
from minifuse.ir.verify import VerificationError, verify_plan
from minifuse.passes import tiles
from tests.judge import compiled, records

NEAR = int(CPU.levels[0].nbytes)


def pooled(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """A sum and its halves by pooling, which walks other loops."""
    z = x * y
    return z, F.avg_pool2d(z.sigmoid() + z, 2)


def turned(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """What is written turned, and the product of its rows' halves."""
    z = (x * y).flatten(0, -3).transpose(1, 2).contiguous()
    gate, value = z.chunk(2, -1)
    return z, F.silu(gate) * value


def regions(plan: Plan) -> list[set[str]]:
    found: dict[Any, set[str]] = {}
    for s in plan.launches:
        if s.region is not None:
            found.setdefault(s.region, set()).add(s.name)
    return list(found.values())


def results(fn: Callable[..., Any], *args: Tensor) -> tuple[list[Tensor], Plan]:
    out = compiled(fn)(*args)
    return list(out), records()[0].stages["memory"]


@pytest.mark.parametrize("fn", [pooled, turned])
def test_tiles_change_no_bit_whatever_the_threads(fn: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(4, 1, 1024, 512), torch.randn(4, 1, 1024, 512)
    tiled, plan = results(fn, x, y)
    assert regions(plan), print_plan(plan)
    assert "mf_share_tiles" in records()[0].stages["unit"].source
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            again, _ = results(fn, x, y)
            assert all(map(torch.equal, tiled, again))
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(tiles, "MOST_TILES", 0)
    apart, plan = results(fn, x, y)
    assert not regions(plan)
    assert all(map(torch.equal, tiled, apart))
    for mine, eager in zip(tiled, fn(x, y), strict=True):
        torch.testing.assert_close(mine, eager)


def test_a_region_says_how_many_tiles_and_what_they_keep() -> None:
    x = torch.randn(16, 8, 64, 64)
    compiled(pooled)(x, x)
    (decision,) = (d for d in records()[0].decisions if d.rule == "region")
    assert decision.taken and decision.facts["kept"] >= x.nbytes
    assert decision.facts["whole"] / decision.facts["tiles"] * CPU.units <= NEAR
    assert f"of {decision.facts['tiles']} tiles" in print_plan(records()[0].stages["memory"])


def test_the_verifier_sees_a_region_that_is_torn_or_cannot_be_cut() -> None:
    x = torch.randn(16, 8, 64, 64)
    _, plan = results(pooled, x, x)
    first = next(k for k, s in enumerate(plan.steps) if isinstance(s, Launch) and s.region)
    torn = (*plan.steps[: first + 1], Free(()), *plan.steps[first + 1 :])
    verify_plan(plan)
    with pytest.raises(VerificationError, match="stands between the launches of region"):
        verify_plan(replace(plan, steps=torn))
    odd = tuple(replace(s, region=replace(s.region, tiles=7)) if isinstance(s, Launch) and s.region else s
                for s in plan.steps)  # fmt: skip
    with pytest.raises(VerificationError, match="is not 7 equal tiles"):
        verify_plan(replace(plan, steps=odd))


def refusal(fn: Callable[..., Any], *args: Tensor) -> str:
    compiled(fn)(*args)
    found = [d for d in records()[0].decisions if d.rule == "region"]
    assert found and not any(d.taken for d in found)
    assert not regions(records()[0].stages["memory"])
    return found[0].words


def test_what_fits_into_the_cache_stays_apart() -> None:
    x = torch.randn(4, 2, 32, 32)
    assert "stay in the nearest cache anyway" in refusal(pooled, x, x)


def test_a_tile_that_is_too_large_stays_apart() -> None:
    x = torch.randn(1, 8192, 512)
    assert "the least tiles" in refusal(turned, x, x)


def test_rows_that_reach_into_other_tiles_stay_apart() -> None:
    def halo(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = (x * y).sin()
        return z, F.avg_pool2d(z, 3, stride=1)

    x = torch.randn(1, 1, 1024, 1024)
    assert "no part of" in refusal(halo, x, x)


def test_memory_of_a_region_is_not_given_to_another_of_its_launches() -> None:
    """Small buffers share the arena: what dies in a region's first launch is read by its second tile's."""

    def fn(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        small = x.mean((1, 2, 3), keepdim=True).exp()
        z = x * small
        less = F.avg_pool2d(z.sigmoid(), 2).mean((1, 2, 3), keepdim=True)
        return F.avg_pool2d(z * y, 2) * less, z

    x, y = torch.randn(16, 8, 64, 64), torch.randn(16, 8, 64, 64)
    out, _ = results(fn, x, y)
    for mine, eager in zip(out, fn(x, y), strict=True):
        torch.testing.assert_close(mine, eager)


def test_sizes_that_are_known_at_the_call_stay_apart() -> None:
    x = torch.randn(16, 8, 64, 64)
    out = compiled(pooled, dynamic=True)(x, x)
    assert not regions(records()[0].stages["memory"])
    for mine, eager in zip(out, pooled(x, x), strict=True):
        torch.testing.assert_close(mine, eager)
