"""Triton programs: a plan's kernels as one readable module, compiled once by content, launched plainly.

The module lies in the cache directory, named by its content. On a GPU each kernel is compiled for the
alignment of its pointers and the divisibility of its sizes, at most a few variants, and launched
through the compiled object: no dispatch by argument types on a call. With `TRITON_INTERPRET=1`, set
before triton is imported, the same module runs on CPU tensors, one program after another.

A failed check (an index out of range) sets a flag of its launch. Reading it on a GPU would wait for the
device, so it is copied to the host behind the call and read when the program is next called: the error
is raised one call late. Loads are safe meanwhile: a checked index that is out of range is taken as 0.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from minifuse import compat, compat_triton
from minifuse.codegen import triton
from minifuse.codegen.printer import CodegenError
from minifuse.codegen.program import HostProgram, write_program
from minifuse.codegen.triton import TritonKernel
from minifuse.codegen.triton_prelude import HEAD, helpers
from minifuse.codegen.triton_text import LIMIT
from minifuse.errors import MinifuseError
from minifuse.forks import renewed
from minifuse.ir import dtypes
from minifuse.ir.interpret import run_kernel
from minifuse.ir.kernel import Kernel
from minifuse.ir.plan import Launch, Plan, content_hash
from minifuse.passes.context import CompileContext

from . import triton_interpret
from .cache import DiskCache, write_atomically
from .program import Frame, Program
from .triton_batch import ALIGN, Tables
from .triton_run import Run, starter

ALIGNED = 15
KEPT_SIZES = 256
NO_INTERPRETER = 'target="triton" runs CPU tensors in its interpreter: set TRITON_INTERPRET=1 before triton is imported'
_making = renewed(sys.modules[__name__], "_making")
COMPILERS = 8
"""Threads that compile a program's kernels."""
POINTERS = {"f64": "fp64", "f32": "fp32", "f16": "fp16", "bool": "i1", "e4m3": "u8", "e5m2": "u8"}


def build(plan: Plan, ctx: CompileContext) -> Program:
    """Compile a placed plan to Triton. A kernel that Triton cannot express is interpreted, alone, and
    the decisions say so. Raises MinifuseError for CPU tensors where Triton does not interpret."""
    device = main_device(plan)
    plan = at_home(plan, device)
    on_gpu = device.type != "cpu"
    with ctx.phase("codegen"):
        kernels = write_all(plan, device, ctx)
        text = ctx.stages["triton"] = module_text(plan, kernels)
    with ctx.phase("compile"):
        module = load_module(text, ctx.options.cache_dir) if kernels else None
        if module is not None and not on_gpu:
            if not compat_triton.triton_interprets():
                raise MinifuseError(NO_INTERPRETER)
            triton_interpret.install(module)
        launches = {i: launched(module, plan.steps[i], kernel, device) for i, kernel in kernels.items()}
        share(launches.values())
        if on_gpu:
            with torch.cuda.device(device):
                launches = compile_all(launches, compat_triton.current_target(), ctx, plan)
    symbols = tuple(sorted({s for one in launches.values() for s in one.sizes}))
    for one in launches.values():
        one.at = tuple(symbols.index(s) for s in one.sizes)
    groups = plan.runs(launches) if on_gpu else [[i] for i in launches]
    runs = [Run([launches[i] for i in group], [launches[i].step.binding for i in group]) for group in groups]
    if on_gpu:
        binding = tuple(run.names for run in runs)
        for run in runs:
            run.start = starter(ctx.options.cache_dir)
    else:
        binding = tuple(one.step.binding for one in launches.values())
    run_of = {i: k for k, group in enumerate(groups) for i in group}
    host = ctx.stages["program"] = write_program(plan, binding, symbols, run_of)
    return TritonProgram(plan, host, runs, binding, symbols, ctx.stages.get("constants", {}), device,
                         ctx.options.deterministic)  # fmt: skip


def main_device(plan: Plan) -> torch.device:
    """Where a plan's kernels run: the GPU of its buffers, or the CPU where none is on one."""
    found = [b.device for b in plan.buffers.values() if b.device.type != "cpu"]
    if not found:
        return torch.device("cpu")
    return found[0] if found[0].index is not None else torch.device(found[0].type, torch.cuda.current_device())


def at_home(plan: Plan, device: torch.device) -> Plan:
    """The arena is the main device's: buffers on another are allocated one by one."""
    away = {n: replace(b, storage="pooled") for n, b in plan.buffers.items()
            if b.storage == "arena" and b.device.type != device.type}  # fmt: skip
    return replace(plan, buffers={**plan.buffers, **away}) if away else plan


# -- modules ----------------------------------------------------------------------------------------
def write_all(plan: Plan, device: torch.device, ctx: CompileContext) -> dict[int, TritonKernel]:
    """The Triton of each launch, by step. Launches of one kernel share their text."""
    found: dict[int, TritonKernel] = {}
    known: dict[Any, TritonKernel | str] = {}
    for i, step in enumerate(plan.steps):
        if not isinstance(step, Launch):
            continue
        key = (step.kernel, step.schedule, step.batched)
        if key not in known:
            try:
                known[key] = triton.write_kernel(step)
            except CodegenError as why:
                known[key] = str(why)
        kernel = known[key]
        if any(plan.buffers[b].device.type != device.type for b in step.binding):
            kernel = "its buffers are on several devices"
        if isinstance(kernel, TritonKernel):
            found[i] = kernel
        else:
            ctx.record("interpreted", step.name, taken=True, reason="{why}", why=kernel,
                       where=plan.origins.get(step.name, ""))  # fmt: skip
    return found


def module_text(plan: Plan, kernels: dict[int, TritonKernel]) -> str:
    """The source of a plan's kernels, each once, below the helpers that they call."""
    bodies: dict[str, str] = {}
    for i, kernel in kernels.items():
        step = plan.steps[i]
        if kernel.name not in bodies and isinstance(step, Launch):
            bodies[kernel.name] = f"{_comment(plan, step, kernel)}\n{_annotated(plan, step, kernel.text)}"
    return source_of(bodies.values())


def source_of(bodies: Iterable[str]) -> str:
    """A module of kernels, below the helpers that they call."""
    text = "\n\n\n".join(bodies)
    return "\n\n".join([f"{HEAD}", *("\n" + h for h in helpers(text)), f"\n{text}\n"])


def _comment(plan: Plan, step: Launch, kernel: TritonKernel) -> str:
    """What a kernel computes and where that was written."""
    lines = [f"{step.name}: {step.schedule}; {kernel.warps} warps, grid {kernel.grid}"]
    lines += textwrap.wrap("from " + ", ".join(step.kernel.origins), 110) if step.kernel.origins else []
    lines += list(dict.fromkeys(plan.origins[o] for o in step.kernel.origins if plan.origins.get(o)))[:8]
    return "\n".join(f"# {line}" for line in lines)


_ACCESS = re.compile(r"^( *(?:\w+ = |)\(?tl\.(load|store)\((p\d+)\b.*)$", re.MULTILINE)


def _annotated(plan: Plan, step: Launch, text: str) -> str:
    """A kernel's text that says of each parameter which tensor it is, where it is first read and where it is written,
    and of a result the line that asked for it."""
    names = dict(zip((p.name for p in step.kernel.params), step.binding, strict=False))
    seen: set[str] = set()

    def comment(found: re.Match[str]) -> str:
        line, way, param = found.groups()
        if way == "load" and param in seen:
            return line
        seen.add(param)
        name = names[param]
        where = plan.origins.get(name, "") if way == "store" else ""
        return f"{line}  # {name}{': ' + where if where else ''}"

    return text if step.batched else _ACCESS.sub(comment, text)


def load_module(text: str, cache_dir: str | None) -> ModuleType:
    """The module of a source, imported once by its content from a file in the cache directory.

    `@triton.jit` reads its functions from their file.
    """
    name = f"minifuse_kernels_{content_hash(text)}"
    if name in sys.modules:
        return sys.modules[name]
    folder = Path(DiskCache(cache_dir).dir) / "triton"
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"{name}.py"
    if not path.exists() or path.read_text() != text:
        write_atomically(path, text.encode())
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


# -- launches ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for: pointers on 16 bytes, sizes of 64 bits, which sizes 16 divides."""

    aligned: bool
    wide: bool
    divisible: tuple[bool, ...]


class Launched:
    """One launch of a program: called with addresses and sizes, it puts its kernel on a stream.

    `at` says which of the program's sizes are its own; `last` is its last argument where it has checks: the address
    where a failed one is noted.
    """

    def __init__(self, function: Any, step: Launch, kernel: TritonKernel, device: torch.device) -> None:
        self.function = function
        self.step = step
        self.kernel = kernel
        self.device = device
        # those of the program's sizes that the kernel takes, and that the sizes of a batch's tensors are computed from
        self.sizes = tuple(sorted(s.name for s in step.symbols))
        self.given = tuple(self.sizes.index(name) for name in kernel.symbols)
        self.at: tuple[int, ...] = ()
        self.last: tuple[int, ...] = ()
        self.variants: dict[Variant, Any] = {}
        self.runners: dict[Any, Callable[..., None] | None] = {}
        self.tables = Tables(step, kernel, device) if kernel.batched else None

    def __call__(self, pointers: Sequence[int], sizes: Sequence[int], stream: int) -> int:
        values = tuple([sizes[k] for k in self.at])
        given: Sequence[int] = pointers
        if self.tables is not None:
            layout, where = self.tables.layout(values, self.env(values)), self.tables.addresses(pointers, stream)
            given = (where.align, where.table.data_ptr(), layout.lengths.data_ptr(), layout.blocks.data_ptr())
            key = (where.align == ALIGN, values)
        else:
            bits = 0
            for address in pointers:
                bits |= address
            key = (bits & ALIGNED == 0, values)
        if key not in self.runners:
            if len(self.runners) >= KEPT_SIZES:
                self.runners.clear()
            self.runners[key] = self.runner(*key)
        run = self.runners[key]
        if run is not None:
            run(*given, *(values[k] for k in self.given), *self.last, stream=stream)
        return 0

    def env(self, values: Sequence[int]) -> dict[str, int]:
        return dict(zip(self.sizes, values, strict=True))

    def programs(self, values: tuple[int, ...]) -> tuple[int, bool]:
        """How many programs run at these sizes, and whether their offsets need 64 bits."""
        env = self.env(values)
        if self.tables is not None:
            layout = self.tables.layout(values, env)
            return layout.programs, layout.wide
        return self.kernel.grid.evaluate(env), any(e.evaluate(env) >= LIMIT for e in self.kernel.extents)

    def variant(self, aligned: bool, wide: bool, values: tuple[int, ...]) -> Variant:
        return Variant(aligned, wide, tuple(values[k] % 16 == 0 for k in self.given))

    def runner(self, aligned: bool, values: tuple[int, ...]) -> Callable[..., None] | None:
        """The compiled kernel with its grid at these sizes; None where there is nothing to do."""
        programs, wide = self.programs(values)
        return self.compile(self.variant(aligned, wide, values))[(programs, 1, 1)] if programs else None

    def handle(self, aligned: bool, values: tuple[int, ...]) -> compat_triton.Handle | None:
        """The compiled kernel as the driver knows it; None where only `__call__` starts it."""
        programs, wide = self.programs(values)
        if not programs or self.tables is not None:
            return None
        return compat_triton.triton_handle(self.compile(self.variant(aligned, wide, values)))

    def compile(self, variant: Variant, target: Any = None) -> Any:
        """The kernel compiled for a variant, for a GPU that need not be this thread's with `target`."""
        if variant not in self.variants:
            kernel, params = self.kernel, self.step.kernel.params
            width = "i64" if variant.wide else "i32"
            if kernel.batched:
                signature = {"align": "constexpr", "table": "*i64", "lengths": f"*{width}", "blocks": "*i32"}
                divisible = [False] * 4
            else:
                signature = {p.name: "*" + POINTERS.get(dtypes.name(p.dtype), dtypes.name(p.dtype)) for p in params}
                divisible = [variant.aligned] * len(params)
            signature.update(dict.fromkeys(kernel.symbols, width))
            if kernel.messages:
                signature["err"] = "*i32"
            divisible += variant.divisible
            self.variants[variant] = compat_triton.triton_compile(
                self.function, signature, [k for k, yes in enumerate(divisible) if yes], kernel.warps, target,
                {"align": ALIGN if variant.aligned else 1} if kernel.batched else None,
            )  # fmt: skip
        return self.variants[variant]

    def usual(self) -> Variant:
        """The variant that most calls have."""
        fixed = (e.substitute(m.sizes) for m in self.step.members for e in self.kernel.extents)
        wide = any(e.is_const and e.value >= LIMIT for e in fixed)
        return Variant(True, wide, (False,) * len(self.kernel.symbols))


class Interpreted(Launched):
    """A launch in Triton's interpreter: the same kernel function over tensors at the same addresses."""

    def __call__(self, pointers: Sequence[int], sizes: Sequence[int], stream: int) -> int:
        values = [sizes[k] for k in self.at]
        env = self.env(values)
        if self.tables is not None:
            layout, where = self.tables.layout(tuple(values), env), self.tables.addresses(pointers, stream)
            if layout.programs:
                given = (where.align, where.table, layout.lengths, layout.blocks)
                self.function[(layout.programs,)](*given, *(values[k] for k in self.given))
            return 0
        programs = self.kernel.grid.evaluate(env)
        if programs == 0:
            return 0
        args: list[Any] = []
        for p, address in zip(self.step.kernel.params, pointers, strict=True):
            count = 1 + sum((s.evaluate(env) - 1) * d.evaluate(env) for s, d in zip(p.shape, p.stride, strict=True))
            empty = any(s.evaluate(env) == 0 for s in p.shape)
            args.append(torch.empty(0, dtype=p.dtype, device="cpu") if empty else tensor_at(address, count, p.dtype))
        flag = torch.zeros(1, dtype=torch.int32, device="cpu")
        self.function[(programs,)](*args, *values, *([flag] if self.kernel.messages else []))
        return int(flag)


def tensor_at(address: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """`count` elements at an address of this process, whose owner outlives the tensor."""
    memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=torch.uint8 if dtypes.name(dtype) in dtypes.BYTE_FLOATS else dtype)


def launched(module: ModuleType | None, step: Any, kernel: TritonKernel, device: torch.device) -> Launched:
    kind = Interpreted if device.type == "cpu" else Launched
    return kind(getattr(module, kernel.name), step, kernel, device)


def share(launches: Iterable[Launched]) -> None:
    """Launches of one kernel have what is compiled of it together."""
    variants: dict[str, dict[Variant, Any]] = {}
    for one in launches:
        one.variants = variants.setdefault(one.kernel.name, one.variants)


def compile_all(launches: Mapping[int, Launched], target: Any, ctx: CompileContext, plan: Plan) -> dict[int, Launched]:
    """Compile the usual variant of each kernel once, in threads beside each other: the compiler and the assembler hold
    no lock of Python's. Those that Triton refuses are left out, with a decision."""

    def refused(one: Launched) -> str | None:
        try:
            if not one.kernel.symbols:
                one.compile(one.usual(), target)
        except compat_triton.triton_errors() as why:
            return str(why)[:2000]
        return None

    distinct = {one.kernel.name: one for one in launches.values()}
    with ThreadPoolExecutor(max(min(len(distinct), COMPILERS), 1)) as pool:
        why = dict(zip(distinct, pool.map(refused, distinct.values()), strict=True))
    kept = {}
    for i, one in launches.items():
        if why[one.kernel.name] is None:
            kept[i] = one
        else:
            ctx.record("interpreted", one.step.name, taken=True, reason="Triton refused it: {why}",
                       why=why[one.kernel.name], where=plan.origins.get(one.step.name, ""))  # fmt: skip
    return kept


# -- programs ---------------------------------------------------------------------------------------
class TritonProgram(Program):
    """Runs a plan with Triton kernels: on a GPU over memory of PyTorch's caching allocator, on its current stream."""

    def __init__(
        self,
        plan: Plan,
        host: HostProgram,
        runs: Sequence[Run],
        binding: tuple[tuple[str, ...], ...],
        symbols: tuple[str, ...],
        constants: dict[str, torch.Tensor],
        device: torch.device,
        deterministic: bool,
    ) -> None:
        self.device = device
        self.on_gpu = device.type != "cpu"
        self.launches = [one for run in runs for one in run.launches]
        messages = tuple(one.kernel.messages for one in self.launches)
        functions: Sequence[Callable[..., int]] = runs if self.on_gpu else self.launches
        super().__init__(plan, host, functions, binding, symbols, messages, constants, deterministic)
        self.checked = [k for k, one in enumerate(self.launches) if one.kernel.messages]
        self.flags: torch.Tensor | None = None
        if self.on_gpu:
            self.call.__globals__["threads"] = self.stream

    def __call__(self, args: list[Any]) -> Any:
        if not self.on_gpu or torch.cuda.current_device() == self.device.index:
            return super().__call__(args)
        with torch.cuda.device(self.device):
            return super().__call__(args)

    @property
    def direct(self) -> Callable[[list[Any]], Any]:
        """What a call comes to: on a GPU with this device as the current one."""
        return self if self.on_gpu else super().direct

    def stream(self) -> int:
        return compat.current_raw_stream(self.device.index)

    def enter(self, key: tuple[int, ...]) -> Frame:
        """An arena for a call with these sizes; on a GPU the allocator's, in the order of the current stream."""
        if not self.on_gpu:
            return super().enter(key)
        if self.flags is not None:
            self.raise_late()
        elif self.checked:
            self.make_flags()
        layout = self.layouts.get(key) or self.layout(key)
        return self.make_frame(layout, torch.empty(layout.nbytes, dtype=torch.uint8, device=self.device))

    def leave(self, frame: Frame) -> None:
        if not self.on_gpu:
            super().leave(frame)
        elif self.flags is not None:
            self.seen.copy_(self.flags, non_blocking=True)

    def make_flags(self) -> None:
        """A flag a launch, where its checks note what failed, and where the host reads it. Made at the first call:
        a graph is compiled while every new tensor is a fake one."""
        with _making:
            if self.flags is None:
                self.make_first_flags()

    def make_first_flags(self) -> None:
        self.seen = torch.zeros(len(self.launches), dtype=torch.int32, device="cpu", pin_memory=True)
        flags = torch.zeros(len(self.launches), dtype=torch.int32, device=self.device)
        for k in self.checked:
            self.launches[k].last = (flags.data_ptr() + 4 * k,)
        self.flags = flags

    def raise_late(self) -> None:
        """Raise what a check of an earlier call found, if its flags have arrived."""
        assert self.flags is not None
        for k in self.checked:
            if code := int(self.seen[k]):
                self.seen.zero_()
                self.flags.zero_()
                self.fail(k, code)

    def interpret(self, kernel: Kernel, tensors: list[torch.Tensor], sizes: dict[str, int]) -> None:
        """A kernel by torch operations; a number on the CPU that one on the device reads is taken there."""
        away = any(t.device.type != "cpu" for t in tensors)
        home = [t.to(self.device) if away and t.dim() == 0 and t.device.type == "cpu" else t for t in tensors]
        run_kernel(kernel, {p.name: t for p, t in zip(kernel.params, home, strict=True)}, sizes)
