"""Kernels compiled for a GPU that need not be there, and what they take of it."""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from minifuse.ir.plan import Launch, Plan
from minifuse.passes.context import CompileContext
from minifuse.runtime import triton_launch
from minifuse.runtime.triton_launch import Launched


def gpu_target(backend: str, arch: int | str, warp_size: int) -> Any:
    """A GPU to compile for, present or not: ("cuda", 90, 32), ("hip", "gfx942", 64). 3.6-3.9."""
    return importlib.import_module("triton.backends.compiler").GPUTarget(backend, arch, warp_size)


def kernel_resources(compiled: Any) -> dict[str, int]:
    """Registers and spilled bytes a thread, and shared bytes a program, of a kernel compiled for NVIDIA. 3.6-3.9.

    Triton's metadata has none: the assembler, which its wheel holds, reports them. A stack is no spill: the sine of
    libdevice has an array there for large arguments.
    """
    ptx = compiled.asm["ptx"]
    folder = Path(importlib.import_module("triton.backends.nvidia").__file__).parent / "bin"
    tool = next(t for t in (folder / "ptxas-blackwell", folder / "ptxas") if t.exists())
    (arch,) = re.findall(r"^\.target (sm_\w+)", ptx, re.MULTILINE)
    with tempfile.TemporaryDirectory() as made:
        source = Path(made, "kernel.ptx")
        source.write_text(ptx)
        command = [str(tool), "-v", f"--gpu-name={arch}", str(source), "-o", f"{made}/kernel.cubin"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    (registers,) = re.findall(r"Used (\d+) registers", text)
    spills = re.findall(r"(\d+) bytes spill", text)
    return {"registers": int(registers), "spilled": sum(map(int, spills)), "shared": compiled.metadata.shared}


def compile_for(plan: Plan, ctx: CompileContext, target: Any) -> list[tuple[Launched, Any]]:
    """Each distinct kernel of a scheduled plan, compiled for a GPU that need not be there (`gpu_target`).

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
