"""Operators of the database that differ from eager, with the reason: `title of the OpInfo` -> why.

`python -m tests.conformance` counts these apart; one that no longer fails is to be taken out.
"""

KNOWN: dict[str, str] = {}
