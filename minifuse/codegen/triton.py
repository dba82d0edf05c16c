"""The Triton dialect: kernels as `@triton.jit` functions over blocks.

A lane axis is a block of a Triton program: `i1 = tl.arange(0, 1024)`, along one dimension of all the
kernel's blocks, with a mask `m_i1` where the extent does not fill it. A value that varies over no lane
is a number. So a reduction over a lane is an expression, not a loop, and the loop tree that the
printer walks has the schedule's other loops alone. Text calls helpers of `triton_prelude`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch

from minifuse.ir import dtypes, ops
from minifuse.ir.index import ONE, ZERO, Axis, Expr
from minifuse.ir.kernel import Check, Param, Store
from minifuse.ir.plan import Launch
from minifuse.ir.shape import cdiv
from minifuse.ir.text import kernel_hash
from minifuse.ir.value import Cast, Load, Op, Random, Reduce, Scan, Value
from minifuse.passes.pressure import live_words
from minifuse.passes.schedule_triton import VECTOR_BYTES, elements, grid_size, problem, vector

from .looptree import build
from .printer import CodegenError, Printer, Scope, floors
from .triton_rows import BlockRows
from .triton_text import LIMIT, combine, extents_of, fixed, inline, literal, register, typed, warps

UNROLL = 8
# what stands in a loop that is not unrolled: loops, stores, and what is done across threads
_HEAVY = re.compile(
    r"^\s*(?:for |tl\.store)|\bmf_(?:scan|sums?|prod|max|min|any|all|row(?:argmax|argmin|softmax|welford|elements))\("
)
# tl.div_rn and tl.sqrt_rn are float32's; on float64 the plain operations round correctly
F64 = {"div": "({0} / {1})", "sqrt": "tl.sqrt({0})"}


@dataclass(frozen=True)
class TritonKernel:
    """A kernel's text and what a launch must know.

    `symbols` are its size arguments after the parameters, `grid` the number of programs; `extents` (elements)
    and `counts` bound every offset: one over 2**31 asks for 64-bit sizes. `messages` are its checks' by code.
    A batch has its parameters in a table, and its `own` sizes in another.
    """

    name: str
    text: str
    symbols: tuple[str, ...]
    grid: Expr
    warps: int
    extents: tuple[Expr, ...]
    messages: tuple[str, ...]
    batched: bool = False
    own: tuple[str, ...] = ()


class TritonDialect(BlockRows):
    """Text of one kernel in Triton."""

    def __init__(self, launch: Launch) -> None:
        kernel, schedule = launch.kernel, launch.schedule
        assert schedule is not None
        self.batched = launch.batched
        self.own = sorted(s.name for s in launch.own)
        super().__init__(schedule)
        self.extents = extents_of(kernel)
        self.started: set[Axis] = set()
        symbols = sorted(s.name for s in kernel.symbols())
        wide = any(e.is_const and e.value >= LIMIT for e in self.extents)
        # sizes are passed in the width that their offsets need, so they say what the rest is computed in
        self.width = f".to({symbols[0]}.dtype)" if symbols else ".to(tl.int64)" if wide else ""
        if symbols and wide:
            self.width = ".to(tl.int64)"

    # -- names and expressions -------------------------------------------------------------------
    def expr(self, e: Expr) -> str:
        # Triton's own division and remainder round towards zero
        return e.render(lambda a: a.name, *(("mf_floor(", "mf_wrap(") if floors(e) else ("//", "%")))

    def mask(self, axes: frozenset[Axis] | set[Axis]) -> str:
        """Which lanes over these axes exist; empty where all do."""
        return " & ".join(f"m_{a.name}" for a in self.lane_axes(axes) if self.ragged(a))

    def declare(self, p: Printer, scope: Scope, name: str, dtype: torch.dtype, text: str, lanes: bool) -> None:
        scope.lines.append(f"{name} = {text}")

    def lane(self, axis: Axis, start: str = "") -> list[str]:
        """The lines that define a lane axis, from where its block begins; where blocks may reach past its end, also
        which lanes exist, and whether all of a block's do."""
        if not self.ragged(axis):
            return [self.arange(axis, start)]
        name, size = axis.name, self.expr(axis.size)
        lines = [self.arange(axis, start), f"m_{name} = {name} < {size}"]
        if start:
            lines.append(f"f_{name} = {start} + {self.blocks[axis]} <= {size}")
        return lines

    def pays(self, p: Printer) -> bool:
        """Whether one of the largest accesses is wide where it has no mask."""
        spaces = [(a, a.axes if isinstance(a, Load) else a.space) for a in p.kernel.accesses]
        most = max((len(axes) for _, axes in spaces), default=0)
        params = [(p.param(a.param), a.index, axes) for a, axes in spaces if len(axes) == most]
        return any(self.whole(param, param.offset(index), axes) for param, index, axes in params)

    def whole(self, param: Param, offset: Expr, axes: frozenset[Axis] | set[Axis]) -> str:
        """The condition under which an access needs no mask, where it pays to ask: a mask that ends within what a
        thread asks for at once lets it ask for single elements alone. Empty where it does not."""
        ragged = [a for a in self.lane_axes(axes) if self.ragged(a)]
        wide = max(VECTOR_BYTES // param.dtype.itemsize, 1)
        last = self.dims[-1] if self.dims else None
        if last not in ragged or not self.started.issuperset(ragged) or (last.size % wide) is ZERO:
            return ""
        rest = offset - last.expr
        if last in rest.axes() or any(coef % wide for _, coef in rest.terms):
            return ""
        return " & ".join(f"f_{a.name}" for a in ragged)

    def arange(self, axis: Axis, start: str) -> str:
        at = "" if len(self.dims) == 1 else "[" + ", ".join(":" if a is axis else "None" for a in self.dims) + "]"
        lanes = f"tl.arange(0, {self.blocks[axis]}){at}"
        return f"{axis.name} = {start} + {lanes}" if start else f"{axis.name} = {lanes}{self.width}"

    # -- loops -----------------------------------------------------------------------------------
    def begin(self, p: Printer) -> None:
        grid = [loop for loop in p.loops if loop.kind == "grid"]
        if self.batched:
            self.look_up(p)
        if grid:
            at = "tl.load(blocks + 2 * tl.program_id(0) + 1)" if self.batched else "tl.program_id(0)"
            p.line(f"pid = {at}{self.width}")
        tiled = {loop.axis for loop in p.loops}
        self.started = {loop.axis for loop in p.loops if loop.axis in self.blocks and loop.step > 1
                        and (loop.kind == "loop" or cdiv(loop.axis.size, loop.step) is not ONE)}  # fmt: skip
        if self.started and not self.pays(p):
            self.started = set()
        for axis in self.dims:
            if axis not in tiled:
                p.scopes[0].lines += self.lane(axis)

    def look_up(self, p: Printer) -> None:
        """The lines that find the tensor of a program: its own sizes, and its addresses, multiples of `align`."""
        p.line("tensor = tl.load(blocks + 2 * tl.program_id(0))")

        def row(width: int, k: int) -> str:
            return ("tensor" if width == 1 else f"{width} * tensor") + (f" + {k}" if k else "")

        for k, name in enumerate(self.own):
            p.line(f"{name} = tl.load(lengths + {row(len(self.own), k)})")
        for k, param in enumerate(p.kernel.params):
            pointer = f"tl.pointer_type({dtypes.row(param.dtype).triton})"
            address = f"tl.load(table + {row(len(p.kernel.params), k)}).to({pointer})"
            p.line(f"{param.name} = tl.multiple_of({address}, align)")

    def open_loop(self, p: Printer, k: int) -> None:
        """The lines of a loop are placed where it is closed."""

    def close_loop(self, p: Printer, k: int, inner: Scope) -> None:
        loop, axis = p.loops[k], p.loops[k].axis
        inside = any(other.axis is axis for other in p.loops[k + 1 :])
        start = axis.name if loop.step == 1 and axis not in self.blocks else f"{axis.name}_{k}"
        if loop.kind == "grid":
            at = self.point(p, k)
            if loop.step == 1:
                head = [f"{start} = {at}"]
            else:
                head = self.lane(axis, "" if cdiv(axis.size, loop.step) is ONE else f"{at} * {loop.step}")
            p.here.lines += [*head, *inner.lines]
            return
        outer = [j for j in range(k) if p.loops[j].axis is axis]
        size, low, stop = self.expr(axis.size), "0", self.expr(axis.size)
        if outer:
            low = f"{axis.name}_{outer[-1]}"
            stop = f"{low} + {p.loops[outer[-1]].step}"
            if not axis.size.is_const or axis.size.value % p.loops[outer[-1]].step:
                stop = f"min({stop}, {size})"
        lines = inner.lines if loop.step == 1 or inside else [*self.lane(axis, start), *inner.lines]
        plain = loop.step == 1 and not any(_HEAVY.search(line) for line in lines)
        bounds = f"{low}, {stop}" + (f", {loop.step}" if loop.step > 1 else "")
        head_text = f"tl.range({bounds}, loop_unroll_factor={UNROLL})" if plain else f"range({bounds})"
        p.here.lines.append(f"for {start} in {head_text}:")
        p.here.lines += ["    " + line for line in lines]

    def point(self, p: Printer, k: int) -> str:
        """The position of a program along one grid loop; the last loop runs fastest."""
        grid = [j for j, loop in enumerate(p.loops) if loop.kind == "grid"]
        counts = {j: cdiv(p.loops[j].axis.size, p.loops[j].step) for j in grid}
        below = ONE
        for j in grid:
            below = below * counts[j] if j > k else below
        at = "pid" if below is ONE else f"(pid // {self.factor(below)})"
        return at if k == grid[0] else f"({at} % {self.factor(counts[k])})"

    def factor(self, e: Expr) -> str:
        return self.expr(e) if e.is_const or e.atom is not None else f"({self.expr(e)})"

    # -- values ----------------------------------------------------------------------------------
    def const(self, p: Printer, value: object, dtype: torch.dtype) -> str:
        return typed(value, dtype)

    def index(self, p: Printer, expr: Expr, dtype: torch.dtype, lanes: bool) -> str:
        if expr.is_const:
            return typed(expr.value, dtype)
        name, loops = dtypes.row(dtype).triton, {loop.axis for loop in p.loops if loop.kind == "loop"}
        # in the interpreter the variable of a loop is a plain int
        plain = expr.atoms() <= loops - set(self.dims)
        return f"tl.cast({self.expr(expr)}, {name})" if plain else f"{self.factor(expr)}.to({name})"

    def op(self, p: Printer, v: Op, lanes: bool) -> str:
        row = ops.row(v.name)
        template = F64.get(v.name, row.triton) if v.args[-1].dtype is torch.float64 else row.triton
        values = v.args[1:] if v.name == "where" else v.args
        infix = template.startswith("({0}") and any(fixed(a) is None for a in values)
        # a bare literal takes the dtype of what it meets, in a call if it is of float32 or, as an integer, no narrower
        # than int32; helpers ask their first argument for its dtype
        wide = (torch.float32,) if v.name != "where" else (torch.float32, torch.int32, torch.int64)
        first = v.name != "where" and fixed(values[0]) is not None
        bare = infix or (register(values[0].dtype) in wide and not first and any(fixed(a) is None for a in values))
        bare = bare and values[0].dtype is not torch.bool
        args = []
        for a in v.args:
            number = fixed(a) if bare else None
            args.append(p.name(a) if number is None else literal(number, a.dtype))
        return template.replace("mf.", "mf_").format(*args)

    def cast(self, p: Printer, v: Cast, lanes: bool) -> str:
        arg, source, target = p.name(v.arg), register(v.arg.dtype), v.dtype
        if target is torch.bool:
            return f"({arg} != 0)"
        if dtypes.is_half(target):
            x = arg if source is torch.float32 else f"{arg}.to(tl.float32)"
            return f"mf_{dtypes.name(target)}({x})"
        if source is target:
            return arg
        if target in (torch.int8, torch.int16, torch.uint8) and source.is_floating_point:
            arg += ".to(tl.int32)"
        return f"{arg}.to({dtypes.row(target).triton})"

    def scan(self, p: Printer, v: Scan, around: Scope, scope: Scope, lanes: bool) -> str:
        before, text, shape = p.fresh("c"), p.name(v.arg), self.shape(v.axes - {v.over})
        whole = v.over in self.blocks and not any(loop.axis is v.over for loop in p.loops)
        if not whole:
            start = f"{shape}, {self.identities(v)[0]}, {dtypes.row(v.dtype).triton}"
            around.lines.append(f"{before} = tl.full({start})")
        if v.over not in self.blocks:
            scope.lines.append(f"{before} = {combine(v, (before,), (text,))}")
            return before
        block, last = p.fresh(), p.fresh()
        before_, n, after = self.sides(v)
        join = f"mf_{ops.REDUCTIONS[v.kind].combine}"
        found = f"mf_scan({self.spread(v, v.arg, text)}, {before_}, {n}, {after}, {join})"
        scope.lines += [f"{block}_, {last}_ = {found}", f"{block} = tl.reshape({block}_, {self.shape(v.axes)})"]
        if whole:
            return block
        name = p.fresh("r")  # no `v`: it is not to move behind the next running result
        scope.lines += [f"{last} = {last}_" if shape == "[]" else f"{last} = tl.reshape({last}_, {shape})",
                        f"{name} = {combine(v, (before,), (block,))}",
                        f"{before} = {combine(v, (before,), (last,))}"]  # fmt: skip
        return name

    def random(self, p: Printer, v: Random, lanes: bool) -> str:
        index = typed(v.index.value, torch.int64) if v.index.is_const else self.expr(v.index)
        run = "_run" if v.kind == "uniform" and self.in_fours(v.index) else ""
        return f"mf_{v.kind}{run}({p.name(v.seed)}, {v.offset}, {index})"

    def in_fours(self, index: Expr) -> bool:
        """Whether the lanes of an index are, four by four, a multiple of four and what follows it."""
        if not self.dims or self.blocks[self.dims[-1]] % 4:
            return False
        last = self.dims[-1]
        rest = index - last.expr
        return last not in rest.axes() and all(coef % 4 == 0 for _, coef in rest.terms)

    # -- memory ----------------------------------------------------------------------------------
    def pointer(self, p: Printer, param: Param, index: tuple[Expr | Value, ...], affine: Expr) -> str:
        parts = [self.expr(affine)] if affine.terms or len(index) == 0 else []
        for i, stride in zip(index, param.stride, strict=True):
            if isinstance(i, Value):
                parts.append(p.name(i) if stride is ONE else f"{p.name(i)} * {self.factor(stride)}")
        text = " + ".join(parts)
        if not text or text == "0":
            return param.name
        return f"{param.name} + {text}" if text.isidentifier() else f"{param.name} + ({text})"

    def load(self, p: Printer, v: Load, lanes: bool) -> str:
        param = p.param(v.param)
        affine = param.offset(v.index)
        over = affine.axes().union(*(i.axes for i in v.index if isinstance(i, Value)))
        text = self.pointer(p, param, v.index, affine)
        masks = [m for m in [self.mask(over)] if m]
        if v.mask is not None:
            masks.insert(0, p.name(v.mask))
            beyond = [a for a in self.lane_axes(v.mask.axes) if a not in over]
            if beyond and not any(a in over for a in self.dims):
                text = f"{text} + tl.zeros({self.shape(set(beyond))}, tl.int32)"
            else:
                text += "".join(f" + 0 * {a.name}" for a in beyond)
        found = f"tl.load({text}, mask={' & '.join(masks)})" if masks else f"tl.load({text})"
        indirect = any(isinstance(i, Value) for i in v.index)
        if v.mask is None and not indirect and (full := self.whole(param, affine, over)):
            found = f"(tl.load({text}) if {full} else {found})"
        if dtypes.name(v.dtype) in dtypes.BYTE_FLOATS:
            found = f"mf_widen_{dtypes.name(v.dtype)}({found})"
        elif dtypes.is_half(v.dtype):
            found += ".to(tl.float32)"
        if v.mask is None or v.other is None:
            return found
        return f"tl.where({p.name(v.mask)}, {found}, {p.name(v.other)})"

    def store(self, p: Printer, root: Store) -> None:
        param = p.param(root.param)
        offset = param.offset(root.index)
        at = self.pointer(p, param, root.index, offset)
        # an axis of size one may be missing from the offset, and a lane of it in the value
        masks = [m for m in (self.mask(root.space), root.mask and p.name(root.mask)) if m]
        mask = " & ".join(masks)
        missing = [a for a in self.lane_axes(root.space) if a not in offset.axes()]
        for a in missing:
            at += f" + 0 * {a.name}"
        value = p.name(root.value)
        if dtypes.name(param.dtype) in dtypes.BYTE_FLOATS:
            value = f"mf_narrow_{dtypes.name(param.dtype)}({value})"
        elif dtypes.is_half(param.dtype):
            value += f".to({dtypes.row(param.dtype).triton})"
        masked = f"tl.store({at}, {value}, mask={mask})" if mask else f"tl.store({at}, {value})"
        indirect = any(isinstance(i, Value) for i in root.index)
        if root.mask is None and not indirect and not missing and (full := self.whole(param, offset, root.space)):
            p.here.lines += [f"if {full}:", f"    tl.store({at}, {value})", "else:", f"    {masked}"]
        else:
            p.line(masked)

    def check(self, p: Printer, root: Check) -> None:
        code = p.error_code(root)
        bad = f"mf_invert({p.name(root.condition)})"
        mask = self.mask(root.condition.axes)
        bad = f"{bad} & {mask}" if mask else bad
        shape = self.shape(root.condition.axes)
        at = "err" if shape == "[]" else f"err + tl.zeros({shape}, tl.int32)"
        p.line(f"tl.store({at}, {code}, mask={bad})")

    # -- what is kept ----------------------------------------------------------------------------
    def hold_begin(self, p: Printer, v: Value) -> None:
        """Blocks stay in registers: nothing is kept in a row buffer."""

    def hold(self, p: Printer, v: Value) -> None:
        raise CodegenError("a row buffer in registers")

    def held(self, p: Printer, v: Value) -> str:
        raise CodegenError("a row buffer in registers")

    # -- the function ----------------------------------------------------------------------------
    def finish(self, p: Printer, name: str) -> str:
        tables = ["align: tl.constexpr", "table", "lengths", "blocks"]
        args = tables if self.batched else [param.name for param in p.kernel.params]
        args += [s.name for s in p.symbols if s.name not in self.own]
        if p.messages:
            args.append("err")
        body = inline(p.scopes[0].lines)
        return "\n".join(
            ["@triton.jit", f"def {name}({', '.join(args)}):", *(f"    {line}" for line in body or ["pass"])]
        )


def write_kernel(launch: Launch) -> TritonKernel:
    """The Triton of one launch's kernel. Raises CodegenError where Triton cannot express it."""
    kernel, schedule = launch.kernel, launch.schedule
    assert schedule is not None
    dialect = TritonDialect(launch)
    if why := problem(kernel, schedule):
        raise CodegenError(why)
    loops = replace(schedule, loops=tuple(loop for loop in schedule.loops if loop.kind != "lane"), held=())
    try:
        tree = build(kernel, loops)
    except ValueError as why:
        raise CodegenError(str(why)) from None
    name = "k_" + kernel_hash(kernel, schedule) + ("_batch" if launch.batched else "")
    printer = Printer(kernel, loops, dialect, tree)
    text = printer.write(name)
    symbols = tuple(sorted(s.name for s in kernel.symbols() - launch.own))
    along: list[Reduce | Scan] = [*kernel.reductions, *kernel.scans]
    rows = any(r.lanes > 1 for r in along)
    words = live_words(kernel.body, dialect.blocks)
    count = schedule.warps or warps(elements(kernel, dialect.blocks), words, rows, vector(kernel))
    return TritonKernel(name, text, symbols, grid_size(schedule), count, dialect.extents,
                        tuple(printer.messages.values()), launch.batched, tuple(dialect.own))  # fmt: skip
