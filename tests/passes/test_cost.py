"""What a kernel is predicted to move of a buffer, by how it reads it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import minifuse
from minifuse.ir.device import CPU
from minifuse.options import Options
from minifuse.passes.context import CompileContext
from minifuse.passes.fuse.graph import Graph
from minifuse.passes.lower.graph import lower
from tests.judge import compiled

# By reading: the share of the buffer's bytes that it reads, and of its seconds, of lines of 16 floats.
READS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], float, float]] = {
    "all": (lambda x, _: x + 1, 1, 1),
    "all, turned": (lambda x, _: x.t() + 1, 1, 1),
    "a part of each row": (lambda x, _: x[:, 64:128] + 1, 1 / 16, 1 / 16),
    "two parts of each row": (lambda x, _: x[:, :64] * x[:, 64:128], 1 / 8, 1 / 8),
    "parts that overlap": (lambda x, _: x[1:] * x[:-1], 1, 1),
    "every other element": (lambda x, _: x[:, ::2] + 1, 1 / 2, 1),
    "an element a line": (lambda x, _: x[:, ::16] + 1, 1 / 16, 1),
    "an element in four lines": (lambda x, _: x[:, ::64] + 1, 1 / 64, 1 / 4),
    "a column": (lambda x, _: x[:, 3] + 1, 1 / 1024, 1 / 64),
    "rows that are picked": (lambda x, rows: x[rows] + 1, 1 / 64, 1 / 64),
    "elements that are picked": (lambda x, rows: x.flatten()[rows] + 1, 1 / 65536, 1 / 4096),
}


@pytest.mark.parametrize("name", READS)
def test_a_read_takes_the_bytes_of_its_elements_and_the_time_of_their_lines(name: str) -> None:
    read, nbytes, seconds = READS[name]
    traced = make_fx(lambda x, rows: [read(x, rows)])(torch.zeros(1024, 1024), torch.arange(16))
    plan = lower(traced.graph, CompileContext("f", "inference", Options()))
    graph = Graph(plan, CPU, 0)
    (x,) = (n for n in plan.inputs if len(plan.buffers[n].shape) == 2)
    (group,) = (g for g in graph.groups.values() if x in g.reads)
    moved = graph.moved(x, group.reads[x])
    assert moved.nbytes == nbytes * graph.bytes[x]
    assert moved.seconds == pytest.approx(seconds * graph.seconds[x])


def test_two_halves_of_one_buffer_are_not_read_twice() -> None:
    def gated(x: Tensor) -> Tensor:
        u, g = x.chunk(2, -1)
        return u * (g * torch.sigmoid(g))

    compiled(gated)(torch.randn(64, 64))
    report = minifuse.reports()[-1]
    saved = sum(d.facts["saved_bytes"] for d in report.decisions if d.taken and "saved_bytes" in d.facts)
    assert saved == report.bytes_unfused - report.kernel_bytes == 40_960
