"""The command `minifuse`.

minifuse cache [--dir DIR]                      what the disk cache holds
minifuse cache list [--dir DIR]                 its entries, the one used last first
minifuse cache clear [--dir DIR] [--older DAYS] drop them
minifuse remat MODULE:CALLABLE                  every rematerialisation policy at every budget, as a table or a plot
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .errors import MinifuseError, OptionError
from .ir.decision import bytes_text
from .ir.device import DEVICES
from .ir.lazy import Deferred
from .runtime.cache import DEFAULT_LIMIT, default_dir, problem

if TYPE_CHECKING:
    from .passes.remat.problem import Problem

# These import torch, which takes seconds, and `minifuse cache` does without.
capturing, curves = Deferred("minifuse.capturing"), Deferred("minifuse.explain.curves")
remat, tables = Deferred("minifuse.remat"), Deferred("minifuse.explain.tables")

DAY = 86_400.0
KINDS = {"graph": "compiled graphs", "device": "rates of this machine", "kernels": "compiled kernels"}
TABLE_WIDTH, NARROW = 180, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; the exit status."""
    parser = argparse.ArgumentParser(prog="minifuse", description="The compiler's disk cache, and its policies.")
    commands = parser.add_subparsers(dest="command", required=True)
    cache = commands.add_parser("cache", help="what the disk cache holds; list or clear it")
    cache.add_argument("action", nargs="?", choices=("show", "list", "clear"), default="show")
    cache.add_argument("--dir", default=None, help="its directory (default: $MINIFUSE_CACHE_DIR, else the user's)")
    cache.add_argument("--older", type=float, default=0.0, metavar="DAYS", help="clear what was not used for so long")
    policies = commands.add_parser("remat", help="compare rematerialisation policies on a model, at every budget")
    policies.add_argument(
        "model",
        metavar="MODULE:CALLABLE",
        help="a function without arguments that returns (model, args) or (model, args, kwargs); or the path of a "
        "problem (.json) that Problem.to_json wrote",
    )
    policies.add_argument("--policies", help="names, plans (.json), MODULE:NAME, with commas (default: all that ship)")
    policies.add_argument("--budgets", help="shares of eager's peak from 0 to 1, or bytes (default: 1,.8,… to 0)")
    policies.add_argument("--device", choices=tuple(DEVICES), help="whose rates (default: this machine's)")
    policies.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    policies.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves: .png, .svg or .html")
    policies.add_argument("--seconds", type=float, help="limit of a search, a budget; of policies that take one")
    chosen = parser.parse_args(arguments)
    if chosen.command == "remat":
        try:
            return compare(chosen)
        except MinifuseError as error:
            parser.error(str(error))
    if chosen.older and chosen.action != "clear":
        parser.error("--older goes with `minifuse cache clear`")
    return run(chosen.action, Path(chosen.dir or default_dir()).expanduser(), chosen.older)


def compare(chosen: argparse.Namespace) -> int:
    """Every policy at every budget: the table, and the files that are asked for. 1 where no policy had a plan.

    Raises OptionError and RematError for what the command line names and is not there.
    """
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    if chosen.seconds is not None and chosen.seconds <= 0:
        raise OptionError(f"--seconds: got {chosen.seconds:g}, expected more than 0")
    asked = curves.policies_of(chosen.policies, chosen.seconds)
    budgets = curves.BUDGETS if chosen.budgets is None else curves.budgets_of(chosen.budgets)
    draw: Callable[..., bytes] | None = curves.plotter(chosen.plot) if chosen.plot else None
    problems = problems_of(chosen.model, chosen.device)
    errors = Console(stderr=True)
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task("planning", total=len(problems) * len(asked) * len(budgets))
        found = [
            curves.curve_of(name, each, asked, budgets, lambda n: progress.advance(task, n))
            for name, each in problems.items()
        ]
    out = Console()
    out = Console(width=max(out.width, NARROW))
    for curve in found:
        out.print(curve) if out.is_terminal else print(tables.printed(curve, TABLE_WIDTH))
    if chosen.json:
        chosen.json.write_text(json.dumps(curves.to_json(found), indent=1))
    if draw is not None:
        chosen.plot.write_bytes(draw(found))
    return 0 if any(c.points for c in found) else 1


def problems_of(path: str, device: str | None) -> dict[str, Problem]:
    """The problem of each graph with a backward, by name. Raises OptionError where there is none."""
    if path.endswith(".json"):
        try:
            read = remat.Problem.from_json(Path(path).read_text())
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OptionError(
                f"{path}: expected what Problem.to_json wrote; {type(error).__name__}: {error}"
            ) from error
        return {Path(path).stem: replace(read, device=DEVICES[device]) if device else read}
    model, args, kwargs = made(path)
    options = {"remat": "save_all", **({"device_model": device} if device else {})}
    graphs = capturing.captures(model, *args, compile_options=options, **kwargs)
    problems = {g.name: g.problem for g in graphs if g.problem is not None}
    if not problems:
        raise OptionError(f"{path}: expected a model to train, found no graph with a backward")
    return problems


def made(path: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The model that `MODULE:CALLABLE` makes, set to train, and its arguments."""
    make = curves.attribute(path)
    parts = make() if callable(make) else make
    if not isinstance(parts, tuple) or len(parts) not in (2, 3) or not callable(parts[0]):
        raise OptionError(f"{path}: expected a function that returns (model, args) or (model, args, kwargs), found "
                          f"{type(parts).__name__}")  # fmt: skip
    model, args, *rest = parts
    if callable(getattr(model, "train", None)):
        model.train()
    return model, tuple(args), dict(rest[0]) if rest else {}


def run(action: str, folder: Path, older: float) -> int:
    out = Console()
    if not folder.is_dir():
        out.print(f"{folder}: no such directory, nothing is cached")
        return 0
    if action == "clear" and (why := problem(folder)):
        out.print(f"nothing is cleared: {why}")
        return 1
    found = entries(folder)
    if action == "clear":
        gone = [path for path in found if time.time() - found[path][0] >= older * DAY]
        freed = sum(found[path][1] for path in gone)
        for path in gone:
            path.unlink(missing_ok=True)
        out.print(f"{len(gone)} of {len(found)} entries cleared, {bytes_text(freed)}")
        return 0
    table = Table(box=None, title=str(folder), title_justify="left")
    if action == "list":
        for column in ("entry", "kind", "bytes", "last used"):
            table.add_column(column, justify="right" if column == "bytes" else "left")
        for path, (used, nbytes) in sorted(found.items(), key=lambda item: -item[1][0]):
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(used))
            table.add_row(path.stem, KINDS[kind(path)], bytes_text(nbytes), when)
    else:
        for column in ("kind", "entries", "bytes"):
            table.add_column(column, justify="left" if column == "kind" else "right")
        for name, words in KINDS.items():
            mine = [nbytes for path, (_, nbytes) in found.items() if kind(path) == name]
            table.add_row(words, str(len(mine)), bytes_text(sum(mine)))
        total = sum(nbytes for _, nbytes in found.values())
        table.add_row("all", str(len(found)), f"{bytes_text(total)} of {bytes_text(DEFAULT_LIMIT)}")
    out.print(table)
    return 0


def entries(folder: Path) -> dict[Path, tuple[float, int]]:
    """When each entry was last used (seconds since the epoch), and its bytes."""
    found = {}
    for path in [*folder.glob("*.bin"), *folder.glob("triton/**/*.py")]:
        stat = path.stat()
        found[path] = (stat.st_mtime, stat.st_size)
    return found


def kind(path: Path) -> str:
    """A key of KINDS."""
    start = path.name.partition("_")[0]
    return start if start in KINDS else "kernels"
