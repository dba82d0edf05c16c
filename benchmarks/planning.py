"""Seconds to plan a joint graph: a transformer of 100 layers, 13,687 values with its backward.

    python -m benchmarks.planning [--quick] [--json FILE] [--check]

The model is captured on tensors without data (`capture`, once) and priced as on an A100. `save_all` is one simulation
of a step, `default` and `at half` are the default policy without a budget and at half of eager's peak, `divide` is the
network of the priced minimum cut built and cut, `cut` the cut alone, `networkx` that library's `minimum_cut` of the
same network. Medians of interleaved rounds; networkx runs once.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import networkx as nx
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import minifuse
from minifuse.passes.remat import mincut, priced
from minifuse.remat import Problem, resolve

from . import harness
from .harness import Board, Column, Target

LAYERS = (10, 100)
WIDTH, HEADS = 256, 4
Network = tuple[int, list[tuple[int, int, float]], int, int]


class Layer(nn.Module):
    """RMS norms, causal attention by one operator, a ReLU between two products, residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))
        sizes = ((WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH))
        self.enter, self.leave, self.up, self.down = (nn.Linear(*size, bias=False) for size in sizes)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        split = self.enter(self.norms[0](x)).view(batch, length, 3, HEADS, WIDTH // HEADS)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.leave(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.down(F.relu(self.up(self.norms[1](x))))


def problem_of(layers: int) -> Problem:
    """The problem of a training step of so many layers."""
    model = nn.Sequential(*(Layer() for _ in range(layers)))
    options = {"device_model": "A100", "remat": "save_all"}
    found = minifuse.capture(model, torch.empty(8, 128, WIDTH), compile_options=options).problem
    assert found is not None
    return replace(found, on_budget="best")


def asked(problem: Problem) -> tuple[Any, Network]:
    """What the default policy without a budget hands to `divide`, and that to `minimum_cut`."""
    with (
        mock.patch.object(priced, "divide", wraps=mincut.divide) as divide,
        mock.patch.object(mincut, "minimum_cut", wraps=mincut.minimum_cut) as cut,
    ):
        resolve("default").plan(problem)
    return divide.call_args.args, cut.call_args.args


def by_networkx(network: Network) -> float:
    """The weight of the minimum cut; an edge without a capacity is infinite there."""
    _, edges, source, sink = network
    graph = nx.DiGraph()
    for u, v, capacity in edges:
        known = graph.get_edge_data(u, v, {"capacity": 0.0})
        if capacity == mincut.INFINITE or "capacity" not in known:
            graph.add_edge(u, v)
            graph[u][v].pop("capacity", None)
        elif capacity > 0:
            graph.add_edge(u, v, capacity=known["capacity"] + capacity)
    weight, _ = nx.minimum_cut(graph, source, sink)
    return float(weight)


def board() -> Board:
    return Board(
        "Seconds to plan a joint graph",
        [
            Column("values"),
            Column("capture", harness.seconds),
            Column("save_all", harness.seconds),
            Column("default", harness.seconds, Target("<=", 2.0)),
            Column("at half", harness.seconds, Target("<=", 2.0)),
            Column("divide", harness.seconds),
            Column("cut", harness.seconds, Target("<=", 0.01)),
            Column("networkx", harness.seconds),
            Column("of networkx ratio", lambda value: f"{value:.4f}x"),
        ],
    )


def measure(table: Board, layers: int, rounds: int) -> None:
    """Add the row of a model of so many layers; each plan is of a problem without what an earlier one looked up."""
    began = time.perf_counter()
    problem = problem_of(layers)
    captured = time.perf_counter() - began
    prices, network = asked(problem)
    found = mincut.minimum_cut(*network)
    began = time.perf_counter()
    weight = by_networkx(network)
    theirs = time.perf_counter() - began
    assert found is not None and abs(found.weight / weight - 1) < 1e-3, (found, weight)

    def planned(policy: str, budget: float = 1.0) -> Callable[[], Any]:
        return lambda: resolve(policy).plan(replace(problem, memory_budget=budget))

    cases = {
        "save_all": planned("save_all"),
        "default": planned("default"),
        "at half": planned("default", 0.5),
        "divide": lambda: mincut.divide(*prices),
        "cut": lambda: mincut.minimum_cut(*network),
    }
    samples = harness.interleaved(cases, rounds, warmup=0)
    seconds = {name.replace(" ", "_"): sample.median for name, sample in samples.items()}
    table.add(f"transformer of {layers} layers", values=len(problem.values), capture=captured, networkx=theirs,
              of_networkx_ratio=seconds["cut"] / theirs, **seconds)  # fmt: skip


def main() -> int:
    options = harness.arguments(__doc__).parse_args()
    table = board()
    for layers in LAYERS[:1] if options.quick else LAYERS:
        measure(table, layers, rounds=3)
    return harness.finish(table, options)


if __name__ == "__main__":
    sys.exit(main())
