"""The command `minifuse`.

minifuse cache [--dir DIR]                      what the disk cache holds
minifuse cache list [--dir DIR]                 its entries, the one used last first
minifuse cache clear [--dir DIR] [--older DAYS] drop them
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .ir.decision import bytes_text
from .runtime.cache import DEFAULT_LIMIT, default_dir, problem

DAY = 86_400.0
KINDS = {"graph": "compiled graphs", "device": "rates of this machine", "kernels": "compiled kernels"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; the exit status."""
    parser = argparse.ArgumentParser(prog="minifuse", description="The compiler's disk cache.")
    commands = parser.add_subparsers(dest="command", required=True)
    cache = commands.add_parser("cache", help="what the disk cache holds; list or clear it")
    cache.add_argument("action", nargs="?", choices=("show", "list", "clear"), default="show")
    cache.add_argument("--dir", default=None, help="its directory (default: $MINIFUSE_CACHE_DIR, else the user's)")
    cache.add_argument("--older", type=float, default=0.0, metavar="DAYS", help="clear what was not used for so long")
    chosen = parser.parse_args(arguments)
    if chosen.older and chosen.action != "clear":
        parser.error("--older goes with `minifuse cache clear`")
    return run(chosen.action, Path(chosen.dir or default_dir()).expanduser(), chosen.older)


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
