"""What recomputation costs in the kernels that run: no store of a value that a kernel can compute itself."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

import minifuse
from minifuse.ir.plan import launch_traffic
from minifuse.passes.memory import peak


class Block(nn.Module):
    """A norm of channels, SiLU and a convolution: the gradient of the weight reads what the other kernels do too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(4, 16), nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(nn.functional.silu(self.norm(x)))


@pytest.mark.parametrize("policy", ["mincut", "recompute_all"])
def test_a_recomputed_value_is_computed_in_each_kernel_that_reads_it(policy: str, monkeypatch: pytest.MonkeyPatch):
    model, x = nn.Sequential(*(Block() for _ in range(3))), torch.randn(4, 16, 32, 32)

    def backward() -> tuple[int, int, int]:
        found = minifuse.capture(model, x, compile_options={"remat": policy, "device_model": "cpu"})
        assert found.remat is not None
        plan = found.plans["backward"]
        moved = sum(launch_traffic(plan, s).total for s in plan.launches)
        return peak(plan)[0], moved, found.remat.timeline.backward_peak

    held, moved, predicted = backward()
    assert held == pytest.approx(predicted, rel=0.15)
    monkeypatch.setattr(sys.modules["minifuse.passes.remat.partition"], "spread", lambda *_: None)
    stored = backward()
    assert held <= stored[0] and (moved < stored[1] or policy == "recompute_all")
