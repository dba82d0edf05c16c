"""From a plan to a program: kernels written, compiled once by content, loaded, and wired together."""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from minifuse.codegen.printer import CodegenError
from minifuse.codegen.program import HostProgram, write_program
from minifuse.codegen.unit import KernelText, Unit, write_kernel, write_unit
from minifuse.errors import CompileError
from minifuse.ir.plan import Launch, Plan, launch_traffic
from minifuse.options import Options
from minifuse.passes.context import CompileContext
from minifuse.passes.schedule_triton import target
from minifuse.records import Record

from . import toolchain, triton_launch
from .loading import Loading
from .program import Program
from .triton_tune import tuned

Run = list[tuple[int, Launch, KernelText]]
Jobs = Sequence[tuple[Plan, CompileContext]]


def build(plan: Plan, ctx: CompileContext) -> Program:
    """Compile a placed plan for its target. A kernel that C cannot express or compile is interpreted,
    alone, and the decisions say so."""
    return build_all([(plan, ctx)])[0]


def build_all(jobs: Jobs) -> list[Program]:
    """`build` for several plans of one toolchain with one C unit, compiled once: the start of a
    compiler costs more than the kernels of a small graph. The time is the first job's."""
    return begin(jobs)()


def begin(jobs: Jobs) -> Callable[[], list[Program]]:
    """Start what `build_all` does: the C compiler runs beside what comes next. Gives what waits for it."""
    first = jobs[0][1]
    targets = [target(plan, ctx.options) for plan, ctx in jobs]
    if "triton" in targets:  # a graph's forward may be on one device and its backward on another
        made = [
            triton_launch.build(tuned(plan, ctx), ctx) if kind == "triton" else build(plan, ctx)
            for (plan, ctx), kind in zip(jobs, targets, strict=True)
        ]
        return lambda: made
    tools = None if first.options.target == "interpret" else toolchain.find(first.options.precise)
    with first.phase("codegen"):
        texts = [write_all(plan, ctx) if tools is not None else {} for plan, ctx in jobs]
    plans = [plan for plan, _ in jobs]
    unit, runs = assemble(plans, texts, tools)
    hosts = write_hosts(jobs, unit, runs)
    if tools is None or not unit.functions:
        return functools.partial(programs, jobs, unit, runs, hosts, None)
    first.stages["compiler seconds"] = 0.0
    # behind a forward its backward is planned, on a processor of its own
    loading = Loading(unit.source, tools, first.options.cache_dir, int(first.stage == "forward"))

    def finish() -> list[Program]:
        with first.phase("compile"):
            try:
                library = loading.result()
                first.stages["compiler seconds"] = loading.seconds
            except CompileError as error:
                if len(jobs) > 1:
                    return [build(plan, ctx) for plan, ctx in jobs]
                less = [without_broken(plans[0], texts[0], tools, first, error)]
            else:
                return programs(jobs, unit, runs, hosts, library)
            rest, mine = assemble(plans, less, tools)
            library = Loading(rest.source, tools, first.options.cache_dir).result() if rest.functions else None
            return programs(jobs, rest, mine, write_hosts(jobs, rest, mine), library)

    return finish


def write_hosts(jobs: Jobs, unit: Unit, runs: Sequence[list[Run]]) -> list[HostProgram]:
    """The host program of each plan, whose runs are the unit's in order."""
    found, at = [], 0
    for (plan, ctx), mine in zip(jobs, runs, strict=True):
        run_of = {i: k for k, run in enumerate(mine) for i, _, _ in run}
        own = slice(at, at + len(mine))
        limited = ctx.options.memory_budget != 1
        host = write_program(plan, unit.binding[own], unit.symbols, run_of, unit.threads[own], ctx.tangents, limited)
        ctx.stages["unit"], ctx.stages["program"] = unit, host
        found.append(host)
        at += len(mine)
    return found


def programs(
    jobs: Jobs, unit: Unit, runs: Sequence[list[Run]], hosts: Sequence[HostProgram], library: Any
) -> list[Program]:
    """The programs of plans whose unit is loaded."""
    found, at = [], 0
    for (plan, ctx), mine, host in zip(jobs, runs, hosts, strict=True):
        own = slice(at, at + len(mine))
        at = own.stop
        found.append(wired(plan, host, unit, own, library, ctx.stages, ctx.options))
    return found


def wired(
    plan: Plan, host: HostProgram, unit: Unit, own: slice, library: Any, stages: Mapping[str, Any], options: Options
) -> Program:
    """A plan's program: its part of a loaded unit's functions behind its host program."""
    functions = [entry(library, name) for name in unit.functions[own]]
    return Program(plan, host, functions, unit.binding[own], unit.symbols, unit.messages[own],
                   stages.get("constants", {}), options.deterministic)  # fmt: skip


def restore(record: Record) -> Program:
    """The program of a graph that an earlier process compiled for C: its library from the disk, or from the compiler.

    Raises CompileError where neither has it.
    """
    stages, options, library = record.stages, record.options, None
    unit = stages["unit"]
    if unit.functions:
        tools = toolchain.find(options.precise)
        if tools is None:
            raise CompileError(("find",), "there is no C compiler any more", unit.source)
        library = Loading(unit.source, tools, options.cache_dir).result()
    return wired(stages["memory"], stages["program"], unit, slice(None), library, stages, options)


def write_all(plan: Plan, ctx: CompileContext) -> dict[int, KernelText]:
    """The C of each launch, by step. Launches of one kernel share their text."""
    texts: dict[int, KernelText] = {}
    by_kernel: dict[Any, KernelText | None] = {}
    for i, step in enumerate(plan.steps):
        if not isinstance(step, Launch):
            continue
        key = (step.kernel, step.schedule)
        if key not in by_kernel:
            try:
                by_kernel[key] = write_kernel(step)
            except CodegenError as why:
                by_kernel[key] = None
                ctx.record("interpreted", step.name, taken=True, reason="{why}", why=str(why),
                           where=plan.origins.get(step.name, ""))  # fmt: skip
        text = by_kernel[key]
        if text is not None:
            texts[i] = text
    return texts


def assemble(
    plans: Sequence[Plan], texts: Sequence[dict[int, KernelText]], tools: toolchain.Toolchain | None
) -> tuple[Unit, list[list[Run]]]:
    """Group each plan's launches between other steps into runs, and write the unit that holds them all."""
    runs = [group_runs(plan, by_step) if tools is not None else [] for plan, by_step in zip(plans, texts, strict=True)]
    if tools is None:
        return Unit("", (), (), (), (), ()), runs
    moved: dict[int, int] = {}
    for plan, mine in zip(plans, runs, strict=True):
        moved.update({id(launch): launch_traffic(plan, launch).total for run in mine for _, launch, _ in run})
    pairs = [[(launch, text) for _, launch, text in run] for mine in runs for run in mine]
    return write_unit(pairs, tools.maths, tools.openmp, lambda launch: moved[id(launch)]), runs


def group_runs(plan: Plan, texts: dict[int, KernelText]) -> list[Run]:
    """The launches that one call into C does: those with a text and no other step between them."""
    steps: Any = plan.steps
    return [[(i, steps[i], texts[i]) for i in run] for run in plan.runs(texts)]


def entry(library: Any, name: str) -> Callable[..., int]:
    function = getattr(library, name)
    function.restype = ctypes.c_int64
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    return function


def without_broken(
    plan: Plan, texts: dict[int, KernelText], tools: toolchain.Toolchain, ctx: CompileContext, error: CompileError
) -> dict[int, KernelText]:
    """The texts less those that the compiler refuses, each tried alone."""
    broken: set[str] = set()
    for i, text in texts.items():
        if text.name in broken:
            continue
        step = plan.steps[i]
        assert isinstance(step, Launch)
        alone = write_unit([[(step, text)]], tools.maths, tools.openmp, lambda launch: 0)
        try:
            toolchain.compile_shared(alone.source, tools)
        except CompileError as why:
            broken.add(text.name)
            ctx.record("interpreted", step.name, taken=True, reason="the C compiler refused it: {why}",
                       why=str(why)[:2000], where=plan.origins.get(step.name, ""))  # fmt: skip
    if not broken:
        warnings.warn(f"minifuse runs a graph op by op: {error}", stacklevel=2)
        ctx.record("interpreted", ctx.name, taken=True, reason="the C compiler fails: {why}", why=str(error)[:2000])
        return {}
    return {i: text for i, text in texts.items() if text.name not in broken}
