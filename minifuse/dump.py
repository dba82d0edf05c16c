"""The debug dump: a folder a graph, with every stage, the sources, the decisions and a script for each kernel.

captured.fx.py joint.fx.py forward.fx.py backward.fx.py inference.fx.py     the graph, as FX prints it
plan_lower.txt plan_fuse.txt plan_schedule.txt plan_batch.txt plan_memory.txt     the plan after each pass
plan_join.txt                                                               the plan with its joins in place, unfused
kernels.c program.py                                                        the code that runs
decisions.json decisions.txt report.txt report.json report.html             what was chosen and why
saved.txt                               of a backward: each activation, and how the backward gets it
kernel_NAME.py                                                              runs, checks and times one kernel
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

from .explain import html
from .explain.replay import kernel_script
from .explain.report import Report
from .ir.plan import Plan
from .ir.text import print_plan
from .options import Options
from .passes import pipeline
from .records import Record
from .runtime.cache import write_atomically

SAVED_WIDTH = 180
REPLAYED_OPTIONS = ("target", "precise", "widen")
_refused: set[str] = set()


def write(record: Record, root: str, options: Options | None = None) -> Path:
    """Write one graph's folder under `root` and return its path.

    A disk that refuses, and a stage that cannot be printed, are one warning a directory, never an error: the compile
    goes on.
    """
    folder = Path(root) / record.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in contents(record, options or Options()).items():
            write_atomically(folder / name, text.encode(errors="backslashreplace"))
    except Exception as error:  # printing walks all that a compile made, and nothing hangs on its text
        refuse(root, error)
    return folder


def refuse(root: str, error: Exception) -> None:
    """Say, once a directory, that a dump is not whole."""
    if root not in _refused:
        _refused.add(root)
        said = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        warnings.warn(f"minifuse writes no dump into {root}: {said}", stacklevel=3)


def contents(record: Record, options: Options) -> dict[str, str]:
    """The files of a dump: name to text."""
    files = {f"{stage}.fx.py": text for stage, text in record.source.items()}
    for stage in ("lower", "join", *(p.name for p in pipeline.PASSES)):
        plan = record.stages.get(stage)
        if isinstance(plan, Plan):
            files[f"plan_{stage}.txt"] = print_plan(plan)
    unit, host = record.stages.get("unit"), record.stages.get("program")
    if unit is not None and unit.source:
        files["kernels.c"] = unit.source
    if "triton" in record.stages:
        files["kernels.py"] = record.stages["triton"]
    if host is not None:
        files["program.py"] = host.source
    files["decisions.json"] = json.dumps([d.to_json() for d in record.decisions], indent=1)
    files["decisions.txt"] = "".join(f"{d}\n" for d in record.decisions)
    final = record.stages.get("memory")
    if isinstance(final, Plan):
        report = Report(record)
        files["report.txt"] = f"{report}\n"
        files["report.json"] = json.dumps(report.to_json(), indent=1)
        files["report.html"] = html.render(report)
        saved = report.saved_table() if record.stage == "backward" else None
        if saved is not None:
            files["saved.txt"] = f"{saved.text(SAVED_WIDTH)}\n"
        chosen = {name: getattr(options, name) for name in REPLAYED_OPTIONS}
        for launch in final.launches:
            name = re.sub(r"[^A-Za-z0-9_]", "_", launch.name)
            files.setdefault(f"kernel_{name}.py", kernel_script(final, launch, chosen))
    return files
