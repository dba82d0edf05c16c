"""A report as one HTML page that needs nothing else: no script, no font, no request."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

from minifuse.ir.decision import bytes_text

from .report import Report

_ENVIRONMENT = Environment(
    loader=PackageLoader("minifuse.explain", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)
_ENVIRONMENT.filters["bytes"] = bytes_text
_ENVIRONMENT.filters["microseconds"] = lambda seconds: f"{1e6 * seconds:.3g} µs"


def render(report: Report) -> str:
    """The page of one report. Every text of the user's is escaped."""
    return _ENVIRONMENT.get_template("report.html.j2").render(report=report)
