"""Rematerialisation: every policy at every budget, predicted beside measured, on the model set.

    python -m benchmarks.remat [--quick] [--models bert,llama] [--policies default,mincut] [--budgets 1,.5,.2]
                               [--seconds 10] [--plugins] [--torch] [--json FILE] [--check]

A model is captured once; its training graph is then compiled under each plan that differs and timed on the inputs that
the captured step had, by itself: forward, then backward. Memory is counted in a whole step. Model and loss are compiled
as one. A row is a plan:

* `predicted` and `measured` peak: the most bytes that the step holds beyond model and inputs, by the plan's simulator
  and by the kernel's count of resident pages (see `harness.held`); `planned` is what the compiled plans need.
  What is planned for a budget below 1 is run with it: the pool keeps less idle memory then.
* `step`: seconds as the model of the device predicts them and as measured (interleaved medians,
  each plan in memory of its own), each over save_all's.
* `flops`: of what is recomputed, of all of the step's; `plan`: seconds that the policy took; `gap`: of the step that
  the plan may be from the best, where the policy proved a bound.
* `equal`: whether every gradient, dropout included, has the bits of save_all's.

`--plugins` adds the policies of `examples/remat_policies`; `--torch` adds rows of torch's own
`activation_memory_budget` (backend `aot_eager_decomp_partition`): peak, and the share of gradients that are those of
its budget 1. Policies that search have `--seconds`. Budgets are shares of eager's peak as predicted; a plan above it is
marked `over`.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from minifuse.backend import Boxed, Graph, eager_strides, minifuse_backend, run_aot
from minifuse.capturing import copied
from minifuse.errors import RematError
from minifuse.explain.curves import BUDGETS, limited
from minifuse.options import Options
from minifuse.passes.memory import peak
from minifuse.passes.remat.plan import gap
from minifuse.passes.remat.policies import FunctionPolicy
from minifuse.records import RECORDS
from minifuse.remat import POLICIES, Problem, RematPlan, RematPolicy, eager_peak, limit_of, verify_plan
from minifuse.runtime.cache import default_dir

from . import harness, models
from .harness import Board, Column, ProbeError, Target

PLUGINS = {
    "kusumoto_dp": "KusumotoDP",
    "moccasin": "Moccasin",
    "dtr_greedy": "DTRGreedy",
    "xla_greedy": "XLAGreedy",
    "offload_hybrid": "OffloadHybrid",
}
ROUNDS = 7


def board(title: str) -> Board:
    return Board(
        title,
        [
            Column("predicted peak", harness.megabytes),
            Column("planned peak", harness.megabytes),
            Column("measured peak", harness.megabytes),
            Column("measured of predicted", harness.ratio, Target("<=", 1.05)),
            Column("predicted of measured", harness.ratio, Target("<=", 1.05)),
            Column("of eager ratio", harness.ratio),
            Column("predicted step ratio", harness.ratio),
            Column("step ratio", harness.ratio),
            Column("step", lambda s: f"{1e3 * s:.4g} ms"),
            Column("saved", harness.megabytes),
            Column("host", harness.megabytes),
            Column("flops", "{:.1%}".format),
            Column("plan", harness.seconds),
            Column("gap", "{:.2%}".format),
            Column("budget", str),
            Column("equal", "{:.0f}".format, Target(">=", 1.0)),
        ],
    )


@dataclass(frozen=True)
class Fixed:
    """A policy that gives one plan, whatever it is asked."""

    answer: RematPlan

    @property
    def name(self) -> str:
        return self.answer.policy

    def plan(self, problem: Problem) -> RematPlan:
        return self.answer


class Captured(Graph):
    """A compile that remembers its joint graph, and what the programs are called with."""

    joint: fx.GraphModule
    asked: dict[str, Any]
    primals: list[Any]
    tangents: list[Any]

    def partition(
        self, joint: fx.GraphModule, inputs: Sequence[Any], **kw: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        self.asked = {k: v for k, v in kw.items() if k in ("num_fwd_outputs", "static_lifetime_input_indices")}
        self.joint = copied(joint)
        return super().partition(joint, inputs, **kw)

    def forward(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Boxed:
        return self.watched(super().forward(gm, inputs), lambda args: setattr(self, "primals", [*args]))

    def backward(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Boxed:
        count = sum(n.op == "placeholder" and "tangents" in n.name for n in gm.graph.nodes)
        return self.watched(super().backward(gm, inputs), lambda args: setattr(self, "tangents", args[-count:]))

    @staticmethod
    def watched(run: Boxed, see: Callable[[list[Any]], None]) -> Boxed:
        def call(args: list[Any]) -> Any:
            see(args)
            return run(args)

        call._boxed_call = True  # type: ignore[attr-defined]
        return call


class Bench:
    """A model's training graph, captured by one step, to be compiled under any plan."""

    def __init__(self, path: str) -> None:
        model, args, kwargs = models.load(path)
        graphs: list[Captured] = []
        problems: list[Problem] = []

        def keep_all(problem: Problem) -> RematPlan:
            problems.append(problem)
            return POLICIES["save_all"].plan(problem)

        options = replace(Options.parse(), remat=FunctionPolicy(keep_all))

        def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            graphs.append(Captured("bench", options, eager_strides(gm)))
            return run_aot(graphs[-1], gm, inputs)

        torch.compile(models.Loss(model.train()), backend=backend)(*args, **kwargs).backward()
        if len(problems) != 1 or len(graphs) != 1:
            raise ValueError(f"{path}: expected one graph with a backward, found {len(problems)} of {len(graphs)}")
        (self.graph,), (self.problem,) = graphs, problems

    def compile(self, plan: RematPlan, budget: float = 1.0) -> tuple[Callable[[], list[Any]], int]:
        """A step under a plan, which gives its gradients, and the bytes that its programs need."""
        options = replace(self.graph.options, remat=Fixed(plan), memory_budget=budget, on_budget="best")
        graph = Graph("bench", options, [])
        forward, backward = graph.partition(copied(self.graph.joint), [], **self.graph.asked)
        first = self.graph.asked["num_fwd_outputs"]
        runs = [graph.compile(forward, "forward", {}), graph.compile(backward, "backward", {})]
        needs = max(peak(r.stages["memory"])[0] for r in [*RECORDS][-2:])
        primals, tangents = self.graph.primals, self.graph.tangents

        @torch.no_grad()
        def run() -> list[Any]:
            torch.manual_seed(1)
            saved = [*runs[0]([*primals])[first:]]
            saved += [t.clone() if isinstance(t, Tensor) else t for t in tangents]
            return list(runs[1](saved))

        return run, needs


def plans_of(
    problem: Problem, names: Sequence[str], budgets: Sequence[float], seconds: float
) -> Iterator[dict[str, Any]]:
    """Each policy at each budget: the plan, its seconds, and whether it is within; or the error that it gave."""
    for name in names:
        policy = limited(policy_of(name), seconds)
        for budget in budgets:
            asked = replace(problem, memory_budget=budget, on_budget="best")
            begin = time.perf_counter()
            try:
                plan = policy.plan(asked)
                took = time.perf_counter() - begin
                verify_plan(asked, plan)
            except RematError as error:
                yield {"row": f"{name} {budget:g}", "error": str(error)}
                break
            row = f"{name} {budget:g}"
            within = plan.peak_bytes <= limit_of(asked)
            yield {"row": row, "plan": plan, "budget": budget, "took": took, "within": within}


def policy_of(name: str) -> RematPolicy:
    if name in POLICIES:
        return POLICIES[name]
    return getattr(importlib.import_module(f"examples.remat_policies.{name}"), PLUGINS[name])()


def probe(path: str, names: list[str], budgets: list[float], seconds: float, folder: str) -> dict[str, Any]:
    """The rows of a model but for measured peaks; the plans go to `folder`. Run it through `fresh`."""
    bench = Bench(path)
    problem = bench.problem
    flops = sum(v.flops for v in problem.values if v.kind == "extern")
    everything = POLICIES["save_all"].plan(problem)
    rows: dict[str, dict[str, Any]] = {}
    steps: dict[str, Callable[[], list[Any]]] = {}
    needs: dict[str, int] = {}
    made: dict[Any, str] = {}
    equal: dict[str, bool] = {}
    steps["save_all"], needs["save_all"] = bench.compile(everything)
    made[everything.saved, (), False] = "save_all"
    want = steps["save_all"]()
    for found in plans_of(problem, names, budgets, seconds):
        if "error" in found:
            rows[found["row"]] = {"error": found["error"]}
            continue
        plan: RematPlan = found["plan"]
        key = made.setdefault((plan.saved, plan.offloaded, found["budget"] < 1), found["row"])
        if key not in steps:
            steps[key], needs[key] = bench.compile(plan, found["budget"])
        if key not in equal:
            equal[key] = same(want, steps[key]())
            Path(folder, f"{len(equal) - 1}.json").write_text(plan.to_json())
        held = np.add(plan.timeline.total, plan.timeline.host or 0)
        rows[found["row"]] = {
            "key": key,
            "file": list(equal).index(key),
            "limited": found["budget"] < 1,
            "predicted_peak": int(held.max(initial=0)),
            "planned_peak": needs[key],
            "predicted_step_ratio": plan.step_seconds / everything.step_seconds,
            "saved": plan.saved_bytes,
            "host": plan.offloaded_bytes,
            "flops": plan.extra_flops / flops if flops else 0.0,
            "plan": found["took"],
            "gap": gap(problem, plan),
            "budget": "within" if found["within"] else "over",
            "equal": float(equal[key]),
        }
    times = harness.interleaved(steps, ROUNDS, warmup=1, ready=alone)
    for row in rows.values():
        if "key" in row:
            row["step"] = times[row["key"]].median
            row["step_ratio"] = times[row["key"]].median / times["save_all"].median
    return {"rows": rows, "eager": eager_peak(problem)}


def alone(run: Callable[[], Any]) -> None:
    """Two runs of a plan in memory of its own: another's blocks fit it badly, and where its pages happen to lie is
    another matter in each round."""
    harness.give_back()
    run()
    run()


def same(one: Sequence[Any], two: Sequence[Any]) -> bool:
    """Whether two lists of results have the same bits, those that are no tensors aside."""
    pairs = [(a, b) for a, b in zip(one, two, strict=True) if isinstance(a, Tensor) or isinstance(b, Tensor)]
    return all(isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b) for a, b in pairs)


def probe_peaks(path: str, plans: Sequence[tuple[str, bool]]) -> list[int]:
    """Bytes of a training step of the model under each plan, the path of a file or a policy's name, and whether it was
    made for a budget. Run it through `fresh` with `COUNTED`."""
    model, args, kwargs = models.load(path)
    found = []
    for plan, budgeted in plans:
        budget = {"memory_budget": 0.0, "on_budget": "best"} if budgeted else {}
        options = {"remat": plan, "plan_cache": False, **budget}
        run = torch.compile(models.Loss(model.train()), backend=functools.partial(minifuse_backend, options=options))
        step = stepper(model, run, args, kwargs)
        found.append(harness.held(step))
        step.clear()  # gradients may lie in memory of the pool, which gives back what is free
        del run, step
        torch._dynamo.reset()
        harness.give_back()
    return found


def stepper(model: torch.nn.Module, run: Callable[..., Any], args: Any, kwargs: Any) -> models.Step:
    """From no gradients to all, with the same random numbers each time."""

    def train() -> None:
        step.clear()
        torch.manual_seed(1)
        run(*args, **kwargs).backward()

    step = models.Step(train, list(model.parameters()))
    return step


def probe_torch(path: str, budget: float) -> dict[str, float]:
    """torch's own budget: the bytes of a step, and the share of gradients whose bits are those of its budget 1. Run it
    through `fresh` with `COUNTED`."""
    model, args, kwargs = models.load(path)
    model.train()

    def compiled(budget: float) -> models.Step:
        torch._dynamo.reset()
        torch._functorch.config.activation_memory_budget = budget
        run = torch.compile(models.Loss(model), backend="aot_eager_decomp_partition")
        return stepper(model, run, args, kwargs)

    nbytes = harness.held(compiled(budget))
    found = [p.grad for p in model.parameters() if p.grad is not None]
    compiled(1.0)()
    want = [p.grad for p in model.parameters() if p.grad is not None]
    return {"measured_peak": nbytes, "equal": sum(map(torch.equal, want, found)) / len(want)}


def measure(entry: models.Entry, options: argparse.Namespace, names: list[str], budgets: list[float]) -> Board:
    table = board(f"Rematerialisation of {entry.name}")
    with TemporaryDirectory() as folder:
        cache = {"MINIFUSE_CACHE_DIR": default_dir()}  # rates are measured once, where nothing else runs
        try:
            found = harness.fresh(probe, entry.path, names, budgets, options.seconds, folder, env=cache)
            files = {r["file"]: r.pop("limited") for r in found["rows"].values() if "file" in r}
            plans = [(f"{folder}/{k}.json", limited) for k, limited in files.items()]
            counted = harness.fresh(probe_peaks, entry.path, plans, env={**cache, **harness.COUNTED})
            peaks = dict(zip(files, counted, strict=True))
        except ProbeError as error:
            table.fail(entry.name, error)
            return table
        for name, row in found["rows"].items():
            if "error" in row:
                table.fail(name, row["error"])
                continue
            most = peaks[row.pop("file")]
            row.pop("key")
            row = {k: v for k, v in row.items() if v is not None}
            table.add(name, measured_peak=most, **row, of_eager_ratio=most / found["eager"])
            ratios = most / row["predicted_peak"], row["predicted_peak"] / most
            table.add(name, measured_of_predicted=ratios[0], predicted_of_measured=ratios[1])
        if options.torch:
            for budget in budgets:
                name = f"torch {budget:g}"
                table.add(name, **harness.fresh(probe_torch, entry.path, budget, env=harness.COUNTED))
                table.hold(name, {"measured peak": Target(">=", 0)})
    return table


def main() -> int:
    parser = harness.arguments(__doc__)
    parser.add_argument("--models", default="", help="comma-separated names")
    parser.add_argument("--policies", default="", help="comma-separated names; all that ship unless given")
    parser.add_argument("--budgets", default=",".join(f"{b:g}" for b in BUDGETS))
    parser.add_argument("--seconds", type=float, default=10.0, help="of a policy that searches, a plan")
    parser.add_argument("--plugins", action="store_true", help="the policies of examples/remat_policies too")
    parser.add_argument("--torch", action="store_true", help="torch's activation_memory_budget too")
    options = parser.parse_args()
    names = options.policies.split(",") if options.policies else [*POLICIES, *(PLUGINS if options.plugins else ())]
    budgets = [float(b) for b in options.budgets.split(",")]
    boards: dict[str, Mapping[str, Any]] = {}
    short = 0
    for entry in models.select(options.quick, False, options.models):
        if entry.training:
            table = measure(entry, options, names, budgets)
            options_of_one = argparse.Namespace(**{**vars(options), "json": None, "check": True})
            short += harness.finish(table, options_of_one)
            boards[entry.name] = table.to_json()
            if options.json:  # what is measured is kept, if what comes next is cut off
                Path(options.json).write_text(json.dumps(boards, indent=1) + "\n")
    return int(options.check and short > 0)


if __name__ == "__main__":
    sys.exit(main())
