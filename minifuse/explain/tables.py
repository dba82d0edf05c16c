"""What the texts of a report share: plain tables, widths, and how many rows are shown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from minifuse.ir.lazy import Deferred

if TYPE_CHECKING:
    from rich.table import Table

rich_console, rich_table = Deferred("rich.console"), Deferred("rich.table")

WIDTH = 120


def table(*headings: str, figures: tuple[str, ...] = (), wraps: str = "", title: str | None = None) -> Table:
    """An empty table without lines; columns of `figures` stand to the right, and `wraps` goes on in further lines."""
    made: Table = rich_table.Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
    for heading in headings:
        made.add_column(heading, justify="right" if heading in figures else "left", no_wrap=heading != wraps)
    return made


def clip(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


def count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def seconds_text(seconds: float) -> str:
    """`1.5e-6` as `1.5 us`."""
    units = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9))
    unit, size = next((u for u in units if seconds >= u[1]), units[-1])
    return f"{seconds / size:.3g} {unit}" if seconds else "0"


def printed(renderable: Any, width: int = WIDTH) -> str:
    """What rich prints of something, without colours."""
    console = rich_console.Console(width=width, color_system=None, legacy_windows=False)
    with console.capture() as captured:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in captured.get().rstrip().splitlines())
