"""Writes the kernels in docs/kernels.md, as they are emitted: `python docs/make_kernels.py`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import minifuse
from benchmarks.harness import Target
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


STORED = Path(__file__).parent.parent / "benchmarks" / "results" / "static"
"""What `python -m benchmarks.static` has written for each target."""
FIGURES = {
    "bytes": "{:.3f}x", "wide loads": "{:.0%}", "wide stores": "{:.0%}", "registers": "{}", "blocks": "{}",
    "in flight": "{:.0f} KB", "barriers": "{:.2g}", "issue": "{:.2f}", "last wave": "{:.0%}",
}  # fmt: skip


def scorecard(target: str) -> str:
    """The kernels of the GPU's benchmark on a target, as they were counted, with what falls short in bold."""
    data = json.loads((STORED / f"{target.replace(':', '-')}.json").read_text())
    targets = {name: Target(text.split()[0], float(text.split()[1])) for name, text in data["targets"].items()}
    lines = [f"| kernel | {' | '.join(FIGURES)} |", f"|---|{'---:|' * len(FIGURES)}"]
    for name, row in data["rows"].items():
        held = set(row.get("held", ()))
        cells = []
        for figure, form in FIGURES.items():
            value = row.get(figure)
            text = "-" if value is None else form.format(value / 1024 if figure == "in flight" else value)
            short = value is not None and figure in held and not targets[figure].met(value)
            cells.append(f"**{text}**" if short else text)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    spilled = sum(row.get("spilled", 0) for row in data["rows"].values())
    met = len(data["rows"]) - len(data["short"])
    lines += ["", f"{met} of {len(data['rows'])} kernels meet every target; {spilled} bytes are spilled in all."]
    return "\n".join(lines)


def summary() -> str:
    """For each target, how many kernels meet what they are held to."""
    stored = {path.stem: json.loads(path.read_text()) for path in sorted(STORED.glob("*.json"))}
    names = list(next(iter(stored.values()))["targets"])
    lines = [f"| target | kernels | {' | '.join(names)} |", f"|---|---:|{'---:|' * len(names)}"]
    for stem, data in stored.items():
        cells = []
        for name in names:
            target = Target(data["targets"][name].split()[0], float(data["targets"][name].split()[1]))
            held = [row[name] for row in data["rows"].values() if name in row.get("held", ())]
            cells.append(f"{sum(map(target.met, held))} of {len(held)}")
        lines.append(f"| {stem} | {len(data['rows'])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page() -> str:
    """The page with the kernels as they are emitted now, and the figures that are stored."""

    def fresh(found: re.Match[str]) -> str:
        text = SOURCES[found[1]] if found[1].startswith("mf_") else emitted(found[1])
        return f"<!-- {found[1]} -->\n```text\n{text}\n```"

    text = re.sub(r"<!-- (\w+) -->\n```text\n.*?\n```", fresh, PAGE.read_text(), flags=re.DOTALL)
    for name, made in (("summary", summary()), ("scorecard", scorecard("cuda:90"))):
        begin, end = f"<!-- {name}: written by docs/make_kernels.py -->\n", f"<!-- end of {name} -->"
        text = text[: text.index(begin)] + f"{begin}\n{made}\n\n" + text[text.index(end) :]
    return text


if __name__ == "__main__":
    PAGE.write_text(page())
