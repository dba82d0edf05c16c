"""The dump of a training step: which files there are, what a kernel looks like, and one kernel run on its own.

python -m examples.read_the_dump [--dir DIRECTORY]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.norm, self.linear, self.drop = nn.LayerNorm(width), nn.Linear(width, width), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(nn.functional.gelu(self.linear(self.norm(x))))


def show(folder: Path) -> None:
    """What was written for one graph, its report, and the heaviest kernel run by its script."""
    print(f"\n== {folder.name}")
    print("  " + "  ".join(sorted(path.name for path in folder.iterdir())))
    print((folder / "report.txt").read_text())
    scripts = sorted(folder.glob("kernel_*.py"), key=lambda path: -len(path.read_text()))
    if scripts:
        done = subprocess.run([sys.executable, scripts[0]], capture_output=True, text=True, check=True)
        print(f"$ python {scripts[0].name}\n{done.stdout}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="minifuse", help="another backend writes no dump")
    parser.add_argument("--dir", help="where to keep the dump; a temporary directory by default")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        root = Path(options.dir or temporary)
        debug: dict[str, Any] = {"debug_dir": str(root)} if options.backend == "minifuse" else {}
        model = torch.compile(Block(), backend=options.backend, options=debug)
        model(torch.randn(64, 256, requires_grad=True)).sum().backward()
        print(f"{options.backend} wrote {len(list(root.iterdir()))} folders into {root}")
        for folder in sorted(root.iterdir(), reverse=True):
            show(folder)


if __name__ == "__main__":
    main()
