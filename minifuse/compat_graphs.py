"""Private names of torch that its CUDA graphs need, each with the versions it was seen in, beside `compat`.

They are imported where they are used: all of Inductor comes with them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from .compat import forward_metadata, is_tangent_name


def unrecordable(gm: fx.GraphModule) -> str:
    """The first operator of a graph that a CUDA graph may not hold, by its target; empty where none is. 2.11-2.13."""
    utils = importlib.import_module("torch._inductor.utils")
    node = utils.get_first_incompatible_cudagraph_node(gm)
    return "" if node is None else str(node.target)


def static_inputs(gm: fx.GraphModule, stage: str) -> tuple[int, ...]:
    """The inputs of a graph whose memory stays where it is: parameters and buffers, and what a forward has saved.
    2.11-2.13."""
    if stage == "backward":
        names = [n.name for n in gm.graph.find_nodes(op="placeholder")]
        return tuple(k for k, name in enumerate(names) if not is_tangent_name(name))
    meta = forward_metadata()
    return tuple(getattr(meta, "static_input_indices", None) or ())


def cuda_graphs(
    run: Callable[[list[Any]], Any], gm: fx.GraphModule, stage: str, device: int, fixed: Sequence[int],
    mutated: Sequence[int],
) -> Callable[[list[Any]], Any]:  # fmt: skip
    """A boxed callable behind PyTorch's trees of CUDA graphs. 2.11-2.13."""
    inductor = importlib.import_module("torch._inductor.compile_fx")
    utils = importlib.import_module("torch._inductor.cudagraph_utils")
    outputs = gm.graph.output_node().args[0]
    traces = [n.stack_trace if isinstance(n, fx.Node) else None for n in outputs]  # type: ignore[union-attr]
    return inductor.cudagraphify(
        run, static_input_idxs=fixed, device_index=device, stack_traces=traces, is_backward=stage == "backward",
        is_inference=stage == "inference", placeholders=utils.get_placeholder_info(gm.graph),
        mutated_input_idxs=tuple(mutated),
    )  # fmt: skip


def beside_cuda_graphs(run: Callable[[list[Any]], Any], device: int) -> Callable[[list[Any]], Any]:
    """A backward that runs as it is behind a recorded forward: the trees are told that one runs. 2.11-2.13."""
    trees = importlib.import_module("torch._inductor.cudagraph_trees")

    def call(args: list[Any]) -> Any:
        manager = trees.get_manager(device, create_if_none_exists=False)
        if manager is not None:
            manager.set_to_running_backward()
        return run(args)

    call._boxed_call = True  # type: ignore[attr-defined]
    return call


def forget_cuda_graphs() -> None:
    """Drop all recordings and their memory, if there are any. 2.11-2.13."""
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is not None and torch.cuda.is_available():
        trees.reset_cudagraph_trees()
