"""The measured figures of the README, from `benchmarks/results/*.json`.

    python -m benchmarks.readme [--check]

Each file is what a benchmark writes with `--json`. The text between the two markers in README.md is replaced; with
`--check` nothing is written and the exit status says whether it is current.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import harness
from .chart import chart
from .harness import ROOT

RESULTS = ROOT / "benchmarks" / "results"
# Those whose ratios are drawn beside the table.
CHARTS = ("cpu", "memory_roof")
SHARES = ("median distance", "worst", "recomputed", "published recomputed", "longer")
BEGIN, END = "<!-- measured: written by `python -m benchmarks.readme` -->", "<!-- /measured -->"
NOTHING = (
    "No results are stored in `benchmarks/results`. `make bench` measures on your machine and prints the tables;\n"
    "`python -m benchmarks.cpu --json benchmarks/results/cpu.json` (likewise `traffic`, `memory_roof`) followed by\n"
    "`python -m benchmarks.readme` writes them here."
)


def figure(column: str, value: Any) -> str:
    """One figure as the benchmarks show it; the unit follows from the column's name."""
    if value is None:
        return "-"
    if isinstance(value, dict):
        return str(harness.Sample(**value))
    if isinstance(value, int) and "bytes" not in column and "peak" not in column:
        return f"{value:,}"
    if not isinstance(value, (int, float)):
        return str(value)
    if column == "copy":
        return f"{value / 1e9:,.0f} GB/s"
    if "ratio" in column or column.startswith(("vs ", "of ")):
        return harness.ratio(value)
    if "bytes" in column or "peak" in column:
        return harness.megabytes(value)
    if column in ("eager", "dynamo", "aot_eager", "inductor", "minifuse"):
        return f"{value:,.3g} us"
    if column in SHARES:
        return f"{value:.2%}"
    return harness.seconds(value) if column in ("greedy", "exact") or "compile" in column else f"{value:,.3g}"


def table(name: str, result: dict[str, Any]) -> str:
    """One benchmark as a Markdown table, with its chart where one is stored, what it ran on, what its `note` says of
    the code that was measured, and its verdict."""
    rows: dict[str, dict[str, Any]] = result["rows"]
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    targets: dict[str, str] = result["targets"]
    heads = [f"{c} ({targets[c]})" if c in targets else c for c in columns]
    machine = result["machine"]
    where = f"{machine['gpu'] or machine['processor']}, {machine['threads']} threads"
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    module = "gpu" if "gpu" in result else name
    lines = [
        f"**{result['title']}** (`python -m benchmarks.{module}`; {where}; {versions})",
        "",
        *([result["note"], ""] if "note" in result else []),
        *([f"![{result['title']}](benchmarks/results/{name}.svg)", ""] if (RESULTS / f"{name}.svg").exists() else []),
        f"| case | {' | '.join(heads)} |",
        f"|---|{'---:|' * len(heads)}",
        *(f"| {case} | {' | '.join(figure(c, row.get(c)) for c in columns)} |" for case, row in rows.items()),
        "",
        *(f"{case} failed: {error.splitlines()[-1]}" for case, error in result["errors"].items() if error),
        result["verdict"],
    ]
    return "\n".join(lines)


def section(results: Sequence[Path]) -> str:
    """What stands between the markers."""
    return "\n\n".join(table(path.stem, json.loads(path.read_text())) for path in results) or NOTHING


def updated(readme: str) -> str:
    """The README with the figures of today. Raises ValueError where it has no markers."""
    before, found, rest = readme.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not (found and closed):
        raise ValueError(f"expected {BEGIN!r} and {END!r} in README.md")
    return f"{before}{BEGIN}\n{section(sorted(RESULTS.glob('*.json')))}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where the README is stale")
    options = parser.parse_args()
    path = ROOT / "README.md"
    old = path.read_text()
    new = updated(old)
    charts = {RESULTS / f"{name}.svg": chart(json.loads((RESULTS / f"{name}.json").read_text())) for name in CHARTS}
    current = old == new and all(p.exists() and p.read_text() == text for p, text in charts.items())
    if not options.check:
        path.write_text(new)
        for svg, text in charts.items():
            svg.write_text(text)
    print("current" if current else "stale" if options.check else "written")
    return int(options.check and not current)


if __name__ == "__main__":
    sys.exit(main())
