"""`python -m tests.kernels`: the Triton kernels of the model set compiled for four GPUs, and the training steps of its
small families run in Triton's interpreter; prints what fails."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.assembled import TARGETS

from .run import NAMES, compiled, exact

# Seconds for one model on one of two cores.
TIMEOUT = 3600.0


def answer(args: argparse.Namespace) -> None:
    """One job in a process of its own: a line of JSON."""
    warnings.simplefilter("ignore")
    (name,) = args.names
    if args.serve == "compile":
        count, problems = compiled(name, args.targets, Path(args.claims))
    else:
        count, problems = 0, exact(name.partition("/")[2], draws=args.draws)
    print(json.dumps([count, problems]))


def ask(what: str, name: str, args: argparse.Namespace, claims: str) -> tuple[int, list[str]]:
    command = [sys.executable, "-m", "tests.kernels", name, "--serve", what, "--claims", claims]
    command += ["--draws", str(args.draws), "--targets", *args.targets]
    environment = {**os.environ, **({"TRITON_INTERPRET": "1"} if what == "run" else {})}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return 0, [f"took over {TIMEOUT:.0f} s"]
    if done.returncode:
        return 0, [f"the process ended with {done.returncode}: {done.stderr.strip()[-1000:]}"]
    count, problems = json.loads(done.stdout.splitlines()[-1])
    return count, problems


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kernels", description=__doc__)
    parser.add_argument("names", nargs="*", help="models (all by default), or the beginnings of their names")
    parser.add_argument("--what", nargs="*", default=["compile", "run"], choices=["compile", "run"])
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--draws", type=int, default=4, help="of weights, for each training step that is run")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--serve", choices=["compile", "run"], help=argparse.SUPPRESS)
    parser.add_argument("--claims", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        answer(args)
        return 0
    names = [n for n in NAMES if not args.names or any(n.startswith(m) for m in args.names)]
    jobs = [(w, n) for w in args.what for n in names if w == "compile" or n.startswith("families/")]
    begin, total, failing = time.perf_counter(), 0, []
    with tempfile.TemporaryDirectory() as claims, ThreadPoolExecutor(args.jobs) as pool:
        waiting = {job: pool.submit(ask, *job, args, claims) for job in jobs}
        for k, ((what, name), future) in enumerate(waiting.items(), 1):
            count, problems = future.result()
            total += count
            took = time.perf_counter() - begin
            print(f"{k} of {len(jobs)}, {took:.0f} s: {what} {name}: {count or ''} {problems or 'good'}", flush=True)
            if problems:
                failing.append(f"{what} {name}")
    print(f"{total} kernels compiled for {', '.join(args.targets)}; failing: {', '.join(failing) or 'none'}")
    return bool(failing)


if __name__ == "__main__":
    sys.exit(main())
