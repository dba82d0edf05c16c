"""A rematerialisation policy of one's own beside those that ship: what is saved, and gradients equal bit for bit.

python -m examples.custom_remat_policy [--layers 4] [--batch 64]
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import minifuse
from minifuse.remat import Problem, RematPlan, RematPolicy, Value, assemble


@dataclass(frozen=True)
class KeepProducts:
    """Save what matrix products and other library calls made, and what may run only once; recompute the rest.

    The rule of "Reducing Activation Recomputation in Large Transformer Models" (Korthikanti et al., 2022) turned to
    pointwise code: recompute what is cheap to compute and large to keep.
    """

    name: str = "keep_products"

    def plan(self, problem: Problem) -> RematPlan:
        saved = [v.name for v in problem.values if v.savable and v.phase == "forward" and self.keeps(problem, v)]
        return assemble(problem, saved, self.name)

    def keeps(self, problem: Problem, v: Value) -> bool:
        while v.kind == "item":  # a result of an operator that has several
            v = problem[v.inputs[0]]
        return v.kind == "extern" or v.pinned is not None


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(width), nn.Dropout(0.1)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(nn.functional.gelu(self.up(self.norm(x)))))


def gradients(model: nn.Module, x: Tensor, backend: str, policy: str | RematPolicy) -> list[Tensor]:
    """The gradients of one step under a policy; dropout draws the same numbers each time."""
    torch._dynamo.reset()
    torch.manual_seed(1)
    model.zero_grad()
    options: dict[str, Any] = {"remat": policy} if backend == "minifuse" else {}
    torch.compile(model, backend=backend, options=options)(x).square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="minifuse", help="another backend has no policies: its own are shown")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()

    torch.manual_seed(0)
    model, x = nn.Sequential(*(Block(128) for _ in range(options.layers))), torch.randn(options.batch, 128)
    print(f"{options.backend}, {options.layers} blocks, {options.batch} rows")
    print(f"{'policy':14} {'saved':>10} {'peak':>10} {'recomputed':>11} {'costs':>10}   gradients")
    first: list[Tensor] = []
    for policy in ("save_all", "priced_mincut", KeepProducts(), "recompute_all"):
        found = gradients(model, x, options.backend, policy)
        first = first or found
        equal = all(torch.equal(a, b) for a, b in zip(first, found))
        remat = minifuse.reports()[-1].remat if options.backend == "minifuse" else None
        if remat is not None:
            print(
                f"{remat.policy:14} {remat.saved_bytes / 1e6:7.2f} MB {remat.peak_bytes / 1e6:7.2f} MB "
                f"{len(remat.recomputed):11} {1e6 * remat.extra_seconds:7.1f} us   "
                f"{'equal bit for bit' if equal else 'DIFFERENT'}"
            )


if __name__ == "__main__":
    main()
