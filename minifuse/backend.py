"""The backend: what torch.compile calls, and what it gets back.

`minifuse_backend` checks the options and hands the captured graph to AOT autograd, which calls back
with a joint graph to partition and with forward, backward or inference graphs to compile.
"""

from __future__ import annotations

import functools
import itertools
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import fx

from . import compat, dump, warm
from .errors import FallbackError
from .forks import renewed
from .ir import device as devices
from .ir import prims  # noqa: F401 - registers the random operators before anything is captured
from .ir.device import DeviceModel
from .ir.plan import Plan
from .options import RECORDED_MODES, Options
from .passes.context import CompileContext, without_collection
from .passes.cse import merge_equal
from .passes.decompose import RESIZING, Decompositions
from .passes.fuse import Landed, landed
from .passes.lower import lower
from .passes.lower.externs import expected
from .passes.lower.nodes import source_line
from .passes.lower.pointwise import ROWS
from .passes.lower.structural import STRUCTURAL
from .passes.normalise import lay_out_gradients, replace_random
from .passes.pipeline import make_plan
from .passes.remat import partition
from .passes.remat.build import nbytes_of
from .records import RECORDS, Record
from .runtime import toolchain
from .runtime.build import begin
from .runtime.cuda_graphs import recorded
from .runtime.measure import cpu_model

Boxed = Callable[[list[Any]], Any]
_numbers = itertools.count()
_compiling = renewed(sys.modules[__name__], "_compiling", threading.RLock)


def minifuse_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a graph that Dynamo captured; `torch.compile(model, backend="minifuse")` calls this.

    Raises OptionError for an unknown option or mode.
    """
    chosen = Options.parse(options, mode)
    return compile_captured(gm, example_inputs, chosen)


minifuse_backend.reset = compat.forget_cuda_graphs  # type: ignore[attr-defined] # torch.compiler.reset calls it


def compile_captured(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    """Compile a captured graph as `options` say."""
    graph = Graph(f"graph{next(_numbers)}_{module_name(gm)}", options, eager_strides(gm))
    graph.keep("captured", gm)
    return run_aot(graph, gm, example_inputs)


def run_aot(graph: Graph, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """AOT autograd over a captured graph; it calls back `graph` for each stage."""
    dynamo, begin = compat.dynamo_seconds(), time.perf_counter()
    decompositions = Decompositions(graph.options.rng)
    with _compiling, without_collection(), compat.resizing_whole(RESIZING), graph.session(gm) as kept:
        wrap = compat.serializable if kept else lambda compiler: compiler
        graph.kept = kept
        aot = compat.aot_autograd(
            fw_compiler=wrap(graph.forward),
            bw_compiler=wrap(graph.backward),
            inference_compiler=wrap(graph.inference),
            partition_fn=graph.partition,
            decompositions=decompositions,
            keep_inference_input_mutations=True,
        )
        program = aot(gm, example_inputs)
        for finish in graph.unfinished:
            finish()
        mine = [r for r in RECORDS if r.name.startswith(f"{graph.name}_")]
        if mine:  # what torch took stands with the first that is compiled of the graph
            rest = time.perf_counter() - begin - sum(s for r in mine for s in r.seconds.values())
            apart = decompositions.seconds
            mine[0].seconds.update({"dynamo": dynamo, "aot": rest - apart, "decompose": apart})
        return program


class Graph:
    """The compile of one captured graph: the callbacks of AOT autograd, and what they share."""

    def __init__(self, name: str, options: Options, strides: list[tuple[Any, ...] | None]) -> None:
        self.name = name
        self.options = options
        self.strides = strides
        self.captured: dict[str, Any] = {}
        self.tangent_bytes = 0
        self.remat: CompileContext | None = None
        self.kept = False
        self.unfinished: list[Callable[[], None]] = []
        self.recorded = True

    def session(self, gm: fx.GraphModule) -> AbstractContextManager[bool]:
        """Where AOT autograd takes its results from, and keeps them; gives whether it does."""
        return warm.session(self.name, gm, self.options, model_of(gm, self.options), target_of(gm, self.options))

    def keep(self, stage: str, gm: fx.GraphModule) -> None:
        """Remember a graph as text for the dump, where one is written."""
        if self.options.debug_dir is not None:
            try:
                self.captured[stage] = gm.print_readable(print_output=False)
            except Exception as error:  # torch's printer, over whatever a graph's metadata holds
                dump.refuse(self.options.debug_dir, error)

    def context(self, stage: str, gm: fx.GraphModule) -> CompileContext:
        ctx = CompileContext(f"{self.name}_{stage}", stage, self.options, device=model_of(gm, self.options))
        if self.remat is not None and stage in ("forward", "backward"):
            ctx.stages["remat"] = self.remat.stages.get("remat")
            if stage == "forward":
                ctx.tangents = self.tangent_bytes
                ctx.seconds.update(self.remat.seconds)
            else:
                ctx.decisions.extend(self.remat.decisions)
        return ctx

    # -- AOT autograd's callbacks ----------------------------------------------------------------
    def partition(
        self, joint: fx.GraphModule, inputs: Sequence[Any], **kw: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Split the joint graph: which values the backward loads, which it recomputes."""
        ctx = self.remat = CompileContext(f"{self.name}_joint", "joint", self.options)
        with ctx.phase("normalise"):
            merge_equal(joint.graph)
            if self.options.rng == "fast":
                replace_random(joint.graph)
            lay_out_gradients(joint.graph, kw["num_fwd_outputs"], {*(kw.get("static_lifetime_input_indices") or ())})
            joint.recompile()
        self.keep("joint", joint)
        with ctx.phase("remat"):
            forward, backward, plan = partition(
                joint,
                inputs,
                policy=self.options.remat,
                budget=self.options.memory_budget,
                on_budget=self.options.on_budget,
                kernels=joint_kernels(joint, self.options),
                is_kernel=is_kernel,
                record=ctx.decisions.append,
                device=model_of(joint, self.options),
                **kw,
            )
        ctx.stages["remat"] = plan
        self.tangent_bytes = sum(nbytes_of(n) for n in joint.graph.nodes if compat.is_tangent(n))
        return forward, backward

    def forward(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Boxed:
        compat.keep_saved()
        return self.compile(gm, "forward", self.output_strides(gm))

    def inference(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Boxed:
        merge_equal(gm.graph)
        if self.options.rng == "fast":
            replace_random(gm.graph)
        gm.recompile()
        return self.compile(gm, "inference", self.output_strides(gm))

    def backward(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Boxed:
        """Compiled when it is first called: a forward that is never differentiated does not pay."""
        compiled = functools.partial(self.compile, gm, "backward", {})
        return compiled() if self.kept else Lazy(compiled)

    def output_strides(self, gm: fx.GraphModule) -> dict[int, tuple[Any, ...]]:
        """Eager's strides of the outputs that the user sees, by position in the graph's outputs."""
        meta = compat.forward_metadata()
        if meta is None:
            return {}
        first = compat.count_mutated_inputs(meta)
        outputs = gm.graph.output_node().args[0]
        found = {}
        for k, stride in enumerate(self.strides):
            at = first + k
            if stride is None or at >= len(outputs):  # type: ignore[arg-type]
                continue
            node = outputs[at]  # type: ignore[index]
            val = node.meta.get("val") if isinstance(node, fx.Node) else None
            if isinstance(val, torch.Tensor) and val.dim() == len(stride):
                found[at] = stride
        return found

    def compile(self, gm: fx.GraphModule, stage: str, strides: dict[int, tuple[Any, ...]]) -> Boxed:
        with _compiling:
            ctx = self.context(stage, gm)
            self.keep(stage, gm)
            gm.graph.eliminate_dead_code()
            if target_of(gm, self.options) == "c" and toolchain.find(self.options.precise) is None:
                warn_no_compiler()
                return boxed(gm)
            plan = make_plan(gm.graph, ctx, strides)
            report_fallbacks(plan, ctx)
            if stage != "backward":
                report_sizes(gm, ctx)
            finish = begin([(plan, ctx)])
            record = Record(
                ctx.name, stage, ctx.stages, ctx.decisions, ctx.seconds, options=self.options, device=ctx.device
            )
            record.source.update(self.captured)

            def build() -> Any:
                (program,) = finish()
                report_interpreted(ctx)
                called: Boxed = program
                if self.options.mode in RECORDED_MODES:
                    called = recorded(program, gm, ctx, self.recorded)
                    self.recorded = called is not program
                RECORDS.append(record)
                if self.options.debug_dir is not None:
                    dump.write(record, self.options.debug_dir, self.options)
                return called

            if not self.kept:
                return build()
            compiled = warm.CompiledGraph(record, build)
            self.unfinished.append(compiled.finish)
            return compiled


class Lazy:
    """A program that is compiled at its first call."""

    def __init__(self, make: Callable[[], Boxed]) -> None:
        self._boxed_call = True  # on the instance: wrappers copy its dictionary alone
        self.make: Callable[[], Boxed] | None = make
        self.program: Boxed | None = None

    def __call__(self, args: list[Any]) -> Any:
        if self.program is None:
            with _compiling:
                if self.program is None and self.make is not None:
                    self.program = self.make()
                    self.make = None
        assert self.program is not None
        return self.program(args)


def boxed(gm: fx.GraphModule) -> Boxed:
    """The graph run by ATen, op by op."""

    def call(args: list[Any]) -> Any:
        taken = list(args)
        args.clear()
        return fx.Interpreter(gm).boxed_run(taken)

    call._boxed_call = True  # type: ignore[attr-defined]
    return call


def is_kernel(node: fx.Node) -> bool:
    """Whether an operator lowers to generated code."""
    return node.target in ROWS or node.target in STRUCTURAL


def joint_kernels(joint: fx.GraphModule, options: Options) -> dict[str, Landed]:
    """The fused kernel that each node of the joint graph lands in: the joint graph lowered and fused once."""
    ctx = CompileContext("joint", "joint", options, device=model_of(joint, options))
    return landed(lower(joint.graph, ctx, {}), ctx)


def gpu_of(gm: fx.GraphModule) -> torch.device | None:
    """The first GPU that a graph's tensors are on."""
    values = (node.meta.get("val") for node in gm.graph.nodes)
    return next((v.device for v in values if isinstance(v, torch.Tensor) and v.device.type == "cuda"), None)


def target_of(gm: fx.GraphModule, options: Options) -> str:
    """What a graph's kernels are written in."""
    if options.target != "auto":
        return options.target
    return "c" if gpu_of(gm) is None else "triton"


def model_of(gm: fx.GraphModule, options: Options) -> DeviceModel:
    """The rates of the device that the options name, or that a graph runs on: an H100's for an unknown GPU."""
    if options.device_model != "auto":
        return devices.DEVICES[options.device_model]
    gpu = gpu_of(gm)
    if gpu is None:
        return cpu_model(options.cache_dir)
    name = torch.cuda.get_device_name(gpu) if torch.cuda.is_available() else ""
    return devices.named(name) or devices.DEVICES["H100"]


def report_fallbacks(plan: Plan, ctx: CompileContext) -> None:
    """Record what goes to ATen, and apply the `fallback` option to what goes there without being meant to.

    Raises FallbackError, naming operator, reason and the user's line, with fallback="error".
    """
    warned: set[str] = set()
    for step in plan.externs:
        target, where = str(step.target), plan.origins.get(step.origin, "")
        meant = expected(step.target) is not None or (step.effect and ctx.options.rng == "eager" and draws(step.target))
        ctx.record("extern", step.origin, taken=True, reason="{target}: {why}", target=target, why=step.reason,
                   fallback=not meant, where=where)  # fmt: skip
        if meant or ctx.options.fallback == "allow" or target in warned:
            continue
        warned.add(target)
        say_fallback(ctx, f"minifuse hands {target} to PyTorch: {step.reason}", where)


def report_sizes(gm: fx.GraphModule, ctx: CompileContext) -> None:
    """Record which sizes a graph is compiled for all of, and which of them a line has made a number or another size."""
    lines = {source_line(n) for n in gm.graph.nodes}
    for s in compat.traced_sizes():
        span = f"{s.low} and more" if s.high is None else f"{s.low} to {s.high}"
        # the number of a line that no operator comes from is not known when the graph is read from the cache
        where = s.where if s.where in lines else re.sub(r":\d+", ":", s.where, count=1)
        reason = "one kernel for {span}, planned for {hint}"
        if s.fixed:
            reason = "fixed at {became}, for others the graph is compiled anew"
        ctx.record("size", s.source, taken=not s.fixed, reason=reason, where=where, span=span, hint=s.hint,
                   became=s.fixed)  # fmt: skip


def report_interpreted(ctx: CompileContext) -> None:
    """Apply the `fallback` option to kernels that no code could be made for.

    Raises FallbackError, naming kernel, reason and the user's line, with fallback="error".
    """
    found = [d for d in ctx.decisions if d.rule == "interpreted"]
    for d in found if ctx.options.fallback != "allow" else ():
        say_fallback(ctx, f"minifuse interprets {d.subject[0]}, op by op: {d.words}", d.where)


def say_fallback(ctx: CompileContext, message: str, where: str) -> None:
    """Warn, or raise FallbackError with fallback="error"."""
    message += f" ({where})" if where else ""
    if ctx.options.fallback == "error":
        raise FallbackError(message)
    warnings.warn(message, stacklevel=3)


def draws(target: Any) -> bool:
    """Whether an operator takes numbers from a generator."""
    return torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())


@functools.cache
def warn_no_compiler() -> None:
    warnings.warn(
        "minifuse found no C compiler and runs each operator by ATen; results are right, nothing is fused. "
        "Install gcc or clang (Debian: apt-get install gcc; Fedora: dnf install gcc; macOS: xcode-select --install).",
        stacklevel=2,
    )


def eager_strides(gm: fx.GraphModule) -> list[tuple[Any, ...] | None]:
    """The strides that eager gives each output, from the tensors that Dynamo traced with."""
    found: list[tuple[Any, ...] | None] = []
    for arg in gm.graph.output_node().args[0]:  # type: ignore[union-attr]
        val = arg.meta.get("example_value") if isinstance(arg, fx.Node) else None
        strided = isinstance(val, torch.Tensor) and val.layout is torch.strided
        found.append(tuple(val.stride()) if strided else None)  # type: ignore[union-attr]
    return found


def module_name(gm: fx.GraphModule) -> str:
    """The part of the model that a graph is, as a word for file names: the innermost module that holds all of it, with
    its path, or else the file and the function that it was traced from."""
    calls = [n for n in gm.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    stacks = [tuple((n.meta.get("nn_module_stack") or {}).values()) for n in calls]
    shared = [level[0] for level in zip(*stacks, strict=False) if len(set(level)) == 1]
    if shared:
        path, kind = shared[-1]
        inner = path.partition(".")[2]
        name = f"{kind if isinstance(kind, str) else kind.__name__}_{inner}"
    else:
        trace = next((n.stack_trace for n in calls if n.stack_trace), "")
        frames = re.findall(r'File "(?:.*[\\/])?([^"]*?)(?:\.py)?", line \d+, in (\S+)', trace)
        # a decorator may stand in front of the module's own function
        frame = next((f for f in frames if f[1] == "forward"), frames[0] if frames else ("function",))
        name = "_".join(frame)
    return re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")[:80]
