"""A chart of a benchmark's ratios, as SVG, from the JSON that it wrote.

    python -m benchmarks.chart FILE [FILE ...]

Beside each FILE.json stands FILE.svg: a bar a row for each column of ratios that has a target or is a speed, the line
at 1, those that miss their target in another colour. Rows without a figure have no bar.
"""

from __future__ import annotations

import argparse
import json
import operator
import sys
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

BAR, GAP, LEFT, WIDTH = 11, 8, 190, 560
COMPARE = {"<=": operator.le, ">=": operator.ge}
COLOURS = ("#3b6ea5", "#7aa95c", "#8d6cab", "#c08a3e")
SHORT = "#c0392b"
SVG = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {{ width }} {{ height }}" font-family="sans-serif" font-size="11">
<rect width="100%" height="100%" fill="white"/>
<text x="10" y="18" font-size="13" font-weight="bold">{{ title }}</text>
{% for name, colour in legend %}
<rect x="{{ 10 + loop.index0 * 170 }}" y="28" width="10" height="10" fill="{{ colour }}"/>
<text x="{{ 24 + loop.index0 * 170 }}" y="37">{{ name }}</text>
{% endfor %}
{% for row in rows %}
<text x="{{ left - 8 }}" y="{{ row.y + 10 }}" text-anchor="end">{{ row.name }}</text>
{% for bar in row.bars %}
<rect x="{{ left }}" y="{{ bar.y }}" width="{{ '%.1f' | format(bar.length) }}" height="9" fill="{{ bar.colour }}"/>
<text x="{{ '%.1f' | format(left + bar.length + 4) }}" y="{{ bar.y + 8 }}" font-size="9">{{ bar.text }}</text>
{% endfor %}
{% endfor %}
<line x1="{{ one }}" x2="{{ one }}" y1="46" y2="{{ height - 10 }}" stroke="black" stroke-dasharray="3 3"/>
</svg>
"""


def chart(result: dict[str, Any]) -> str:
    """The SVG of one benchmark's results. Raises ValueError where it has no column of ratios."""
    targets: dict[str, str] = result["targets"]
    names = list(dict.fromkeys(c for row in result["rows"].values() for c in row))
    columns = [c for c in names if c.startswith(("vs ", "of ")) or "ratio" in c or "share" in c]
    if not columns:
        raise ValueError(f"{result['title']!r} has no column of ratios: {', '.join(names)}")
    legend = [(f"{c} {targets.get(c, '')}".strip(), COLOURS[k % len(COLOURS)]) for k, c in enumerate(columns)]
    figures = [row[c] for row in result["rows"].values() for c in columns if c in row]
    scale = WIDTH / max([1.0, *figures])
    rows, y = [], 50
    for name, row in result["rows"].items():
        bars = []
        for k, column in enumerate(c for c in columns if c in row):
            compare, _, limit = targets.get(column, "").partition(" ")
            met = not limit or COMPARE[compare](row[column], float(limit))
            colour = dict(zip(columns, (c for _, c in legend), strict=True))[column] if met else SHORT
            text = f"{row[column]:.2f}x"
            bars.append({"y": y + k * BAR, "length": row[column] * scale, "colour": colour, "text": text})
        rows.append({"name": name, "y": y, "bars": bars})
        y += max(len(bars), 1) * BAR + GAP
    template = Environment(undefined=StrictUndefined, autoescape=True, trim_blocks=True).from_string(SVG)
    return template.render(title=result["title"], legend=legend, rows=rows, left=LEFT, one=f"{LEFT + scale:.1f}",
                           width=LEFT + WIDTH + 60, height=y + 10)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    for path in parser.parse_args().files:
        path.with_suffix(".svg").write_text(chart(json.loads(path.read_text())))
        print(path.with_suffix(".svg"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
