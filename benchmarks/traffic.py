"""Bytes that kernels move, and how many kernels there are, beside Inductor's.

    python -m benchmarks.traffic [--quick] [--models bert,llama] [--json FILE] [--check]

Counted at compile time, so it needs no quiet machine. Both sides count each buffer that a kernel reads or writes once;
calls into libraries (matmul, convolution, attention) stand apart. Inductor's bytes are those of its own metrics, node
by node; its kernels are the outermost loops of the C++ that it calls, as minifuse's are.
"""

from __future__ import annotations

import importlib
import re
import sys
from dataclasses import asdict, dataclass

from torch._inductor import metrics
from torch._inductor.utils import run_and_get_code
from torch._logging._internal import set_logs

from . import harness, models
from .harness import Board, Column, ProbeError, Target


@dataclass(frozen=True)
class Traffic:
    """Of one step: launches of generated kernels, bytes that they move, bytes that library calls move."""

    kernels: int
    kernel_bytes: int
    extern_bytes: int


def probe_inductor(path: str, training: bool) -> dict[str, int]:
    """Inductor's traffic, with `Traffic`'s fields. Run it through `fresh` with `WITHOUT_CACHES`.

    `metrics.nodes_num_elem` holds each scheduled node with its bytes over four (torch 2.11 to 2.13), filled only while
    the artifact `inductor_metrics` is logged.
    """
    set_logs(inductor_metrics=True)
    metrics.reset()
    _, sources = run_and_get_code(models.stepper(path, "inductor", training))
    launches = sum(map(inductor_kernels, sources))
    externs = sum(4 * quarters for node, quarters in metrics.nodes_num_elem if node.is_extern())
    return asdict(Traffic(launches, metrics.num_bytes_accessed - externs, externs))


def inductor_kernels(source: str) -> int:
    """Kernels that a module written by Inductor runs: the outermost loops of each C++ function, once a call of it, and
    the launches of Triton kernels. One C++ function holds all loops between two library calls, so that counting calls
    would compare them with minifuse's runs of several kernels."""
    loops = {
        name: _outermost_loops(text)
        for name, text in re.findall(r"^(cpp_\w+) = async_compile\.cpp\w*\(.*?r'''(.*?)'''", source, re.M | re.S)
    }
    calls = re.findall(r"^\s+((?:cpp|triton)_\w+)(?:\.run)?\(", source, re.MULTILINE)
    return sum(loops.get(name, 1) for name in calls)


def _outermost_loops(text: str) -> int:
    """How many `for` statements of a C++ text stand in no other; a text without one does one thing."""
    found, depth, inside = 0, 0, None
    for line in text.splitlines():
        if inside is None and re.match(r"\s*for\s*\(", line):
            found, inside = found + 1, depth
        depth += line.count("{") - line.count("}")
        if inside is not None and depth <= inside and "}" in line:
            inside = None
    return max(found, 1)


WITHOUT_CACHES = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}


def probe_minifuse(path: str, training: bool) -> dict[str, int]:
    """minifuse's traffic, with `Traffic`'s fields, from its reports. Run it through `fresh`."""
    models.stepper(path, "minifuse", training)()
    reports = importlib.import_module("minifuse").reports()
    return {name: sum(getattr(r, name) for r in reports) for name in ("kernels", "kernel_bytes", "extern_bytes")}


OVER_THE_SET = "geometric mean"


def board() -> Board:
    table = Board(
        "Kernels and bytes of a step: minifuse beside Inductor",
        [
            Column("inductor kernels"),
            Column("kernels"),
            Column("kernel ratio", harness.ratio, Target("<=", 1.0)),
            Column("inductor bytes", harness.megabytes),
            Column("bytes", harness.megabytes),
            Column("byte ratio", harness.ratio, Target("<=", 1.0)),
            Column("inductor extern bytes", harness.megabytes),
            Column("extern bytes", harness.megabytes),
            Column("extern ratio", harness.ratio, Target("<=", 1.0)),
        ],
    )
    table.hold(OVER_THE_SET, {"byte ratio": Target("<=", 0.8)})
    return table


def measure(table: Board, entry: models.Entry, backends: list[str]) -> None:
    """Fill the row of one model with the figures of the given compilers."""
    if "inductor" in backends:
        theirs = Traffic(**harness.fresh(probe_inductor, entry.path, entry.training, env=WITHOUT_CACHES))
        table.add(
            entry.name,
            inductor_kernels=theirs.kernels,
            inductor_bytes=theirs.kernel_bytes,
            inductor_extern_bytes=theirs.extern_bytes,
        )
    if "minifuse" in backends:
        ours = Traffic(**harness.fresh(probe_minifuse, entry.path, entry.training))
        table.add(entry.name, kernels=ours.kernels, bytes=ours.kernel_bytes, extern_bytes=ours.extern_bytes)
    if {"inductor", "minifuse"} <= {*backends}:
        table.add(
            entry.name,
            kernel_ratio=ours.kernels / theirs.kernels,
            byte_ratio=ours.kernel_bytes / theirs.kernel_bytes,
            # A model may call no library at all (an optimiser's step).
            extern_ratio=ours.extern_bytes / theirs.extern_bytes
            if theirs.extern_bytes
            else float(ours.extern_bytes > 0),
        )


def main() -> int:
    parser = harness.arguments(__doc__)
    parser.add_argument("--models", default="", help="comma-separated names")
    parser.add_argument("--backends", default="inductor,minifuse", type=lambda text: text.split(","))
    options = parser.parse_args()
    table = board()
    for entry in models.select(options.quick, names=options.models):
        try:
            measure(table, entry, options.backends)
        except ProbeError as error:
            table.fail(entry.name, error)
    ratios = [row["byte ratio"] for row in table.rows.values() if "byte ratio" in row]
    if ratios:
        table.add(OVER_THE_SET, byte_ratio=harness.geometric_mean(ratios))
    return harness.finish(table, options)


if __name__ == "__main__":
    sys.exit(main())
