"""Writes docs/options.md from the docstrings of `minifuse.Options`: `python docs/make_options.py`."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from pathlib import Path

from minifuse import options

PAGE = Path(__file__).with_name("options.md")
HEAD = """# Options

Given to `torch.compile(model, backend="minifuse", options={...}, mode=...)`. An unknown name or value is an
`OptionError` that lists the valid ones. This page is written by `python docs/make_options.py`.

| option | default | meaning |
|---|---|---|
"""


def docstrings() -> dict[str, str]:
    """The string below each field of `Options`."""
    (cls,) = ast.parse(inspect.getsource(options.Options)).body
    assert isinstance(cls, ast.ClassDef)
    found: dict[str, str] = {}
    for field, below in zip(cls.body, cls.body[1:]):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            found[ast.unparse(field.target)] = " ".join(str(below.value.value).split())
    return found


def page() -> str:
    """The text of docs/options.md."""
    said = docstrings()
    fields = {f.name: f.default for f in dataclasses.fields(options.Options)}
    rows = [f"| `{name}` | `{default!r}` | {said[name]} |" for name, default in fields.items() if name != "mode"]
    modes = "".join(f"| `{name}` | {meaning} |\n" for name, meaning in options.MODES.items())
    return HEAD + "\n".join(rows) + f"\n\n## Modes\n\n| mode | meaning |\n|---|---|\n{modes}"


if __name__ == "__main__":
    PAGE.write_text(page())
