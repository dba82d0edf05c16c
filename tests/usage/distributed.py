"""Each case trained by two processes; prints JSON: its losses, one process's, and operators left to PyTorch.

python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.usage.distributed
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from minifuse.records import RECORDS
from tests.judge import compiled, externs, records
from tests.usage.models import Language, Perceptron, loss_of, texts
from tests.usage.page import blocks

STEPS = 3


def data_parallel(model: Language) -> nn.Module:
    return compiled(DistributedDataParallel(model))


def data_parallel_in_buckets(model: Language) -> nn.Module:
    return compiled(DistributedDataParallel(model, bucket_cap_mb=1))


def fully_sharded(model: Language) -> nn.Module:
    for block in model.blocks:
        fully_shard(block)
    return compiled(fully_shard(model))


def fully_sharded_by_block(model: Language) -> nn.Module:
    for block in model.blocks:
        fully_shard(block).compile(backend="minifuse")
    return fully_shard(model)


def tensor_parallel(model: Language) -> nn.Module:
    for block in model.blocks:
        parallelize_module(block, MESH, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return compiled(model, fullgraph=True)


def sequence_parallel(model: Language) -> nn.Module:
    """Between the layers that are split by columns and by rows, each process has its part of the sequence."""
    split, whole = Shard(1), Replicate()
    embed = RowwiseParallel(input_layouts=whole, output_layouts=split)
    head = ColwiseParallel(input_layouts=split, output_layouts=whole)
    parallelize_module(model, MESH, {"embed": embed, "head": head})
    for block in model.blocks:
        up, down = ColwiseParallel(input_layouts=split), RowwiseParallel(output_layouts=split)
        parallelize_module(block, MESH, {"norm": SequenceParallel(use_local_output=True), "up": up, "down": down})
    return compiled(model, fullgraph=True)


SPLIT_THE_BATCH = (
    data_parallel,
    data_parallel_in_buckets,
    fully_sharded,
    fully_sharded_by_block,
)
SPLIT_THE_MODEL = (tensor_parallel, sequence_parallel)


def losses(model: nn.Module, batch: Tensor) -> list[float]:
    """A training loop's losses, each the mean over processes."""
    # one parameter at a time: PyTorch does not take lists that mix plain and distributed tensors
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, foreach=False)
    found = []
    for _ in range(STEPS):
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        found.append(total.item() / dist.get_world_size())
    return found


def account(case: Callable[[Language], nn.Module]) -> dict[str, Any]:
    torch.manual_seed(0)
    torch.compiler.reset()
    RECORDS.clear()
    width = 400 if case is data_parallel_in_buckets else 32  # a bucket is one MB at least
    model, batch = Language(Perceptron, width=width), texts()
    want = losses(copy.deepcopy(model), batch)
    mine = batch.chunk(dist.get_world_size())[dist.get_rank()] if case in SPLIT_THE_BATCH else batch
    got = losses(case(model), mine)
    return {"want": want, "got": got, "forwards": len(records("forward")), "externs": externs()}


if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    MESH = init_device_mesh("cpu", (dist.get_world_size(),))
    cases = {case.__name__: account(case) for case in (*SPLIT_THE_BATCH, *SPLIT_THE_MODEL)}
    if dist.get_rank() == 0:
        print(json.dumps(cases))
    # one group for all: made again and again in one process, a group may hang
    with mock.patch.multiple(dist, init_process_group=mock.DEFAULT, destroy_process_group=mock.DEFAULT):
        for block in blocks("torchrun"):
            torch.compiler.reset()
            exec(block, {})
    dist.destroy_process_group()
