"""Every Triton kernel of the model set: compiled for GPUs that need not be there, and run by Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import models
from benchmarks.assembled import gpu_target, kernel_resources
from minifuse.ir.plan import Launch, Plan
from minifuse.passes.context import CompileContext
from minifuse.records import RECORDS
from minifuse.runtime import build, triton_launch
from tests.models.check import check
from tests.models.families import FAMILIES

SPILLS = "cuda:90"
# The plans are those that a GPU gets.
OPTIONS = {"target": "triton", "device_model": "H100"}
NAMES = [*(f"families/{name}" for name in FAMILIES), *(f"benchmarks/{name}" for name in models.MODELS)]
Made = list[tuple[Plan, CompileContext]]


def step_of(name: str) -> Callable[[Callable[[Any], Any]], None]:
    """A training step of a model, of a compiled copy of it; a call of what is not trained, such as an optimiser."""
    torch.manual_seed(0)
    kind, _, key = name.partition("/")
    trained = kind == "families" or models.MODELS[key].training
    if kind == "families":
        model, kwargs = FAMILIES[key]()
        args: tuple[Any, ...] = ()
    else:
        model, args, kwargs = models.load(models.MODELS[key].path)
    if trained:
        model.train()

    def run(compiled: Callable[[Any], Any]) -> None:
        result = compiled(model)(*args, **kwargs)
        if trained and (loss := models.loss_of(result)).requires_grad:
            loss.backward()

    return run


def plans(name: str) -> Made:
    """The plans of a model's step for the Triton target, placed; what runs is the interpreter of kernels."""
    found: Made = []
    before = triton_launch.build

    def interpreted(plan: Plan, ctx: CompileContext) -> Any:
        found.append((plan, ctx))
        return build.build(plan, replace(ctx, options=replace(ctx.options, target="interpret")))

    triton_launch.build = interpreted
    try:
        torch._dynamo.reset()
        step_of(name)(lambda model: torch.compile(model, backend="minifuse", options=OPTIONS))
    finally:
        triton_launch.build = before
    return found


def compiled(name: str, targets: list[str], claims: Path | None = None) -> tuple[int, list[str]]:
    """How many kernels of a model were compiled, and what went wrong: kernels that Triton cannot express or refuses,
    and spilled registers. A kernel that another process has claimed in the folder `claims` is left out."""
    count, problems = 0, []
    for plan, ctx in plans(name):
        here = torch.device("cpu")
        kernels = triton_launch.write_all(plan, here, ctx)
        problems += [str(d) for d in ctx.decisions if d.rule == "interpreted"]
        module = triton_launch.load_module(triton_launch.module_text(plan, kernels), ctx.options.cache_dir)
        distinct = {kernel.name: i for i, kernel in kernels.items()}
        for target in targets:
            for kernel, i in distinct.items():
                if claims is not None and not _claim(claims / f"{kernel}-{target.replace(':', '')}"):
                    continue
                count += 1
                step = plan.steps[i]
                assert isinstance(step, Launch)
                one = triton_launch.Launched(getattr(module, kernel), step, kernels[i], here)
                what = f"{target} {plan.name} {step.name} {kernel}"
                try:
                    made = one.compile(one.usual(), gpu_target(target))
                except Exception as why:
                    problems.append(f"{what}: {type(why).__name__}: {str(why).strip()[-300:]}")
                    continue
                spilled = kernel_resources(made)["spilled"] if target == SPILLS else 0
                if spilled:
                    problems.append(f"{what}: {spilled} bytes spilled; {step.schedule}")
    return count, problems


def _claim(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def exact(family: str, device: str = "cpu", draws: int = 4) -> list[str]:
    """What of a family's training step by Triton is further from float64 than eager may be, and what Triton did not
    express. The CPU needs TRITON_INTERPRET=1."""
    found = check(family, draws, device, options=OPTIONS)
    problems = [f"{name}: {ratio:.2f} of what is allowed" for name, ratio in found.wrong.items()]
    return problems + [str(d) for r in RECORDS for d in r.decisions if d.rule == "interpreted"]
