"""The debug dump: a folder a graph, with every stage, the sources and the decisions."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from .ir.kernel import Plan
from .ir.text import print_plan
from .records import Record


def write(record: Record, root: str) -> Path:
    """Write one graph's folder under `root` and return its path. A disk that refuses is not an error."""
    folder = Path(root) / record.name
    files = {f"{stage}.fx.py": text for stage, text in record.source.items()}
    for stage in ("lower", "fuse", "schedule", "memory"):
        plan = record.stages.get(stage)
        if isinstance(plan, Plan):
            files[f"plan_{stage}.txt"] = print_plan(plan)
    unit, host = record.stages.get("unit"), record.stages.get("program")
    if unit is not None and unit.source:
        files["kernels.c"] = unit.source
    if host is not None:
        files["program.py"] = host.source
    files["decisions.json"] = json.dumps([d.to_json() for d in record.decisions], indent=1)
    files["decisions.txt"] = "\n".join(map(str, record.decisions)) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            write_atomically(folder / name, text)
    except OSError:
        return folder
    return folder


def write_atomically(path: Path, text: str) -> None:
    """The whole file or none of it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w") as f:
            f.write(text)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
