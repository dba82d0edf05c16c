"""Kernels compiled for a GPU that need not be there."""

from __future__ import annotations

from typing import Any

import torch

from minifuse.ir.plan import Launch, Plan
from minifuse.passes.context import CompileContext
from minifuse.runtime import triton_launch
from minifuse.runtime.triton_launch import Launched


def compile_for(plan: Plan, ctx: CompileContext, target: Any) -> list[tuple[Launched, Any]]:
    """Each distinct kernel of a scheduled plan, compiled for a GPU that need not be there (`assembled.gpu_target`).

    Raises what Triton raises where it refuses one; kernels that it cannot express are recorded and left out.
    """
    here = torch.device("cpu")
    kernels = triton_launch.write_all(plan, here, ctx)
    module = triton_launch.load_module(triton_launch.module_text(plan, kernels), ctx.options.cache_dir)
    found: dict[str, tuple[Launched, Any]] = {}
    for i, kernel in kernels.items():
        step = plan.steps[i]
        if kernel.name not in found and isinstance(step, Launch):
            one = Launched(getattr(module, kernel.name), step, kernel, here)
            found[kernel.name] = one, one.compile(one.usual(), target)
    return list(found.values())
