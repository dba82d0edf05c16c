"""Writes the kernels in docs/kernels.md, as they are emitted: `python docs/make_kernels.py`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import minifuse
from minifuse.codegen.triton_prelude import SOURCES
from minifuse.options import Options
from minifuse.passes.context import CompileContext
from minifuse.runtime import triton_launch

PAGE = Path(__file__).with_name("kernels.md")
OPTIONS = {"target": "triton", "device_model": "H100"}


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def residual_norm(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    h = x + residual
    return F.rms_norm(h, (4096,), weight)


def total(x: Tensor) -> Tensor:
    return x.sum()


HALF = torch.bfloat16
EXAMPLES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "pointwise": (swiglu, (torch.empty(8192, 14_336, dtype=HALF), torch.empty(8192, 14_336, dtype=HALF))),
    "norm": (
        residual_norm,
        (torch.empty(8192, 4096, dtype=HALF), torch.empty(8192, 4096, dtype=HALF), torch.empty(4096, dtype=HALF)),
    ),
    "split": (total, (torch.empty(1 << 26),)),
}


def emitted(name: str) -> str:
    """The kernels of an example, without the helpers that they call."""
    function, args = EXAMPLES[name]
    with torch.no_grad():
        (plan,) = minifuse.capture(function, *args, compile_options=OPTIONS).plans.values()
    ctx = CompileContext(plan.name, "inference", Options.parse(OPTIONS))
    text = triton_launch.module_text(plan, triton_launch.write_all(plan, torch.device("cpu"), ctx))
    return text[re.search(r"^# ", text, re.MULTILINE).start() :].rstrip()  # type: ignore[union-attr]


def page() -> str:
    """The page with the kernels as they are emitted now."""

    def fresh(found: re.Match[str]) -> str:
        text = SOURCES[found[1]] if found[1].startswith("mf_") else emitted(found[1])
        return f"<!-- {found[1]} -->\n```text\n{text}\n```"

    return re.sub(r"<!-- (\w+) -->\n```text\n.*?\n```", fresh, PAGE.read_text(), flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(page())
