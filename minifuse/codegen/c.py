"""The C dialect: kernels as functions over vectors of 16 lanes.

Text is plain C with the compiler's vector types; what a line calls (`mf_…`) is defined by
`c_prelude`. A kernel is `void name(lo, hi, P, S, err)`: it runs the points lo..hi of its grid with
the parameters' addresses P and the dynamic sizes S, and sets err[0] when a check fails.
"""

from __future__ import annotations

import torch

from minifuse.ir import dtypes, ops
from minifuse.ir.index import ONE, ZERO, Axis, Expr, Sym
from minifuse.ir.kernel import Check, Kernel, Param, Schedule, Store
from minifuse.ir.shape import cdiv, product
from minifuse.ir.value import LANES, Cast, Load, Op, Random, Reduce, Scan, Value
from minifuse.passes.schedule import tile_elements

from . import c_rows, c_tiles
from .c_text import (
    MAX_LOCAL,
    SCALAR,
    Local,
    Place,
    ahead,
    combine,
    divisions,
    identities,
    identity,
    joined,
    literal,
    pointer,
    register,
    streams,
    wide,
)
from .looptree import Fold
from .printer import CodegenError, Printer, Scope


class CDialect:
    """Text of one kernel in C."""

    def __init__(self) -> None:
        self.locals: dict[Fold | Value, Local] = {}
        self.vectors: dict[Fold, tuple[str, ...]] = {}
        self.scalars: dict[Fold, tuple[str, ...]] = {}
        self.streamed: set[Param] = set()
        self.tiles: dict[Load, str] = {}
        self.behind: list[str] = []
        self.kept: dict[Fold, c_rows.Kept] = {}

    # -- names -----------------------------------------------------------------------------------
    @staticmethod
    def axis(a: Sym | Axis) -> str:
        return ("x_" if isinstance(a, Axis) else "z_") + a.name

    def expr(self, e: Expr) -> str:
        return e.render(self.axis, *divisions(e))

    def ctype(self, dtype: torch.dtype, lanes: bool) -> str:
        name = register(dtype)
        return f"v_{name}" if lanes else SCALAR[name]

    def declare(self, p: Printer, scope: Scope, name: str, dtype: torch.dtype, text: str, lanes: bool) -> None:
        scope.lines.append(f"const {self.ctype(dtype, lanes)} {name} = {text};")

    def vector(self, p: Printer, v: Value) -> str:
        """The name of a value as a vector, splatted where it does not vary over the lane."""
        name = p.name(v)
        return name if p.lanes(v) else f"mf_splat_{register(v.dtype)}({name})"

    # -- loops -----------------------------------------------------------------------------------
    def begin(self, p: Printer) -> None:
        top = p.scopes[0].lines
        for k, param in enumerate(p.kernel.params):
            storage = dtypes.row(param.dtype).c_storage
            const = "" if param.name in p.kernel.writes else "const "
            top.append(f"{const}{storage}* const {pointer(p, param)} = P[{k}];")
        for k, s in enumerate(p.symbols):
            top.append(f"const int64_t {self.axis(s)} = S[{k}];")

    def count(self, k: int, p: Printer) -> Expr:
        loop = p.loops[k]
        return cdiv(loop.axis.size, loop.step)

    def var(self, p: Printer, k: int) -> str:
        """The C variable of a loop: the axis itself in its last loop, its tile's start before."""
        axis = p.loops[k].axis
        return self.axis(axis) if p.last_loop(axis) == k else f"{self.axis(axis)}_t{k}"

    def open_loop(self, p: Printer, k: int) -> None:
        """Grid loops are decoded from the point number where the first of them is closed."""
        loop = p.loops[k]
        if loop.kind == "lane" and self.ragged(p):
            p.line(f"const int64_t n = {self.end(p, k)} - {self.var(p, k)} < {LANES} ? "
                   f"{self.end(p, k)} - {self.var(p, k)} : {LANES};")  # fmt: skip

    def end(self, p: Printer, k: int) -> str:
        outer = p.previous(k)
        return self.expr(p.loops[k].axis.size) if outer is None else f"e_{self.var(p, outer)}"

    def close_loop(self, p: Printer, k: int, inner: Scope) -> None:
        loop = p.loops[k]
        var = self.var(p, k)
        lines = inner.lines
        if loop.step > 1:
            bound = self.end(p, k)
            stop = f"const int64_t e_{var} = {var} + {loop.step} < {bound} ? {var} + {loop.step} : {bound};"
            lines = [stop, *lines]
        if loop.kind == "grid":
            grid = [j for j, g in enumerate(p.loops) if g.kind == "grid"]
            at = "g"
            below = [self.count(j, p) for j in grid if j > k]
            for c in below:
                at = f"({at} / ({self.expr(c)}))" if c is not ONE else at
            if k != grid[0]:
                at = f"({at} % ({self.expr(self.count(k, p))}))"
            head = f"const int64_t {var} = {at}" + (f" * {loop.step};" if loop.step > 1 else ";")
            p.here.lines += [head, *lines]
            return
        if loop.kind == "lane" and len(lines) == self.ragged(p):
            return  # what it would read is read where it lies (`c_rows`)
        outer = p.previous(k)
        begin = "0" if outer is None else self.var(p, outer)
        step = LANES if loop.kind == "lane" else loop.step
        p.here.lines.append(f"for (int64_t {var} = {begin}; {var} < {self.end(p, k)}; {var} += {step}) {{")
        p.here.lines += ["  " + text for text in lines]
        p.here.lines.append("}")
        if p.here.loop is None or p.loops[p.here.loop].kind == "grid":
            p.here.lines += self.behind
            self.behind.clear()

    def ragged(self, p: Printer) -> bool:
        """Whether the last vector of a row may be partial."""
        assert p.lane is not None
        return (p.lane.size % LANES) is not ZERO

    def n(self, p: Printer) -> str:
        return "n" if self.ragged(p) else str(LANES)

    # -- values ----------------------------------------------------------------------------------
    def const(self, p: Printer, value: object, dtype: torch.dtype) -> str:
        return literal(value, dtype)

    def index(self, p: Printer, expr: Expr, dtype: torch.dtype, lanes: bool) -> str:
        text = self.lane_expr(p, expr) if lanes else f"({self.expr(expr)})"
        if dtype is torch.int64:
            return text
        return f"mf_cast_i64_i32({text})" if lanes else f"(int32_t){text}"

    def lane_expr(self, p: Printer, expr: Expr) -> str:
        """An expression over the lane as a vector of int64."""
        assert p.lane is not None
        c = expr.coefficient(p.lane)
        if c is not None and not any(a is p.lane for a in c.atoms()):
            base = self.expr(expr)
            step = "mf_iota_i64()" if c is ONE else f"mf_iota_i64() * ({self.expr(c)})"
            return f"(mf_splat_i64({base}) + {step})"
        lane = f"(mf_splat_i64({self.axis(p.lane)}) + mf_iota_i64())"
        return "(" + expr.render(lambda a: lane if a is p.lane else self.axis(a), *divisions(expr)) + ")"

    def op(self, p: Printer, v: Op, lanes: bool) -> str:
        row = ops.row(v.name)
        args = [self.vector(p, a) if lanes else p.name(a) for a in v.args]
        if row.c.startswith("@"):
            return f"mf_{row.c[1:]}_{register(v.args[-1].dtype)}{'' if lanes else '_s'}({', '.join(args)})"
        text = row.c.format(*args)
        narrow = not lanes and v.dtype in (torch.int8, torch.uint8, torch.int16)
        return f"({SCALAR[register(v.dtype)]}){text}" if narrow else text

    def cast(self, p: Printer, v: Cast, lanes: bool) -> str:
        source, target = dtypes.name(v.arg.dtype), dtypes.name(v.dtype)
        arg = self.vector(p, v.arg) if lanes else p.name(v.arg)
        return f"mf_cast_{source}_{target}{'' if lanes else '_s'}({arg})"

    def random(self, p: Printer, v: Random, lanes: bool) -> str:
        seed = p.name(v.seed)
        if p.lanes(v.seed):
            raise CodegenError("a seed that differs between lanes")
        if lanes and p.lane is not None and v.index.coefficient(p.lane) is ONE:
            return f"mf_{v.kind}_run({seed}, {v.offset}u, {self.expr(v.index)})"
        helper = f"mf_{v.kind}" + ("" if lanes else "_s")
        index = self.lane_expr(p, v.index) if lanes else self.expr(v.index)
        return f"{helper}({seed}, {v.offset}u, {index})"

    def scan(self, p: Printer, v: Scan, around: Scope, scope: Scope, lanes: bool) -> str:
        t, running = register(v.dtype), p.fresh("s")
        start, arg = identity(v.kind, v.dtype), self.vector(p, v.arg) if lanes else p.name(v.arg)
        name = ops.REDUCTIONS[v.kind].combine
        if v.lanes > 1:
            if p.lane is not v.over:
                raise CodegenError(f"{v.over} is scanned by lanes and is not the lane")
            around.lines.append(f"{'double' if wide(v) else SCALAR[t]} {running} = {start};")
            return f"mf_scan{'wide' * wide(v)}{name}_{t}({arg}, &{running})"
        start = f"mf_splat_{t}({start})" if lanes else start
        around.lines.append(f"{self.ctype(v.dtype, lanes)} {running} = {start};")
        scope.lines.append(joined(name, v.dtype, running, arg, "" if lanes else "_s"))
        return running

    # -- memory ----------------------------------------------------------------------------------
    def load(self, p: Printer, v: Load, lanes: bool) -> str:
        param = p.param(v.param)
        t = dtypes.name(v.dtype)
        at = self.place_of(p, param, v)
        base, offset, varying = at.base, at.offset, at.varying
        step = offset.coefficient(p.lane) if p.lane is not None else ZERO
        if not lanes:
            text = f"mf_load_{t}_s({base})"
            return text if v.mask is None else f"({p.name(v.mask)} ? {text} : {p.name(v.other)})"  # type: ignore[arg-type]
        if v.mask is not None and p.lanes(v.mask):
            assert v.other is not None
            mask, other = p.name(v.mask), self.vector(p, v.other)
            if not varying and step is ONE:
                return f"mf_loadm_{t}({base}, {mask}, {other}, {self.n(p)})"
            return f"mf_gatherm_{t}({pointer(p, param)}, {self.offsets(p, at)}, {mask}, {other}, {self.n(p)})"
        if varying or step is None:
            text = f"mf_gather_{t}({pointer(p, param)}, {self.offsets(p, at)}, {self.n(p)})"
        elif step is ZERO:
            text = f"mf_splat_{register(v.dtype)}(mf_load_{t}_s({base}))"
        elif step is ONE:
            text = f"mf_loadn_{t}({base}, n)" if self.ragged(p) else f"mf_load_{t}({base})"
            if streams(p, param, offset, self.streamed):
                text = f"({ahead(base)}, {text})"
        elif (place := c_tiles.staged(self, p, v, offset, step)) is not None:
            text = f"mf_loadn_{t}({place}, n)" if self.ragged(p) else f"mf_load_{t}({place})"
        else:
            text = f"mf_loads_{t}({base}, {self.expr(step)}, {self.n(p)})"
        if v.mask is None:
            return text
        assert v.other is not None
        return f"({p.name(v.mask)} ? {text} : {self.vector(p, v.other)})"

    def place_of(self, p: Printer, param: Param, access: Load | Store) -> Place:
        offset = param.offset(access.index)
        uniform, varying = "", ""
        for i, s in zip(access.index, param.stride, strict=True):
            if isinstance(i, Value):
                term = f" + {p.name(i)} * ({self.expr(s)})"
                uniform, varying = (uniform, varying + term) if p.lanes(i) else (uniform + term, varying)
        return Place(f"{pointer(p, param)} + ({self.expr(offset)}){uniform}", offset, uniform, varying)

    def offsets(self, p: Printer, at: Place) -> str:
        """Element offsets of a gather or a scatter, a vector of int64."""
        assert p.lane is not None
        over_lane = p.lane in at.offset.atoms()
        text = self.lane_expr(p, at.offset) if over_lane else f"mf_splat_i64({self.expr(at.offset)})"
        return text + at.varying + at.uniform

    def store(self, p: Printer, root: Store) -> None:
        if root.mask is not None and p.lanes(root.mask):
            param, mask = p.param(root.param), p.name(root.mask)
            at, value = self.offsets(p, self.place_of(p, param, root)), self.vector(p, root.value)
            t = dtypes.name(param.dtype)
            p.line(f"mf_scatterm_{t}({pointer(p, param)}, {at}, {value}, {mask}, {self.n(p)});")
            return
        write = self.writing(p, root)
        p.line(write if root.mask is None else f"if ({p.name(root.mask)}) {{ {write} }}")

    def writing(self, p: Printer, root: Store) -> str:
        param = p.param(root.param)
        t = dtypes.name(param.dtype)
        place = self.place_of(p, param, root)
        at, offset = place.base, place.offset
        if p.lane is None or p.lane not in root.space:
            return f"mf_store_{t}_s({at}, {p.name(root.value)});"
        value = self.vector(p, root.value)
        step = offset.coefficient(p.lane)
        if place.varying or step is None:
            return f"mf_scatter_{t}({pointer(p, param)}, {self.offsets(p, place)}, {value}, {self.n(p)});"
        if step is ONE:
            if root.param in p.tree.schedule.past:
                return f"mf_storep_{t}({at}, {value}, {self.n(p)});"
            text = f"mf_storen_{t}({at}, {value}, n);" if self.ragged(p) else f"mf_store_{t}({at}, {value});"
            return f"{ahead(at, write=True)}; {text}" if streams(p, param, offset, self.streamed) else text
        if (tile := c_tiles.gathered(self, p, root, offset, step)) is not None:
            return f"mf_storen_{t}({tile}, {value}, n);" if self.ragged(p) else f"mf_store_{t}({tile}, {value});"
        return f"mf_stores_{t}({at}, {value}, {self.expr(step)}, {self.n(p)});"

    def check(self, p: Printer, root: Check) -> None:
        code = p.error_code(root)
        name = p.name(root.condition)
        if p.lanes(root.condition):
            test = f"!mf_all({name} | ~mf_lanes(n))" if self.ragged(p) else f"!mf_all({name})"
        else:
            test = f"!{name}"
        p.line(f"if ({test}) err[0] = {code};")

    # -- reductions ------------------------------------------------------------------------------
    def deeper(self, p: Printer, fold: Fold) -> tuple[int, ...]:
        """Loops inside the fold's own, over which its result varies."""
        return tuple(k for k in p.tree.loops_of(fold.value.axes) if k > fold.loop)

    def axes_below(self, p: Printer, loops: tuple[int, ...]) -> list[Axis]:
        """Axes of a local buffer, the lane last: a vector's elements lie together."""
        return sorted(dict.fromkeys(p.loops[k].axis for k in loops), key=lambda a: a is p.lane)

    def padded(self, p: Printer, a: Axis) -> Expr:
        """Elements of a local buffer along an axis, whole vectors along the lane."""
        size = tile_elements(p.loops, a)
        return cdiv(size, LANES) * LANES if a is p.lane else size

    def make_local(self, p: Printer, name: str, dtype: torch.dtype, count: Expr, scope: Scope | None = None) -> None:
        """A buffer on the stack, or on the heap where its length is not known or large."""
        kind, lines = SCALAR[register(dtype)], (scope or p.here).lines
        if count.is_const and count.value * 8 <= MAX_LOCAL:
            lines.append(f"{kind} {name}[{count}] __attribute__((aligned(64)));")
        else:
            size = f"({self.expr(count)}) * (int64_t)sizeof({kind})"
            lines.append(f"MF_SCRATCH {kind}* const {name} = mf_scratch({size});")

    def place(self, p: Printer, axes: list[Axis]) -> str:
        """The position in a local buffer of the current point."""
        text = "0"
        for a in axes:
            start = p.start(a)
            here = self.axis(a) if start is None else f"({self.axis(a)} - {self.var(p, start)})"
            text = here if text == "0" else f"({text}) * ({self.expr(self.padded(p, a))}) + {here}"
        return text

    def fold_begin(self, p: Printer, fold: Fold) -> None:
        r = fold.value
        types = tuple(a.dtype for a in r.parts)
        if c_rows.keeps(fold):
            names = c_rows.begin(self, p, fold)
            if self.deeper(p, fold):
                self.locals[fold] = Local(names, f"({self.expr(self.kept[fold].size)})", 1, types)
            else:
                self.vectors[fold] = names
            return
        start = identities(r)
        name = p.fresh("a")
        names = tuple(f"{name}_{i}" for i in range(len(types)))
        deeper = self.deeper(p, fold)
        rows = r.lanes if fold.level == 0 else 1
        lane = p.loops[fold.loop].kind == "lane"
        if lane or not deeper and rows == 1:
            for n, t, s in zip(names, types, start, strict=True):
                vector = lane or p.lanes(r)
                s = f"mf_splat_{register(t)}({s})" if vector else s
                p.line(f"{self.ctype(t, vector)} {n} = {s};")
            self.vectors[fold] = names
            return
        size = product(self.padded(p, a) for a in self.axes_below(p, deeper))
        for n, t, s in zip(names, types, start, strict=True):
            self.make_local(p, n, t, size * rows)
            p.line(f"for (int64_t k = 0; k < {self.expr(size * rows)}; ++k) {n}[k] = {s};")
        self.locals[fold] = Local(names, f"({self.expr(size)})", rows, types)

    def fold_step(self, p: Printer, fold: Fold) -> None:
        r = fold.value
        if fold.level > 0:
            self.join_level(p, fold)
            return
        if fold in self.kept:
            c_rows.step(self, p, fold)
            return
        if fold in self.vectors:
            across = p.loops[fold.loop].kind == "lane"
            lanes = across or p.lanes(r)
            args = [self.vector(p, a) if lanes else p.name(a) for a in r.parts]
            if across and self.ragged(p):
                types = [register(a.dtype) for a in r.parts]
                args = [
                    f"mf_where_{t}(mf_lanes(n), {a}, mf_splat_{t}({s}))"
                    for a, t, s in zip(args, types, identities(r), strict=True)
                ]
            p.line(combine(r, self.vectors[fold], args, "" if lanes else "_s"))
            return
        local = self.locals[fold]
        axes = self.axes_below(p, self.deeper(p, fold))
        at = self.place(p, axes)
        if local.rows > 1:
            k = self.axis(r.over)
            at = f"({k} % {local.rows}) * {local.size} + {at}"
        lanes = p.lane in axes
        self.update(p, r, local, at, [self.vector(p, a) if lanes else p.name(a) for a in r.parts], lanes)

    def update(self, p: Printer, r: Reduce, local: Local, at: str, args: list[str], lanes: bool) -> None:
        """Fold values into a place of a local buffer, which holds register types."""
        place = p.fresh("k")
        p.line(f"const int64_t {place} = {at};")
        names = [f"(*(u_{register(t)}*)({n} + {place}))" if lanes else f"{n}[{place}]"
                 for n, t in zip(local.names, local.dtypes, strict=True)]  # fmt: skip
        p.line(combine(r, names, args, "" if lanes else "_s"))

    def join_level(self, p: Printer, fold: Fold) -> None:
        """Fold the finished chunk below into this level."""
        r = fold.value
        below = p.tree.folds[r][fold.level - 1]
        if fold in self.vectors:
            args = self.scalars[below]
            p.line(combine(r, self.vectors[fold], list(args), "" if p.lanes(r) else "_s"))
            return
        mine, theirs = self.locals[fold], self.locals[below]
        p.line(f"for (int64_t k = 0; k < {mine.size}; ++k) {{")
        p.line("  " + combine(r, [f"{n}[k]" for n in mine.names], [f"{n}[k]" for n in theirs.names], "_s"))
        p.line("}")

    def fold_end(self, p: Printer, fold: Fold) -> tuple[str, ...]:
        r = fold.value
        if fold in self.kept:
            c_rows.end(self, p, fold, self.vectors[fold] if fold in self.vectors else self.locals[fold].names)
        if fold in self.vectors and fold not in self.kept and p.loops[fold.loop].kind == "lane":
            names = self.horizontal(p, r, self.vectors[fold])
        elif fold in self.vectors:
            names = self.vectors[fold]
        else:
            local = self.locals[fold]
            if local.rows > 1:
                self.join_rows(p, r, local)
            if self.deeper(p, fold):
                return ()
            names = tuple(f"{n}[0]" for n in local.names)
        self.scalars[fold] = names
        return names

    def horizontal(self, p: Printer, r: Reduce, vectors: tuple[str, ...]) -> tuple[str, ...]:
        name = p.fresh("r")
        t = register(r.args[0].dtype)
        if r.results == 1:
            p.line(f"const {SCALAR[t]} {name} = mf_hreduce_{ops.REDUCTIONS[r.kind].combine}_{t}({vectors[0]});")
            return (name,)
        p.line(f"{SCALAR[t]} {name}_0; int64_t {name}_1;")
        p.line(f"mf_h{r.kind}_{t}({vectors[0]}, {vectors[1]}, &{name}_0, &{name}_1);")
        return (f"{name}_0", f"{name}_1")

    def join_rows(self, p: Printer, r: Reduce, local: Local) -> None:
        """Join the lanes of a tree by halves, into the first row."""
        half = local.rows // 2
        while half:
            p.line(f"for (int64_t k = 0; k < {half} * {local.size}; ++k) {{")
            theirs = [f"{n}[k + {half} * {local.size}]" for n in local.names]
            p.line("  " + combine(r, [f"{n}[k]" for n in local.names], theirs, "_s"))
            p.line("}")
            half //= 2

    def fold_read(self, p: Printer, r: Reduce) -> tuple[str, ...] | None:
        fold = p.tree.folds[r][-1]
        if fold not in self.locals:
            return None
        local = self.locals[fold]
        axes = self.axes_below(p, self.deeper(p, fold))
        at = self.place(p, axes)
        lanes = p.lanes(r)
        scope = p.scope_of(p.tree.loops_of(r.axes))
        out = []
        for n, t in zip(local.names, local.dtypes, strict=True):
            name = p.fresh()
            text = f"*(const u_{register(t)}*)({n} + {at})" if lanes else f"{n}[{at}]"
            self.declare(p, scope, name, t, text, lanes)
            out.append(name)
        return tuple(out)

    # -- row buffers -----------------------------------------------------------------------------
    def hold_begin(self, p: Printer, v: Value) -> None:
        below = tuple(k for k in p.tree.loops_of(v.axes) if p.loops[k].kind != "grid")
        size = product(self.padded(p, a) for a in self.axes_below(p, below))
        name = p.fresh("h")
        self.make_local(p, name, v.dtype, size)
        self.locals[v] = Local((name,), f"({self.expr(size)})", 1, (v.dtype,))

    def held(self, p: Printer, v: Value) -> str:
        below = tuple(k for k in p.tree.loops_of(v.axes) if p.loops[k].kind != "grid")
        axes = self.axes_below(p, below)
        buffer, at = self.locals[v].names[0], self.place(p, axes)
        return f"(*(u_{register(v.dtype)}*)({buffer} + {at}))" if p.lanes(v) else f"{buffer}[{at}]"

    def hold(self, p: Printer, v: Value) -> None:
        name = p.name(v)
        p.line(f"{self.held(p, v)} = {name};")

    # -- the function ----------------------------------------------------------------------------
    def finish(self, p: Printer, name: str) -> str:
        """The function: parameters, then the grid's points."""
        lines = p.scopes[0].lines
        grid = any(loop.kind == "grid" for loop in p.loops)
        head = f"static void {name}(int64_t lo, int64_t hi, void* const* P, const int64_t* S, int64_t* err)"
        counted = len(p.kernel.params) + len(p.symbols)
        opening = "for (int64_t g = lo; g < hi; ++g) {" if grid else "if (lo < hi) {"
        body = [f"  {text}" for text in lines[:counted]]
        body += [f"  {opening}", *(f"    {text}" for text in lines[counted:]), "  }"]
        if p.tree.schedule.past:
            body.append("  mf_fence();")
        return "\n".join([head, "{", *body, "}"])


def kernel_source(kernel: Kernel, schedule: Schedule, name: str) -> tuple[str, tuple[str, ...]]:
    """A kernel as a C function, and the messages of its checks by code. Raises CodegenError."""
    printer = Printer(kernel, schedule, CDialect())
    return printer.write(name), tuple(printer.messages.values())
