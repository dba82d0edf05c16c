"""One kernel on its own: a script that rebuilds it from its text, runs, checks and times it.

The dump writes such a script for each kernel. The kernel goes through the code of a whole graph: a plan of one launch,
built and called as a `Program`.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from minifuse.ir import dtypes
from minifuse.ir.index import Expr, as_expr
from minifuse.ir.interpret import run_kernel
from minifuse.ir.kernel import Kernel, Param
from minifuse.ir.plan import Buffer, Launch, Plan, Symbol, TensorRef, launch_traffic
from minifuse.ir.text import parse, print_launch
from minifuse.ir.value import Load, Value, topological
from minifuse.options import Options
from minifuse.passes.context import CompileContext
from minifuse.passes.memory import place
from minifuse.runtime.build import build

Settings = Mapping[str, object] | None
# Largest difference that rounding explains, over the largest magnitude of the result: sums in another order.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}
# A comparison of values that differ in their last bit may fall either way.
FLIPS = 1e-3


@dataclass(frozen=True)
class Replay:
    """What running a kernel alone showed.

    `errors` maps an output to its largest difference from the interpreter over its largest magnitude (for integers and
    bools: the share of elements that differ). `seconds` is the median call, the host's share included; `nbytes` what
    the kernel reads and writes.
    """

    name: str
    errors: Mapping[str, float]
    right: bool
    seconds: float
    nbytes: int
    interpreted: bool

    def __str__(self) -> str:
        said = ", ".join(f"{name} {error:.1e}" for name, error in self.errors.items())
        how = " (interpreted: there is no code for it)" if self.interpreted else ""
        verdict = "agrees with the interpreter" if self.right else "DIFFERS from the interpreter"
        rate = self.nbytes / self.seconds / 1e9
        return f"{self.name}: {verdict} ({said}); {1e6 * self.seconds:.1f} µs, {rate:.2f} GB/s{how}"


def replay(text: str, sizes: Mapping[str, int], device: str = "cpu", options: Settings = None) -> Replay:
    """Run the kernel of a text on random inputs, beside the interpreter.

    `sizes` gives each dynamic size. Integers that index another input stay inside it.
    Raises ValueError where the text is no kernel with a schedule, CompileError where its code does not compile.
    """
    parsed = parse(text)
    if parsed.schedule is None:
        raise ValueError(f"the kernel {parsed.name} has no schedule line")
    names = parsed.binding or tuple(p.name for p in parsed.kernel.params)
    launch = Launch(parsed.kernel, names, parsed.schedule, parsed.name, parsed.sizes)
    ctx = CompileContext(parsed.name, "inference", Options.parse(options))
    plan = place(plan_of(launch, sizes, torch.device(device)), ctx)
    program = build(plan, ctx)
    torch.manual_seed(0)
    limit = index_limit(parsed.kernel, sizes)
    buffers = [b.as_param() for b in plan.buffers.values()]
    given = {p.name: random_input(p, sizes, device, limit) for p in buffers if p.name in plan.inputs}
    expected = {name: clone(x) for name, x in given.items()}
    for p in buffers:
        if p.name not in expected:
            expected[p.name] = empty(p, sizes, device)
    for run in launch.members:
        lengths = {s.name: e.evaluate(sizes) for s, e in run.sizes.items()}
        run_kernel(parsed.kernel, {p: expected[b] for p, b in run.buffers.items()}, {**sizes, **lengths})

    def call(tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        return list(program([*sizes.values(), *(tensors[n] for n in plan.inputs if n in tensors)]))

    own = {name: clone(x) for name, x in given.items()}
    found = dict(zip(launch.writes, call(own), strict=True))
    errors = {name: difference(found[name], expected[name]) for name in found}
    right = all(error <= TOLERANCE.get(found[name].dtype, FLIPS) for name, error in errors.items())
    unit = ctx.stages["unit"]
    seconds = median_seconds(lambda: call(given), device)
    return Replay(parsed.name, errors, right, seconds, launch_traffic(plan, launch).total, not unit.functions)


def plan_of(launch: Launch, sizes: Mapping[str, int], device: torch.device) -> Plan:
    """A plan of this launch alone: what it loads are inputs, what it stores are outputs, sizes come first."""
    loaded = dict.fromkeys(launch.reads)
    buffers = {
        name: Buffer(name, p.dtype, *run.layout(p), device, "input" if name in loaded else "pooled")
        for run in launch.members
        for p, name in zip(launch.kernel.params, run.buffers.values(), strict=True)
    }
    return Plan(
        launch.name,
        (*sizes, *loaded),
        buffers,
        (launch,),
        tuple(TensorRef(n, buffers[n].shape, buffers[n].stride, as_expr(0)) for n in launch.writes),
        {name: Symbol(name, hint, name) for name, hint in sizes.items()},
        frozenset(loaded.keys() & set(launch.writes)),
    )


def index_limit(kernel: Kernel, sizes: Mapping[str, int]) -> int:
    """One past the largest integer that may be an index: the smallest dimension that is read at a computed place."""
    at = [
        kernel.param(access.param).shape[d].evaluate(sizes)
        for access in kernel.accesses
        for d, entry in enumerate(access.index)
        if isinstance(entry, Value) and reads_memory(entry)
    ]
    return max(min(at, default=8), 1)


def reads_memory(v: Value) -> bool:
    return any(isinstance(x, Load) for x in topological([v]))


def random_input(p: Param, sizes: Mapping[str, int], device: str, limit: int) -> torch.Tensor:
    """Normal floats, bools, and integers from 1 (a divisor is not zero) below `limit`."""
    x = empty(p, sizes, device)
    if dtypes.is_float(p.dtype):
        return x.normal_()
    return x.random_(0, 2) if p.dtype is torch.bool else x.random_(min(1, limit - 1), min(limit, 127))


def empty(p: Param, sizes: Mapping[str, int], device: str) -> torch.Tensor:
    """Memory of a parameter's shape and strides; an expanded dimension (stride 0) is written as one element."""

    def ints(exprs: Iterable[Expr]) -> list[int]:
        return [e.evaluate(sizes) for e in exprs]

    shape, stride = ints(p.shape), ints(p.stride)
    base = [1 if d == 0 else n for n, d in zip(shape, stride, strict=True)]
    return torch.empty_strided(base, stride, dtype=p.dtype, device=device).as_strided(shape, stride)


def clone(x: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides, expanded dimensions included."""
    base = x.as_strided([1 if d == 0 else n for n, d in zip(x.shape, x.stride(), strict=True)], x.stride())
    made = torch.empty_strided(base.shape, base.stride(), dtype=x.dtype, device=x.device)
    return made.copy_(base).as_strided(x.shape, x.stride())


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """See `Replay.errors`. Not-a-numbers at the same places are equal."""
    if found.numel() == 0:
        return 0.0
    if not found.dtype.is_floating_point:
        return (found != expected).double().mean().item()
    a, b = found.double(), expected.double()
    if not torch.equal(a.isnan(), b.isnan()) or not torch.equal(a.isinf(), b.isinf()):
        return float("inf")
    finite = b.isfinite()
    if not finite.any():
        return 0.0
    a, b = a[finite], b[finite]
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()


def median_seconds(run: Callable[[], object], device: str, budget: float = 0.5, most: int = 200) -> float:
    """The median of calls for `budget` seconds, `most` of them at most, after three that warm up."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    times: list[float] = []
    for _ in range(3):
        run()
    began = time.perf_counter()
    while len(times) < most and time.perf_counter() - began < budget:
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def kernel_script(plan: Plan, launch: Launch, options: Settings = None) -> str:
    """The script of one launch of a plan. Every text that is not ours stands in it as a literal."""
    sizes = {s.name: plan.symbols[s.name].hint for s in sorted(launch.symbols, key=lambda s: s.name)}
    lines = dict.fromkeys(plan.origins[o] for o in launch.kernel.origins if plan.origins.get(o))
    device = str(plan.buffers[launch.binding[0]].device) if launch.binding else "cpu"
    text = print_launch(launch)
    return _SCRIPT.format(
        name=ascii(launch.name),
        graph=ascii(plan.name),
        lines="".join(f"    {line!a},\n" for line in lines),
        text="".join(f"    {line!a}\n" for line in text.splitlines(keepends=True)),
        sizes=json.dumps(sizes),
        device=ascii(device),
        options=ascii(dict(options or {})),
    )


_SCRIPT = '''"""One kernel of a graph: run on random inputs, checked against the interpreter, timed.

Edit the kernel or its schedule and run it again. It needs minifuse installed and nothing else of the dump.
"""

from minifuse.explain.replay import main

NAME = {name}
GRAPH = {graph}
FROM = (
{lines})
KERNEL = (
{text})
SIZES = {sizes}
DEVICE = {device}
OPTIONS = {options}

if __name__ == "__main__":
    raise SystemExit(main(KERNEL, SIZES, DEVICE, OPTIONS))
'''


def main(text: str, sizes: Mapping[str, int], device: str = "cpu", options: Settings = None) -> int:
    """Print the kernel and what `replay` found; 1 where it differs from the interpreter."""
    print(text)
    found = replay(text, sizes, device, options)
    print(found)
    return 0 if found.right else 1
