"""Writes the table of rules in docs/fusion.md: `python docs/make_fusion.py`."""

from __future__ import annotations

from pathlib import Path

from minifuse.passes.fuse import RULES

PAGE = Path(__file__).with_name("fusion.md")
BEGIN, END = "<!-- rules: written by docs/make_fusion.py -->\n", "<!-- end of rules -->\n"


def table() -> str:
    """The rules in the order in which they are asked."""
    rows = "".join(f"| {r.name} | {r.sentence} | {'' if r.legal else 'yes'} |\n" for r in RULES)
    return f"{BEGIN}\n| rule | what holds | `force` lifts it |\n|---|---|---|\n{rows}\n{END}"


def page() -> str:
    """The page with a fresh table."""
    text = PAGE.read_text()
    return text[: text.index(BEGIN)] + table() + text[text.index(END) + len(END) :]


if __name__ == "__main__":
    PAGE.write_text(page())
