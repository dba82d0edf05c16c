"""What two processes train together is what one trains alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.judge import compiled, records, same
from tests.usage.page import blocks

ROOT = Path(__file__).resolve().parents[2]
COLLECTIVES = torch.ops._c10d_functional


def test_two_processes_train_as_one_does_and_the_page_s_programs_run() -> None:
    """One start of `torchrun` for all cases and for the programs in docs/running.md: starting takes longest."""
    assert len(blocks("torchrun")) == 3
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, "-m", "tests.usage.distributed"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    cases = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    for name, case in cases.items():
        assert case["got"] == pytest.approx(case["want"], rel=1e-5), name
        assert case["want"][-1] < case["want"][0]
    assert cases["data_parallel_in_buckets"]["forwards"] > 1, "DDP cuts the graph between its buckets"
    assert cases["fully_sharded"]["forwards"] == cases["fully_sharded_by_block"]["forwards"] == 1, "a block, once"
    assert "_c10d_functional.all_reduce.default" in cases["tensor_parallel"]["externs"]
    assert {
        "_c10d_functional.all_gather_into_tensor.default",
        "_c10d_functional.reduce_scatter_tensor.default",
        "_c10d_functional.wait_tensor.default",
    } <= set(cases["sequence_parallel"]["externs"])


@pytest.fixture
def group() -> Iterator[str]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD.group_name
    dist.destroy_process_group()


def test_what_a_collective_reads_is_not_overwritten_before_it_is_waited_for(group: str) -> None:
    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        gathered = COLLECTIVES.all_gather_into_tensor(x.sin(), 1, group)
        other = x.exp() @ x  # while other processes read
        return COLLECTIVES.wait_tensor(gathered), other.tanh()

    x = torch.randn(16, 16)
    same(compiled(f)(x), f(x))
    (record,) = records()
    plan = record.stages["memory"]
    read = [n for e in plan.externs if e.target is COLLECTIVES.all_gather_into_tensor.default for n in e.reads]
    assert read
    assert all(plan.buffers[n].storage != "arena" for n in read)
