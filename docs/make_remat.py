"""Writes docs/rematerialisation.md from `benchmarks/results/remat/models.json`: `python docs/make_remat.py`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("rematerialisation.md")
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "remat" / "models.json"
HEAD = """# Rematerialisation, measured

Every row is a training step, model and loss compiled as one, under one plan. Bytes are MB (10^6) at the peak of a step
beyond model and inputs: as the policy's simulator predicts them, as the compiled plans need them, and as the kernel
counts resident pages (`benchmarks/harness.py`, `held`). A step's time is over `save_all`'s, predicted and measured
(interleaved medians, each plan in memory of its own). `equal` is the share of gradients that have the bits of
`save_all`'s, dropout included; of torch's rows, of its budget 1. `gap` is how far from the best a plan may be, of a
step's time, where its policy proved a bound. Budgets are shares of eager's peak as predicted; `over` marks a plan that
is above, the best that the policy found. A plan is run with the budget that it was made for: without one an eighth more
than was in use may lie idle, with one a 128th, at the price of fresh pages. `torch` is its `activation_memory_budget`
(backend `aot_eager_decomp_partition`): its kernels are eager's and have no times here.

This page is written by `python docs/make_remat.py`; with the command that measured it.
"""
COLUMNS = ("model", "policy", "budget", "predicted", "planned", "measured", "step predicted", "step", "flops again",
           "planning", "gap", "equal")  # fmt: skip
WITHIN = 1.05
COMMAND = "`python -m benchmarks.remat --policies save_all,default,mincut,chen_sqrt --budgets 1,.8,.6,.4,.3,.2 --torch`"


def merged(rows: Mapping[str, dict[str, Any]]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Policy, budgets and figures; budgets for which a policy gave one plan, run in one way, have one row."""
    found: dict[tuple[Any, ...], tuple[list[str], dict[str, Any]]] = {}
    for name, row in rows.items():
        policy, _, budget = name.rpartition(" ")
        figures = ("predicted peak", "saved", "predicted step ratio", "measured peak", "step ratio")
        found.setdefault((policy, *map(row.get, figures)), ([], row))[0].append(budget)
    for (policy, *_), (budgets, row) in found.items():
        yield policy, ", ".join(budgets), {**row, "budget": row.get("budget") if len(budgets) == 1 else ""}


def line(model: str, policy: str, budget: str, row: Mapping[str, Any]) -> str:
    def shown(name: str, form: str, scale: float = 1.0) -> str:
        return form.format(row[name] / scale) if row.get(name) is not None else ""

    mark = " over" if row.get("budget") == "over" else ""
    cells = (
        model,
        f"`{policy}`",
        f"{budget}{mark}",
        shown("predicted peak", "{:.1f}", 1e6),
        shown("planned peak", "{:.1f}", 1e6),
        shown("measured peak", "{:.1f}", 1e6),
        shown("predicted step ratio", "{:.2f}"),
        shown("step ratio", "{:.2f}"),
        shown("flops", "{:.1%}"),
        shown("plan", "{:.2f} s"),
        shown("gap", "{:.1%}"),
        shown("equal", "{:.0%}"),
    )
    return f"| {' | '.join(cells)} |"


def section(path: Path) -> str:
    boards: dict[str, dict[str, Any]] = json.loads(path.read_text())
    first = next(iter(boards.values()))
    versions = ", ".join(f"{package} {version}" for package, version in first["versions"].items())
    lines = [
        f"\n## {path.stem.capitalize()}\n",
        f"{COMMAND} on {first['machine']['processor']}, {first['machine']['threads']} threads; {versions}.",
    ]
    rows = [(m, *found) for m, board in boards.items() for found in merged(board["rows"])]
    ours = [row for _, policy, _, row in rows if policy != "torch"]
    lines.append("")
    for words, chosen in (
        ("Without a budget", [r for _, policy, budget, r in rows if policy != "torch" and budget == "1"]),
        ("With a budget", [r for _, policy, budget, r in rows if policy != "torch" and budget != "1"]),
    ):
        off = [max(r["measured of predicted"], r["predicted of measured"]) for r in chosen]
        if off:
            lines.append(
                f"{words} the measured peak is within {WITHIN - 1:.0%} of the predicted one in "
                f"{sum(x <= WITHIN for x in off)} of {len(off)} rows; the median is {statistics.median(off) - 1:.1%} "
                f"off, the worst {max(off) - 1:.0%}."
            )
    lines.append(
        f"Gradients equal to `save_all`'s, all bits of all: {sum(r['equal'] == 1 for r in ours)} of {len(ours)} rows.\n"
    )
    lines += [f"| {' | '.join(COLUMNS)} |", f"|---|---|---|{'---:|' * (len(COLUMNS) - 3)}"]
    lines += [line(*row) for row in rows]
    notes: dict[str, list[str]] = {}
    for m, board in boards.items():
        notes.setdefault(board.get("note", ""), []).append(m)
    lines += [f"\n{', '.join(models)}: {note}" for note, models in notes.items() if note]
    errors = [f"{m} {case}: {e.splitlines()[-1]}" for m, b in boards.items() for case, e in b["errors"].items() if e]
    return "\n".join([*lines, *(["", *errors] if errors else [])]) + "\n"


def page() -> str:
    """The text of docs/rematerialisation.md."""
    return HEAD + section(RESULTS)


if __name__ == "__main__":
    PAGE.write_text(page())
