"""The record of what the compiler chose and what it refused, as data; words are made when read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Decision(NamedTuple):
    """One choice: the rule that made it, what it was about, and the numbers behind it.

    `subject` names the FX nodes concerned. `reason` is a template over `facts`, rendered by `str`;
    `facts` holds plain values, bytes where a name ends in `bytes`. `where` is the user's line.
    """

    rule: str
    subject: tuple[str, ...]
    taken: bool
    reason: str
    facts: Mapping[str, Any] = {}
    where: str = ""

    @property
    def words(self) -> str:
        """The reason with its facts filled in."""
        return self.reason.format_map({k: _show(k, v) for k, v in self.facts.items()})

    def __str__(self) -> str:
        verdict = "taken" if self.taken else "refused"
        return f"{verdict:8}{' + '.join(self.subject)}  {self.rule}  {self.words}  {self.where}".rstrip()

    def to_json(self) -> dict[str, Any]:
        return {
            "rule": self.rule,
            "subject": list(self.subject),
            "taken": self.taken,
            "reason": self.words,
            "facts": {k: v if isinstance(v, (int, float, bool, str)) else str(v) for k, v in self.facts.items()},
            "where": self.where,
        }


def _show(name: str, value: Any) -> str:
    return bytes_text(value) if name.endswith("bytes") and isinstance(value, (int, float)) else str(value)


def bytes_text(n: float) -> str:
    """`1572864` as `1.57 MB`: decimal units, as in the report."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(n) >= size:
            return f"{n / size:.3g} {unit}"
    return f"{int(n)} B"
