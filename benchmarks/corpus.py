"""The rematerialisation problems of the model set, as JSON files without tensors, to be studied on any machine.

    python -m benchmarks.corpus FOLDER [--quick] [--models bert,llama] [--device H100]

FOLDER/NAME.json is `minifuse.remat.Problem.from_json`'s: a training step's joint graph, priced as fused by the rates of
`--device` (this machine's unless named).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import minifuse
from minifuse.ir.device import DEVICES
from minifuse.remat import Problem

from . import models


def problem_of(path: str, device: str = "auto") -> Problem:
    """The largest problem of a training step of `MODULE:CALLABLE`. Raises ValueError for a model without a backward."""
    model, args, kwargs = models.load(path)
    model.train()
    graphs = minifuse.captures(model, *args, compile_options={"device_model": device, "remat": "save_all"}, **kwargs)
    problems = [g.problem for g in graphs if g.problem is not None]
    if not problems:
        raise ValueError(f"{path}: expected a model to train, found no parameter that wants a gradient")
    return max(problems, key=lambda p: len(p.values))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--models", default="", help="comma-separated names")
    parser.add_argument("--device", default="auto", choices=("auto", *DEVICES))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for entry in models.select(options.quick, False, options.models):
        if entry.training:
            problem = problem_of(entry.path, options.device)
            path = options.folder / f"{entry.name}.json"
            path.write_text(problem.to_json())
            print(f"{path}  {len(problem.values)} values, {len(problem.required)} read by the backward")
    return 0


if __name__ == "__main__":
    sys.exit(main())
