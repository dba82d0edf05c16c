"""A log of fusions: what one compile decided, read back to decide the same in another."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minifuse.errors import OptionError
from minifuse.ir.decision import Decision
from minifuse.passes.context import CompileContext

JOINED = "written in place"
TAKEN = ("fuse", "inline", JOINED)


@dataclass(frozen=True)
class Entry:
    """One fusion: `first` and `second` name kernels of the unfused plan, each standing for the group it is in by then.

    `rule` is "fuse" (they become one), "inline" (the second computes what it reads of the first) or "written in place"
    (the pieces of a join are stored where it has them; both names are the join's); `graph` is the name of the graph,
    without its number.
    """

    rule: str
    graph: str
    first: str
    second: str

    def to_json(self) -> dict[str, str]:
        return {"rule": self.rule, "graph": self.graph, "first": self.first, "second": self.second}


def unnumbered(graph: str) -> str:
    """A graph's name without the number that a process gives it."""
    return re.sub(r"^graph\d+_", "", graph)


def entries(decisions: Iterable[Decision], graph: str) -> list[dict[str, str]]:
    """The fusions among the decisions about a graph, in order, as plain data."""
    return [
        Entry(d.rule, unnumbered(graph), d.facts["first"], d.facts["second"]).to_json()
        for d in decisions
        if d.taken and d.rule in TAKEN and "first" in d.facts
    ]


def read(log: Any) -> tuple[Entry, ...]:
    """The fusions of a log: a list of what `entries` gives, or the path of a JSON file that holds one.

    Raises OptionError: no such file, no list, or an entry without its four fields.
    """
    if isinstance(log, (str, Path)):
        try:
            log = json.loads(Path(log).read_text())
        except (OSError, ValueError) as why:
            raise OptionError(f"minifuse option 'fusion_log': cannot read {log}: {why}") from why
    if not isinstance(log, (list, tuple)):
        raise OptionError(f"minifuse option 'fusion_log': expected a list of fusions, found {type(log).__name__}")
    found = []
    for k, entry in enumerate(log):
        fields = {name: entry.get(name) for name in Entry.__dataclass_fields__} if isinstance(entry, Mapping) else {}
        if not fields or not all(isinstance(v, str) for v in fields.values()) or fields["rule"] not in TAKEN:
            wanted = f"rule ({', '.join(TAKEN)}), graph, first and second"
            raise OptionError(f"minifuse option 'fusion_log': entry {k} is {entry!r}, expected {wanted} as text")
        found.append(Entry(**{name: str(v) for name, v in fields.items()}))
    return tuple(found)


def given(ctx: CompileContext) -> list[Entry] | None:
    """What the log of the options says about a graph; None where it says nothing of it.

    Raises OptionError, as `read`.
    """
    entries = read(ctx.options.fusion_log or ())
    return [e for e in entries if e.graph == unnumbered(ctx.name)] or None
