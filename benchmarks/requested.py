"""What Triton kernels ask of memory, counted as its interpreter runs one program of each kind.

    found = harness.fresh(probe, names, env=INTERPRETED)

Programs of a grid differ in where a block is cut off: along each axis all are alike but the last. One of each kind is
run on memory that nobody has written, and every access is noted with its addresses. Bytes are those of 32-byte sectors:
an access that is misaligned or scattered asks for more of them than it has elements.

* What a program asks for again it finds in the first-level cache, where all that it asks for fits (`NEAR`).
* What all programs ask for, such as a norm's weights, they find in the second level where it fits (`SHARED`), and
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
from typing import Any

import numpy as np
import torch

from minifuse.codegen.triton import TritonKernel
from minifuse.ir.plan import Launch, Plan, launch_traffic
from minifuse.passes.context import CompileContext
from minifuse.runtime import triton_interpret, triton_launch
from minifuse.runtime.triton_launch import Interpreted

INTERPRETED = {"TRITON_INTERPRET": "1"}
SECTOR = 32
NEAR = 64 << 10
SHARED = 6 << 20
SAMPLED = 8
"""Programs of a batch that are run: they look up which tensor they are of."""


@dataclass
class Asked:
    """What one program asks of memory: sectors by buffer's number and kind of access, and bytes a line of the source,
    masked ones included."""

    sectors: dict[tuple[int, str], list[np.ndarray]] = field(default_factory=dict)
    lanes: dict[int, int] = field(default_factory=dict)

    def nbytes(self) -> dict[tuple[int, str], int]:
        """Bytes by buffer and kind; what is asked for again is near where all of it is."""
        every = {key: sum(map(len, found)) for key, found in self.sectors.items()}
        once = {key: len(np.unique(np.concatenate(found))) for key, found in self.sectors.items()}
        return {key: SECTOR * n for key, n in (once if SECTOR * sum(once.values()) <= NEAR else every).items()}


class Watch:
    """Triton's interpreter, asked for one program at a time, whose accesses are noted."""

    def __init__(self) -> None:
        interpreter = importlib.import_module("triton.runtime.interpreter")
        self.numpy_dtype = interpreter._get_np_dtype
        self.asked = Asked()
        self.ranges = np.zeros((0, 2), np.int64)
        self.file = ""
        self.program = 0
        builder = type(interpreter.interpreter_builder)
        load, store = builder.create_masked_load, builder.create_masked_store

        def watched_load(self_: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
            self.note("read", ptrs, mask)
            return load(self_, ptrs, mask, *rest)

        def watched_store(self_: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self.note("written", ptrs, mask)
            return store(self_, ptrs, value, mask, *rest)

        builder.create_masked_load, builder.create_masked_store = watched_load, watched_store
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
            buffer = int(within.argmax()) if within.any() else -1
            self.asked.sectors.setdefault((buffer, kind), []).append(np.unique(taken // SECTOR))

    def run(self, one: Interpreted, program: int, memory: Sequence[torch.Tensor], hint: Hint) -> Asked:
        """What one program of a launch asks for. `memory` are its buffers, those of each tensor of a batch in turn;
        -1 stands for what is none of them."""
        self.ranges = np.array([[t.data_ptr(), t.data_ptr() + t.nbytes] for t in memory], np.int64)
        self.file = sys.modules[one.function.fn.__module__].__file__ or ""
        self.asked, self.program = Asked(), program
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


def loops_of(source: str) -> list[range]:
    """The lines of each loop of a module, outer ones first."""
    loops = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.For)]
    return sorted((range(n.lineno, (n.end_lineno or n.lineno) + 1) for n in loops), key=lambda r: (r.start, -r.stop))


def zeros(nbytes: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory that has no pages until they are touched, from a multiple of 256 on."""
    whole = torch.from_numpy(np.zeros(nbytes + 256, np.uint8))
    start = -whole.data_ptr() % 256
    return whole[start : start + nbytes].view(dtype)


def count(watch: Watch, plan: Plan, one: Interpreted) -> dict[str, Any]:
    """What a launch asks for: `requested` bytes, the `least` that it can move, its `programs`, and as `lanes` the bytes
    that each line of its source asks for in one of them on average."""

    def hint(name: str) -> int:
        return plan.symbols[name].hint

    params = one.step.kernel.params
    memory = [zeros(plan.hint(plan.buffers[b].nbytes), params[k % len(params)].dtype)
              for k, b in enumerate(one.step.binding)]  # fmt: skip
    total: dict[tuple[int, str], float] = {}
    lanes: dict[int, float] = {}
    programs = 0.0
    for program, many in kinds(one, hint):
        asked = watch.run(one, program, memory, hint)
        programs += many
        for key, nbytes in asked.nbytes().items():
            total[key] = total.get(key, 0.0) + many * nbytes
        for line, lane_bytes in asked.lanes.items():
            lanes[line] = lanes.get(line, 0.0) + many * lane_bytes
    requested = 0.0
    for (buffer, _), asked_bytes in total.items():
        whole = memory[buffer].nbytes if buffer >= 0 else 0
        requested += min(asked_bytes, max(whole, SECTOR)) if whole <= SHARED else asked_bytes
    return {
        "requested": requested,
        "least": launch_traffic(plan, one.step).total,
        "programs": programs,
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
