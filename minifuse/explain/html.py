"""Reports as HTML pages that need nothing else: no script, no font, no request."""

from __future__ import annotations

from functools import cache
from typing import Any

from minifuse.ir.decision import bytes_text
from minifuse.ir.lazy import Deferred

from .report import Report

jinja2 = Deferred("jinja2")


@cache
def _environment() -> Any:
    loader = jinja2.PackageLoader("minifuse.explain", ".")
    made = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    made.filters["bytes"] = bytes_text
    made.filters["microseconds"] = lambda seconds: f"{1e6 * seconds:.3g} µs"
    return made


def render(report: Report) -> str:
    """The page of one report. Every text of the user's is escaped."""
    return page("report.html.j2", report=report)


def page(template: str, **values: Any) -> str:
    """The page of a template of this folder."""
    return str(_environment().get_template(template).render(**values))
