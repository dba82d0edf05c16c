"""Kernels and plans as text. A kernel's text parses back to the same kernel, and its hash names it.

    kernel softmax  i < s0, j < 64
      sizes s0 >= 2
      param x : f32[s0, 64]
      param out : f32[s0, 64]
      v0 : f32[i, j] = load x[i, j]
      v1 : f32[i] = reduce(max, v0, over j, lanes 16)
      v2 : f32[i, j] = exp(sub(v0, v1))
      v3 : f32[i] = reduce(sum, v2, over j, lanes 16)
      store out[i, j] = div(v2, v3)
      schedule i: grid, j: lane; held v2

A value that is used once and is short stands where it is used. A literal stands bare where its
neighbours say its dtype, as `const(f32, 1.0)` elsewhere. A batch has a line for each of its tensors behind the
schedule, `over a, b; n = 512`: the buffers of the parameters, and the kernel's own sizes. `parse.py` reads it back.
"""

from __future__ import annotations

import json
import keyword
from collections import Counter
from collections.abc import Iterable

from . import dtypes, ops
from .index import Axis, Expr, Sym
from .kernel import Kernel, Param, Schedule, Store
from .parse import Parsed as Parsed
from .parse import parse as parse
from .parse import parse_kernel as parse_kernel
from .plan import (
    Binding,
    Buffer,
    Extern,
    Free,
    Join,
    Launch,
    Opaque,
    Plan,
    Step,
    TensorRef,
    content_hash,
    launch_traffic,
)
from .shape import contiguous_strides
from .value import Cast, Const, IndexOf, Load, Op, Pick, Random, Reduce, Scan, Value

INLINE_DEPTH = 3
INLINE_CHARS = 64


def _list(items: Iterable[object]) -> str:
    return ", ".join(map(str, items))


def _range(s: Sym) -> str:
    return f"{s.name} >= {s.lo}" if s.hi is None else f"{s.lo} <= {s.name} <= {s.hi}"


def _layout(shape: tuple[Expr, ...], stride: tuple[Expr, ...]) -> str:
    """`[s0, 64]`, followed by the strides where they are not row-major."""
    text = f"[{_list(shape)}]"
    return text if stride == contiguous_strides(shape) else f"{text} strides [{_list(stride)}]"


def check_names(kernel: Kernel) -> None:
    """Raise ValueError unless every symbol, axis and parameter can be told apart by its name."""
    symbols = sorted(kernel.symbols(), key=lambda s: (s.name, s.lo))
    names = [s.name for s in symbols] + [a.name for a in kernel.axes] + [p.name for p in kernel.params]
    twice = [name for name, n in Counter(names).items() if n > 1]
    if twice:
        raise ValueError(f"two of the kernel's symbols, axes and parameters are named {twice[0]!r}")
    for name in names:
        if not name.isidentifier() or keyword.iskeyword(name):
            raise ValueError(f"expected an identifier as a name of a symbol, axis or parameter, found {name!r}")


class _Printer:
    """The lines of one kernel: `text` holds what stands for a value where it is used."""

    def __init__(self, kernel: Kernel, schedule: Schedule | None) -> None:
        check_names(kernel)
        self.kernel = kernel
        self.axis_order = {axis: n for n, axis in enumerate(kernel.axes)}
        self.taken = {a.name for a in kernel.axes} | {p.name for p in kernel.params}
        self.taken |= {s.name for s in kernel.symbols()}
        self.uses = Counter(a for v in kernel.values() for a in v.args)
        self.uses.update(v for root in kernel.body for v in root.values)
        self.stored = {root.value for root in kernel.body}
        self.named: set[Value] = set(schedule.held) if schedule else set()
        for access in kernel.accesses:
            self.named.update(i for i in access.index if isinstance(i, Value))
        self.text: dict[Value, str] = {}
        self.depth: dict[Value, int] = {}
        self.lines: list[str] = []
        self.count = 0

    def body(self) -> list[str]:
        rest = iter(self.kernel.values())
        for root in self.kernel.body:
            while any(v not in self.depth for v in root.values):
                self.add(next(rest))
            if isinstance(root, Store):
                at = _list(i if isinstance(i, Expr) else self.text[i] for i in root.index)
                mode = f"{root.mode} =" if root.mode else "="
                over = "" if root.over is None else f" over {root.over.name}"
                mask = "" if root.mask is None else f" if {self.arg(root.mask)}"
                self.lines.append(f"store {root.param}[{at}] {mode} {self.arg(root.value, bare=True)}{over}{mask}")
            else:
                self.lines.append(f"check {self.arg(root.value)} {json.dumps(root.message)}")
        return self.lines

    def add(self, v: Value) -> None:
        depth = 1 + max((self.depth[a] for a in v.args), default=-1)
        if v not in self.named and isinstance(v, Const):
            self.depth[v] = 0
            return
        text = self.render(v)
        if v not in self.named and self.stands_inline(v, text, depth):
            self.text[v], self.depth[v] = text, depth
            return
        name = self.fresh()
        axes = [a.name for a in sorted(v.axes, key=self.axis_order.__getitem__)]
        where = f"[{_list(axes)}]" if axes else ""
        self.lines.append(f"{name} : {dtypes.name(v.dtype)}{where} = {text}")
        self.text[v], self.depth[v] = name, 0

    def stands_inline(self, v: Value, text: str, depth: int) -> bool:
        if isinstance(v, IndexOf):
            return True
        if isinstance(v, (Reduce, Scan)) or (isinstance(v, Load) and v.mask is not None):
            return False
        levels = depth - (v in self.stored)
        return self.uses[v] == 1 and levels < INLINE_DEPTH and len(text) <= INLINE_CHARS

    def fresh(self) -> str:
        while (name := f"v{self.count}") in self.taken:
            self.count += 1
        self.count += 1
        return name

    def arg(self, v: Value, bare: bool = False) -> str:
        """A value where it is used; a literal is `bare` where the reader knows its dtype."""
        if v in self.text or not isinstance(v, Const):
            return self.text[v]
        return literal(v, bare)

    def render(self, v: Value) -> str:
        if isinstance(v, Const):
            return literal(v, bare=False)
        if isinstance(v, Load):
            at = _list(i if isinstance(i, Expr) else self.text[i] for i in v.index)
            text = f"load {v.param}[{at}]"
            if v.mask is not None and v.other is not None:
                text += f" if {self.arg(v.mask)} else {self.arg(v.other, bare=True)}"
            return text
        if isinstance(v, IndexOf):
            return f"index({v.expr})" if dtypes.name(v.dtype) == "i64" else f"index({dtypes.name(v.dtype)}, {v.expr})"
        if isinstance(v, Op):
            group = v.args[1:] if ops.row(v.name).rule == "where" else v.args
            bare = any(a in self.text for a in group)
            return f"{v.name}({_list(self.arg(a, bare) for a in v.args)})"
        if isinstance(v, Cast):
            return f"cast({dtypes.name(v.dtype)}, {self.arg(v.arg)})"
        if isinstance(v, Random):
            return f"random({v.kind}, seed {self.arg(v.seed, bare=True)}, offset {v.offset}, index {v.index})"
        if isinstance(v, Reduce):
            return f"reduce({v.kind}, {_list(map(self.arg, v.args))}, over {v.over.name}, lanes {v.lanes})"
        if isinstance(v, Scan):
            return f"scan({v.kind}, {self.arg(v.arg)}, over {v.over.name}, lanes {v.lanes})"
        if isinstance(v, Pick):
            return f"pick({self.text[v.value]}, {v.i})"
        raise TypeError(f"no text for {type(v).__name__}")


def literal(v: Const, bare: bool) -> str:
    """`1.0`, or `const(f32, 1.0)` where the reader could not know the dtype; a bool is always bare."""
    text = repr(v.value)
    return text if bare or isinstance(v.value, bool) else f"const({dtypes.name(v.dtype)}, {text})"


def _param(p: Param) -> str:
    return f"param {p.name} : {dtypes.name(p.dtype)}{_layout(p.shape, p.stride)}"


def _axis(a: Axis) -> str:
    return f"{a.name} < {a.size}"


def print_kernel(
    kernel: Kernel, schedule: Schedule | None = None, name: str = "kernel", batch: Launch | None = None
) -> str:
    """The text of a kernel, its schedule last; the same kernel always gives the same text.

    With `batch`, a launch of it for many tensors, a line for each of these.

    Raises ValueError where two names are the same or a name is not an identifier.
    """
    printer = _Printer(kernel, schedule)
    lines = [f"# {' '.join(origin.split())}" for origin in kernel.origins]
    symbols = sorted(kernel.symbols() | (batch.symbols if batch else set()), key=lambda s: s.name)
    if symbols:
        lines.append(f"sizes {_list(map(_range, symbols))}")
    lines += map(_param, kernel.params)
    lines += printer.body()
    if schedule is not None:
        held = f"; held {_list(printer.text[v] for v in schedule.held)}" if schedule.held else ""
        past = f"; past {_list(schedule.past)}" if schedule.past else ""
        warps = f"; warps {schedule.warps}" if schedule.warps else ""
        lines.append(f"schedule {schedule}{held}{past}{warps}")
    if batch is not None:
        lines += [f"over {_run(m)}" for m in batch.members]
    header = f"kernel {name}" + (f"  {_list(map(_axis, kernel.axes))}" if kernel.axes else "")
    return "\n  ".join([header, *lines]) + "\n"


def print_launch(launch: Launch) -> str:
    """The text of one launch: its kernel, and the tensors of a batch. `parse` reads both."""
    return print_kernel(launch.kernel, launch.schedule, launch.name, launch if launch.batched else None)


def _run(m: Binding) -> str:
    """`x, y; n = 512`: the buffers of one run and its own sizes."""
    return "; ".join([_list(m.buffers.values()), *(f"{s.name} = {e}" for s, e in m.sizes.items())])


def kernel_hash(kernel: Kernel, schedule: Schedule | None = None) -> str:
    """The content hash of a kernel (and its schedule), whatever its name, its origins and the words of its checks,
    which hold the user's line: code that moves in its file is no new kernel."""
    lines = [line for line in print_kernel(kernel, schedule).splitlines() if not line.startswith("  #")]
    return content_hash("\n".join(s.split(' "')[0] if s.startswith("  check ") else s for s in lines))


# -- plans --------------------------------------------------------------------------------------------
def _buffer(b: Buffer) -> str:
    where = b.storage if b.reuses is None else f"{b.storage} in {b.reuses}"
    if b.inside is not None:
        where += f" {b.inside[0]} at {b.inside[1]}"
    return f"buffer {b.name} : {_dtype(b)}{_layout(b.shape, b.stride)} {where} on {b.device}"


def _dtype(b: Buffer) -> str:
    """A buffer may have a dtype that no kernel handles."""
    return dtypes.name(b.dtype) if dtypes.supported(b.dtype) else str(b.dtype).removeprefix("torch.")


def _ref(r: TensorRef, plan: Plan) -> str:
    b = plan.buffers.get(r.buffer)
    offset = "" if r.offset.is_const and r.offset.value == 0 else f" offset {r.offset}"
    if b is not None and not offset and (r.shape, r.stride) == (b.shape, b.stride):
        return r.buffer
    return f"{r.buffer}{_layout(r.shape, r.stride)}{offset}"


def _argument(tree: object, plan: Plan) -> str:
    if isinstance(tree, TensorRef):
        return _ref(tree, plan)
    if isinstance(tree, Opaque):
        return f"opaque {tree.name}" + ("" if tree.item is None else f"[{tree.item}]")
    if isinstance(tree, (tuple, list)):
        return f"[{_list(_argument(item, plan) for item in tree)}]"
    if isinstance(tree, dict):
        return "{" + _list(f"{k}: {_argument(v, plan)}" for k, v in tree.items()) + "}"
    return repr(tree) if isinstance(tree, str) else str(tree)


def print_step(step: Step, plan: Plan) -> str:
    """One step in one line, a batch with one more for each tensor, with the bytes that it moves (symbols at their
    hints)."""
    if isinstance(step, Free):
        return f"free {_list(step.buffers)}"
    if isinstance(step, Join):
        return f"join {step.buffer} = {_list(step.regions)}"
    moved = launch_traffic(plan, step)
    note = f"  # reads {moved.read} B, writes {moved.written} B"
    if isinstance(step, Launch):
        if step.batched:
            return "\n    ".join([f"launch {step.name} over{note}", *map(_run, step.members)])
        tiles = f", region {step.region.number} of {step.region.tiles} tiles" if step.region else ""
        return f"launch {step.name}({_list(step.binding)}) -> {_list(step.writes) or 'nothing'}{tiles}{note}"
    return f"{_extern(step, plan)}{note}; {step.reason}"


def _extern(step: Extern, plan: Plan) -> str:
    args = [_argument(a, plan) for a in step.args] + [f"{k}={_argument(v, plan)}" for k, v in step.kwargs]
    results: list[str] = [r or "_" for r in step.results]
    results += [f"{symbol} = result {at}" for at, symbol in step.sizes]
    marks = "".join(f" {mark}" for mark, on in (("out", step.out), ("effect", step.effect)) if on)
    return f"extern{marks} {step.target}({_list(args)}) -> {_list(results) or 'nothing'}"


def print_plan(plan: Plan) -> str:
    """The text of a plan: what goes in, buffers, steps in order, what comes out, each kernel once."""
    lines = [f"plan {plan.name}", f"  inputs {_list(plan.inputs)}"]
    lines += [f"  size {s.name} = {s.hint}" + (f" from {s.source}" if s.source else "") for s in plan.symbols.values()]
    lines += [f"  {_buffer(b)}" for b in plan.buffers.values()]
    lines += [f"  {print_step(step, plan)}" for step in plan.steps]
    lines.append(f"  outputs {_list(_argument(o, plan) for o in plan.outputs)}")
    if plan.mutated:
        lines.append(f"  mutated {_list(sorted(plan.mutated))}")
    if plan.donated:
        lines.append(f"  donated {_list(sorted(plan.donated))}")
    kernels = dict.fromkeys(print_kernel(s.kernel, s.schedule, s.name) for s in plan.launches)
    return "\n".join(lines) + "\n" + "".join(f"\n{text}" for text in kernels)
