"""`python -m tests.conformance`: every operator of PyTorch's database against eager; prints what fails."""

from __future__ import annotations

import argparse
import json
import os
import queue
import selectors
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .known import is_known
from .run import DTYPES, Failure, Job, check, operators

# Seconds for one operator: torch traces some convolutions with dynamic shapes for minutes.
TIMEOUT = 900.0


def serve() -> None:
    """Answer jobs, a line of JSON each, until the input ends."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    replies = sys.stdout
    sys.stdout = sys.stderr
    for line in sys.stdin:
        found = check(Job(**json.loads(line)))
        replies.write(json.dumps([asdict(f) for f in found]) + "\n")
        replies.flush()


class Worker:
    """A process that checks operators; one that crashes or hangs costs its job, and is replaced."""

    def __init__(self, environment: dict[str, str]) -> None:
        command = [sys.executable, "-m", "tests.conformance", "--serve"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env={**os.environ, **environment}
        )
        self.done = 0

    def ask(self, job: Job) -> list[Failure]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(asdict(job)) + "\n")
        self.process.stdin.flush()
        with selectors.DefaultSelector() as ready:
            ready.register(self.process.stdout, selectors.EVENT_READ)
            line = self.process.stdout.readline() if ready.select(TIMEOUT) else ""
        self.done += 1
        if line:
            return [Failure(**f) for f in json.loads(line)]
        code = self.process.poll()
        why = f"took over {TIMEOUT:.0f} s" if code is None else f"the process ended with {code}"
        self.stop()
        return [Failure(job.op, job.dtype, job.dynamic, -1, "crash", why)]

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def run(jobs: list[Job], processes: int) -> Iterator[tuple[Job, list[Failure]]]:
    """Each job with its failures, as they come."""
    environment = {"TRITON_INTERPRET": "1"} if any(job.target == "triton" for job in jobs) else {}
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    finished: queue.SimpleQueue[tuple[Job, list[Failure]]] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)

    def work() -> None:
        worker = Worker(environment)
        try:
            while True:
                job = waiting.get_nowait()
                # What torch keeps of each compile adds up.
                if worker.process.poll() is not None or worker.done == 100:
                    worker.stop()
                    worker = Worker(environment)
                finished.put((job, worker.ask(job)))
        except queue.Empty:
            worker.stop()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(processes)]
    for thread in threads:
        thread.start()
    for _ in jobs:
        yield finished.get()


def _list(cases: Iterable[tuple[str, str]]) -> str:
    """Operators and their dtypes, in order."""
    return ", ".join(f"{op} ({dtype})" for op, dtype in sorted(cases)) or "none"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("names", nargs="*", help="operators (all by default), or the beginnings of their names")
    parser.add_argument("--dtype", nargs="*", default=["float32"], choices=DTYPES)
    parser.add_argument("--shapes", nargs="*", default=["static", "dynamic"], choices=["static", "dynamic"])
    parser.add_argument("--target", default="auto", help="of the kernels; triton runs in Triton's interpreter")
    parser.add_argument("--limit", type=int, default=8, help="samples an operator")
    parser.add_argument("--part", default="0/1", help="k/n: every n-th operator from the k-th")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve()
        return 0
    part, parts = map(int, args.part.split("/"))
    table: dict[str, Any] = operators()
    names = [n for n in table if not args.names or any(n.startswith(m) for m in args.names)][part::parts]
    jobs = [Job(n, d, s == "dynamic", args.limit, args.target) for n in names for d in args.dtype for s in args.shapes
            if table[n].supports_dtype(DTYPES[d], "cpu")]  # fmt: skip
    failures: list[Failure] = []
    begin = time.perf_counter()
    for k, (job, found) in enumerate(run(jobs, args.jobs), 1):
        failures += found
        for f in found:
            print(f, flush=True)
        if k % 50 == 0:
            print(f"-- {k} of {len(jobs)}, {time.perf_counter() - begin:.0f} s, last {job.op}", flush=True)
    failing = {(f.op, f.dtype) for f in failures if f.kind != "torch"}
    bad = [case for case in failing if not is_known(*case)]
    better = {(job.op, job.dtype) for job in jobs if is_known(job.op, job.dtype)} - failing
    print(f"{len({op for op, _ in failing})} of {len(names)} operators fail in {time.perf_counter() - begin:.0f} s")
    print(f"not known to fail: {_list(bad)}")
    print(f"known to fail that did not: {_list(better)}")
    if args.json:
        args.json.write_text(json.dumps([asdict(f) for f in failures], indent=1))
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
