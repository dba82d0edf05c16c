"""Bytes that kernels move, and how many kernels there are, beside Inductor's and beside the least possible.

    python -m benchmarks.traffic [--quick] [--models bert,llama] [--json FILE] [--check]

Counted at compile time, so it needs no quiet machine; a step of training and one of inference for each model. Both
sides count each buffer that a kernel reads or writes once; calls into libraries (matmul, convolution, attention) stand
apart. Inductor's bytes are those of its own metrics, node by node; its kernels are the outermost loops of the C++ that
it calls, as minifuse's are. `least` is what no choice of kernels saves in the graphs that minifuse compiles: inputs,
outputs, and what library calls take and give, each once. The first rows are programs whose figures are counted by hand:
there both accounts must say what the hand does (the kernels, at most as many).
"""

from __future__ import annotations

import importlib
import re
import sys
from dataclasses import asdict, dataclass, replace

from torch._inductor import metrics
from torch._inductor.utils import run_and_get_code
from torch._logging._internal import set_logs

from minifuse.ir.plan import Extern, Launch, Plan, TensorRef

from . import counted, harness, models
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
# Plans follow the machine's rates: with those of the table the figures are the same wherever they are taken.
NAMED_RATES = {"MINIFUSE_DEVICE_MODEL": "cpu"}


def probe_minifuse(path: str, training: bool) -> dict[str, int]:
    """minifuse's traffic, with `Traffic`'s fields and `least_bytes`, from its reports. Run it through `fresh`."""
    models.stepper(path, "minifuse", training)()
    reports = importlib.import_module("minifuse").reports()
    found = {name: sum(getattr(r, name) for r in reports) for name in (*counted.FIGURES, "least_bytes")}
    found["extern_bytes"] -= sum(unread(r.plan) for r in reports)
    return found


def unread(plan: Plan) -> int:
    """Bytes of library calls' results that nothing reads, which Inductor does not count."""
    used = {name for s in plan.steps if isinstance(s, (Launch, Extern)) for name in s.reads}
    used |= {o.buffer for o in plan.outputs if isinstance(o, TensorRef)}
    for b in reversed(list(plan.buffers.values())):  # what is written over something reads that under its own name
        if b.name in used and b.reuses is not None:
            used.add(b.reuses)
    return sum(plan.hint(plan.buffers[n].nbytes) for e in plan.externs for n in e.writes if n not in used)


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
            Column("least bytes", harness.megabytes),
            Column("inductor extern bytes", harness.megabytes),
            Column("extern bytes", harness.megabytes),
            Column("extern ratio", harness.ratio, Target("<=", 1.0)),
        ],
    )
    table.hold(OVER_THE_SET, {"byte ratio": Target("<=", 0.8)})
    return table


def measure(table: Board, name: str, path: str, training: bool, backends: list[str]) -> None:
    """Fill the row of one model with the figures of the given compilers.

    Raises ProbeError.
    """
    if "inductor" in backends:
        theirs = Traffic(**harness.fresh(probe_inductor, path, training, env=WITHOUT_CACHES))
        table.add(
            name,
            inductor_kernels=theirs.kernels,
            inductor_bytes=theirs.kernel_bytes,
            inductor_extern_bytes=theirs.extern_bytes,
        )
    if "minifuse" in backends:
        found = harness.fresh(probe_minifuse, path, training, env=NAMED_RATES)
        ours = Traffic(*(found[figure] for figure in counted.FIGURES))
        table.add(
            name,
            kernels=ours.kernels,
            bytes=ours.kernel_bytes,
            extern_bytes=ours.extern_bytes,
            least_bytes=found["least_bytes"],
        )
    if {"inductor", "minifuse"} <= {*backends}:
        table.add(
            name,
            kernel_ratio=ours.kernels / theirs.kernels,
            byte_ratio=ours.kernel_bytes / theirs.kernel_bytes,
            # A model may call no library at all (an optimiser's step).
            extern_ratio=ours.extern_bytes / theirs.extern_bytes
            if theirs.extern_bytes
            else float(ours.extern_bytes > 0),
        )


def hold_to_the_hand(table: Board, row: counted.Counted) -> None:
    """Fail the row of a program where an account differs from what is counted by hand."""
    found = table.rows[row.name]
    for side in ("inductor ", ""):
        if side + "bytes" not in found:
            continue
        figures = Traffic(*(found[side + column] for column in ("kernels", "bytes", "extern bytes")))
        hand = Traffic(row.kernels, row.kernel_bytes, row.extern_bytes)
        if figures.kernels > hand.kernels or replace(figures, kernels=hand.kernels) != hand:
            table.fail(row.name, f"{side or 'minifuse '}counts {figures}, the hand {hand}")


def main() -> int:
    parser = harness.arguments(__doc__)
    parser.add_argument("--models", default="", help="comma-separated names")
    parser.add_argument("--backends", default="inductor,minifuse", type=lambda text: text.split(","))
    options = parser.parse_args()
    table = board()
    for row in [] if options.models else counted.COUNTED:
        try:
            measure(table, row.name, row.path, False, options.backends)
            hold_to_the_hand(table, row)
        except ProbeError as error:
            table.fail(row.name, error)
    ratios = []
    for entry in models.select(options.quick, names=options.models):
        for training in (True, False) if entry.training else (False,):
            name = f"{entry.name} {'training' if training else 'inference'}"
            try:
                measure(table, name, entry.path, training, options.backends)
            except ProbeError as error:
                table.fail(name, error)
            if "byte ratio" in table.rows[name]:
                ratios.append(table.rows[name]["byte ratio"])
    if ratios:
        table.add(OVER_THE_SET, byte_ratio=harness.geometric_mean(ratios))
    return harness.finish(table, options)


if __name__ == "__main__":
    sys.exit(main())
