"""Writes docs/externs.md, what runs by ATen and why: `python docs/make_externs.py`."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from minifuse.passes import lower, normalise
from minifuse.passes.decompose import KEEP_ON_CPU, Decompositions
from minifuse.passes.lower.externs import EXPECTED, reason
from minifuse.passes.lower.pointwise import ROWS
from minifuse.passes.lower.structural import STRUCTURAL

PAGE = Path(__file__).with_name("externs.md")
HEAD = """# What runs by ATen

Every call that is not a generated kernel is an extern; `report.externs` names it with its reason. This page is written
by `python docs/make_externs.py` from the compiler's own tables, with torch {version}: every functional operator of ATen
that is neither lowered, nor decomposed into what is, nor composed of others by torch.

"""
VERSION = ".".join(torch.__version__.split(".")[:2])


def unlowered() -> set[str]:
    """The functional ATen operators, as `aten::name`, that have an overload without kernels, or none on a CPU."""
    known = {*Decompositions("fast"), *ROWS, *STRUCTURAL, *normalise.DRAWN}
    found = {f"aten::{name}" for name in KEEP_ON_CPU}
    for full in torch._C._dispatch_get_all_op_names():
        namespace, _, rest = full.partition("::")
        name, _, overload = rest.partition(".")
        if namespace != "aten" or "out" in overload or not hasattr(torch.ops.aten, name):
            continue
        op = getattr(getattr(torch.ops.aten, name), overload or "default", None)
        if op is not None and op not in known and not op._schema.is_mutable and stands_alone(op):
            if any("Tensor" in str(r.type) for r in op._schema.returns):
                found.add(f"aten::{name}")
    return found


def stands_alone(op: torch._ops.OpOverload) -> bool:
    """Whether torch does not compose the operator of others before a compiler sees it."""
    try:
        return not torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")
    except RuntimeError:  # TorchScript's own operators on numbers
        return False


def refusals() -> Iterator[tuple[str, str]]:
    """(file, reason) of each form of an operator that its lowering leaves to ATen."""
    for path in sorted(Path(lower.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args):
                continue
            if ast.unparse(node.exc.func) == "Unsupported":
                text = ast.unparse(node.exc.args[0])
                yield path.name, text.removeprefix("f").strip("'\"")


def table(rows: dict[str, list[str]]) -> str:
    lines = [f"| {reason} | {', '.join(f'`{n}`' for n in names)} |" for reason, names in rows.items()]
    return "| reason | operators |\n|---|---|\n" + "\n".join(lines) + "\n"


def by_reason(among: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in sorted(among):
        found.setdefault(reason(name) or "no lowering", []).append(name.removeprefix("aten::"))
    return found


def page() -> str:
    """The text of docs/externs.md."""
    left = unlowered()
    forms = dict.fromkeys(f"* {reason} (`{file}`)" for file, reason in refusals())
    return (
        f"{HEAD.format(version=VERSION)}## Meant for ATen\n\n{table(by_reason(left & EXPECTED.keys()))}\n"
        "## Without a kernel\n\n"
        f"{table(by_reason(left - EXPECTED.keys()))}\n## Forms of operators that have kernels\n\n"
        + "\n".join(forms)
        + "\n"
    )


if __name__ == "__main__":
    PAGE.write_text(page())
