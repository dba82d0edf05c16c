"""What Triton kernels ask of memory, counted as its interpreter runs one program of each kind.

    found = harness.fresh(probe, names, env=INTERPRETED)

Programs of a grid differ in where a block is cut off: along each axis all are alike but the last. One of each kind is
run on memory that nobody has written, and every access is noted with its addresses. Bytes are those of 32-byte sectors:
an access that is misaligned or scattered asks for more of them than it has elements.

* What a program asks for again it finds in the first-level cache, where all that it asks for fits (`FIRST_LEVEL`).
* What all programs ask for, such as a norm's weights, they find in the second level where it fits (`SECOND_LEVEL`), and
  counts once.

Private names of triton's interpreter (3.6-3.9) are in `Watch`.
"""

from __future__ import annotations

import ast
import importlib
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from types import ModuleType
from typing import Any

import numpy as np
import torch

from minifuse.codegen.triton import TritonKernel
from minifuse.codegen.triton_rows import NEAR
from minifuse.ir.plan import Launch, Plan, launch_traffic
from minifuse.passes.context import CompileContext
from minifuse.runtime import triton_interpret, triton_launch
from minifuse.runtime.triton_launch import Interpreted

from .assembled import PythonLoop

INTERPRETED = {"TRITON_INTERPRET": "1"}
SECTOR = 32
FIRST_LEVEL, SECOND_LEVEL = 64 << 10, 6 << 20
REDUCTIONS = {f"mf_{name}" for name in "sum sums prod max min any all rowargmax rowargmin scan".split()}
KINDS = ("read", "written")
SAMPLED = 8
"""Programs of a batch that are run: they look up which tensor they are of."""


@dataclass
class Asked:
    """What one program asks of memory: sectors by buffer's number and kind of access, and of these the bytes that are
    asked for without a mask; for a line of the source the bytes of all its lanes, masked ones too; how often a row is
    reduced across threads."""

    sectors: dict[tuple[int, str], list[np.ndarray]] = field(default_factory=dict)
    whole: dict[tuple[int, str], int] = field(default_factory=dict)
    lanes: dict[int, int] = field(default_factory=dict)
    reductions: int = 0

    def nbytes(self) -> dict[tuple[int, str], int]:
        """Bytes by buffer and kind; what is asked for again is near where all of it is."""
        every = {key: sum(map(len, found)) for key, found in self.sectors.items()}
        once = {key: len(np.unique(np.concatenate(found))) for key, found in self.sectors.items()}
        return {key: SECTOR * n for key, n in (once if SECTOR * sum(once.values()) <= FIRST_LEVEL else every).items()}


class Watch:
    """Triton's interpreter, asked for one program at a time, whose accesses are noted."""

    def __init__(self) -> None:
        interpreter = importlib.import_module("triton.runtime.interpreter")
        self.numpy_dtype = interpreter._get_np_dtype
        self.asked = Asked()
        self.ranges = np.zeros((0, 2), np.int64)
        self.file = ""
        self.program = 0
        self.batched = False
        self.prepared: list[ModuleType] = []
        builder = type(interpreter.interpreter_builder)
        load, store = builder.create_masked_load, builder.create_masked_store
        plain_load, plain_store = builder.create_load, builder.create_store
        self.masked = True

        def unmasked(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                self.masked = False
                try:
                    return function(*args)
                finally:
                    self.masked = True

            return call

        def watched_load(self_: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
            self.note("read", ptrs, mask)
            return load(self_, ptrs, mask, *rest)

        def watched_store(self_: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self.note("written", ptrs, mask)
            return store(self_, ptrs, value, mask, *rest)

        builder.create_masked_load, builder.create_masked_store = watched_load, watched_store
        builder.create_load, builder.create_store = unmasked(plain_load), unmasked(plain_store)
        builder.set_grid_idx = lambda self_, x, y, z: setattr(self_, "grid_idx", (self.program, y, z))
        # memory is the CPU's already: a copy of it onto itself would write all of it
        executor = interpreter.GridExecutor
        executor._init_args_hst = lambda self_, args, kwargs: (args, kwargs)
        executor._restore_args_dev = lambda self_, *args: None

    def note(self, kind: str, ptrs: Any, mask: Any) -> None:
        size = np.dtype(self.numpy_dtype(ptrs.get_element_ty())).itemsize
        frame: Any = sys._getframe(2)
        while frame is not None and frame.f_code.co_filename != self.file:
            frame = frame.f_back
        line = frame.f_lineno if frame is not None else 0
        self.asked.lanes[line] = self.asked.lanes.get(line, 0) + ptrs.data.size * size
        taken = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)].astype(np.int64)
        if taken.size:
            within = (self.ranges[:, 0] <= taken[0]) & (taken[0] < self.ranges[:, 1])
            buffer = int(within.argmax()) if within.any() and not self.batched else -1
            sectors = np.unique(taken // SECTOR)
            self.asked.sectors.setdefault((buffer, kind), []).append(sectors)
            if not self.masked:
                self.asked.whole[buffer, kind] = self.asked.whole.get((buffer, kind), 0) + SECTOR * len(sectors)

    def prepare(self, module: ModuleType) -> None:
        """Let a module of kernels run in the interpreter, and note what is reduced."""
        triton_interpret.install(module)
        if module in self.prepared:
            return
        self.prepared.append(module)

        def noted(function: Callable[..., Any], many: int) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                if length(args) > NEAR:  # a thread joins its few neighbours by itself
                    self.asked.reductions += many
                return function(*args)

            return call

        for name in REDUCTIONS & {*vars(module)}:
            setattr(module, name, noted(getattr(module, name), 2 if name == "mf_sums" else 1))

    def run(self, one: Interpreted, program: int, memory: Sequence[torch.Tensor], hint: Hint) -> Asked:
        """What one program of a launch asks for. `memory` are its buffers, those of each tensor of a batch in turn;
        -1 stands for what is none of them, and for all of a batch."""
        self.ranges = np.array([[t.data_ptr(), t.data_ptr() + t.nbytes] for t in memory], np.int64)
        self.file = sys.modules[one.function.fn.__module__].__file__ or ""
        self.asked, self.program, self.batched = Asked(), program, one.tables is not None
        values = tuple(hint(name) for name in one.sizes)
        args: list[Any] = list(memory)
        if one.tables is not None:
            layout = one.tables.layout(values, one.env(values))
            args = [1, torch.tensor([t.data_ptr() for t in memory]), layout.lengths, layout.blocks]
        flags = [torch.zeros(1, dtype=torch.int32)] if one.kernel.messages else []
        one.function[(1,)](*args, *(values[k] for k in one.given), *flags)
        return self.asked


Hint = Callable[[str], int]


def kinds(one: Interpreted, hint: Hint) -> list[tuple[int, float]]:
    """Programs of a launch that stand for all of them, each with how many it stands for."""
    values = tuple(hint(name) for name in one.sizes)
    count, _ = one.programs(values)
    if one.tables is not None:
        chosen = sorted({count * k // SAMPLED for k in range(SAMPLED)} & {*range(count)})
        return [(program, count / len(chosen)) for program in chosen]
    assert one.step.schedule is not None
    env = one.env(values)
    axes: list[list[tuple[int, int]]] = []
    counts = []
    for loop in one.step.schedule.grid:
        size = loop.axis.size.evaluate(env)
        n = -(-size // loop.step)
        counts.append(n)
        cut = size % loop.step != 0 and n > 1
        axes.append([((n - cut) // 2, n - cut), *([(n - 1, 1)] if cut else [])])
    found = []
    for places in itertools.product(*axes):
        program = 0
        for n, (at, _) in zip(counts, places, strict=True):
            program = program * n + at
        found.append((program, float(prod(many for _, many in places))))
    return found


def length(args: Sequence[Any]) -> int:
    """Of a helper's arguments the length of a row: the middle one of the last three numbers."""
    return [x for x in args if isinstance(x, int)][-2]


def loops_of(source: str, kernel: str) -> list[PythonLoop]:
    """The loops of a module's kernel, outer ones first."""
    (function,) = (n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == kernel)
    found = []
    for n in ast.walk(function):
        if isinstance(n, ast.For) and isinstance(n.iter, ast.Call):
            bounds = [a.value for a in n.iter.args if isinstance(a, ast.Constant) and isinstance(a.value, int)]
            trips = len(range(*bounds)) if len(bounds) == len(n.iter.args) else 1
            found.append(PythonLoop(range(n.lineno, (n.end_lineno or n.lineno) + 1), trips))
    return sorted(found, key=lambda loop: (loop.lines.start, -loop.lines.stop))


def zeros(nbytes: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory that has no pages until they are touched, from a multiple of 256 on."""
    whole = torch.from_numpy(np.zeros(nbytes + 256, np.uint8))
    start = -whole.data_ptr() % 256
    return whole[start : start + nbytes].view(dtype)


def count(watch: Watch, plan: Plan, one: Interpreted) -> dict[str, Any]:
    """What a launch asks for: `requested` bytes, the `least` that it can move, its `programs`, the bytes that
    these ask for of each buffer as `read` and `written`; and of one program on average `lanes` and `reductions`, as
    `Asked` has them."""

    def hint(name: str) -> int:
        return plan.symbols[name].hint

    params = one.step.kernel.params
    memory = [zeros(plan.hint(plan.buffers[b].nbytes), params[k % len(params)].dtype)
              for k, b in enumerate(one.step.binding)]  # fmt: skip
    total: dict[Any, float] = {}
    every: dict[Any, float] = {}
    whole: dict[Any, float] = {}
    lanes: dict[Any, float] = {}
    programs = reductions = 0.0
    for program, many in kinds(one, hint):
        asked = watch.run(one, program, memory, hint)
        programs += many
        reductions += many * asked.reductions
        sectors = {key: SECTOR * sum(map(len, found)) for key, found in asked.sectors.items()}
        counts = ((total, asked.nbytes()), (every, sectors), (whole, asked.whole), (lanes, asked.lanes))
        for found, counted in counts:
            for key, nbytes in dict[Any, float](counted).items():
                found[key] = found.get(key, 0.0) + many * nbytes
    for (buffer, kind), nbytes in total.items():
        size = memory[buffer].nbytes if buffer >= 0 else SECOND_LEVEL + 1
        total[buffer, kind] = min(nbytes, max(size, SECTOR)) if size <= SECOND_LEVEL else nbytes
    return {
        "requested": sum(total.values()),
        "least": launch_traffic(plan, one.step).total,
        "programs": programs,
        "reductions": reductions / programs,
        **{kind: {b: n for (b, k), n in total.items() if k == kind} for kind in KINDS},
        **{f"unmasked {kind}": {b: n / every[b, k] for (b, k), n in whole.items() if k == kind} for kind in KINDS},
        "lanes": {line: nbytes / programs for line, nbytes in lanes.items()},
    }


def launches(plan: Plan, ctx: CompileContext, kind: type[triton_launch.Launched]) -> Iterator[tuple[str, Any, str]]:
    """Each distinct kernel of a placed plan as a launch, with its source's file."""
    here = torch.device("cpu")
    kernels: dict[int, TritonKernel] = triton_launch.write_all(plan, here, ctx)
    module = triton_launch.load_module(triton_launch.module_text(plan, kernels), ctx.options.cache_dir)
    seen: set[str] = set()
    for i, kernel in kernels.items():
        step = plan.steps[i]
        if isinstance(step, Launch) and kernel.name not in seen:
            seen.add(kernel.name)
            yield kernel.name, kind(getattr(module, kernel.name), step, kernel, here), module.__file__ or ""
