"""Lowering: an ATen graph becomes a plan of one small kernel an operator, externs, and views.

Every FX node is one of: a row of `pointwise.ROWS`, a structural lowerer (`structural.py`), or an
extern with a reason. Nothing is fused here; views cost nothing.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from minifuse import compat
from minifuse.ir import dtypes
from minifuse.ir.index import ONE, ZERO, Axis, Expr, Sym, as_expr
from minifuse.ir.kernel import Check, Kernel, Param, Store
from minifuse.ir.ops import DtypeError
from minifuse.ir.plan import Again, Buffer, Extern, Launch, Opaque, Output, Plan, Step, Symbol, TensorRef
from minifuse.ir.shape import contiguous_strides, is_injective
from minifuse.ir.value import Cast, Const, IndexOf, Load, Value, topological
from minifuse.options import RECORDED_MODES
from minifuse.passes.context import CompileContext

from . import nodes
from .externs import expected, fallback
from .hosted import by_value
from .layout import padded_rows
from .memory import arguments
from .nodes import finds_size, is_alias, is_dense, is_effect, memory_of, mutated_arguments, names_symbol, source_line
from .pointwise import ROWS, Unsupported, check_dtype, check_fits, division_checks, to_compute, truth
from .products import by_onednn
from .structural import STRUCTURAL
from .unread import without_unread
from .view import View

aten = torch.ops.aten
Tree = Any
# How axes and symbols are called; an operator may be too (the Bessel function `i0`).
_TAKEN = re.compile(r"[idsuz]\d\w*")
Number = (bool, int, float)
# Arguments that say how a result lies in memory: its traced value has it already.
_ELSEWHERE = {"dtype", "layout", "device", "pin_memory", "non_blocking", "memory_format", "copy"}


class Lowering:
    """The state of lowering one graph; thrown away when the plan is made."""

    def __init__(self, graph: fx.Graph, ctx: CompileContext) -> None:
        self.graph = graph
        self.ctx = ctx
        self.env: dict[fx.Node, Any] = {}
        self.buffers: dict[str, Buffer] = {}
        self.steps: list[Step] = []
        self.inputs: list[str] = []
        self.symbols: dict[str, Symbol] = {}
        self.mutated: set[str] = set()
        self.origin: dict[str, str] = {}
        self.numbers: dict[Any, View] = {}
        self.literals: dict[str, bool | int | float] = {}
        for n in graph.nodes:
            if _TAKEN.fullmatch(n.name):
                n.name = f"{n.name}_"
        self.node_names = {n.name for n in graph.nodes}
        self.rows = padded_rows(graph, lambda target: target in ROWS or target in STRUCTURAL)
        self.node: fx.Node = next(iter(graph.nodes))
        returned = Counter(memory_of(n) for n in graph.output_node().all_input_nodes)
        self.shared = {memory for memory, times in returned.items() if memory is not None and times > 1}
        self.written_inputs = {m.name for n in graph.nodes for m in mutated_arguments(n) if m.op == "placeholder"}

    # -- sizes -----------------------------------------------------------------------------------
    def size(self, s: Any) -> Expr:
        """A size, stride or scalar of the graph as an expression of symbols."""
        if isinstance(s, fx.Node):
            s = self.env[s]
        if isinstance(s, Expr):
            return s
        if isinstance(s, int):
            return as_expr(s)
        return compat.expr_of_symint(s, self.symbols)

    def sizes(self, many: Sequence[Any]) -> tuple[Expr, ...]:
        return tuple(self.size(s) for s in many)

    def hint(self, e: Expr) -> int:
        """A size with every symbol at its hint."""
        return e.value if e.is_const else e.evaluate({name: s.hint for name, s in self.symbols.items()})

    def hints(self, *many: Sequence[Expr]) -> list[list[int]]:
        """Shapes and strides with every symbol at its hint, as torch has computed them."""
        return [[self.hint(e) for e in each] for each in many]

    def strides(self, many: Sequence[Any]) -> tuple[Expr, ...]:
        return tuple(compat.expr_of_stride(s, self.symbols) for s in many)

    def shape(self, node: fx.Node) -> tuple[Expr, ...]:
        return self.sizes(node.meta["val"].shape)

    # -- buffers ---------------------------------------------------------------------------------
    def buffer(
        self, name: str, val: torch.Tensor, storage: Any = "arena", stride: tuple[Expr, ...] | None = None
    ) -> Buffer:
        shape = self.sizes(val.shape)
        if stride is None:
            stride = self.strides(val.stride())
        made = Buffer(name, val.dtype, shape, stride, val.device, storage)
        self.buffers[name] = made
        return made

    def dense_stride(self, val: torch.Tensor) -> tuple[Expr, ...]:
        """The strides of a fresh result: those that torch gives it where they are dense, and rows are not padded."""
        shape, stride = self.sizes(val.shape), self.strides(val.stride())
        row = self.rows.get(self.node.name) if val is self.node.meta["val"] else None
        if row is not None:
            return (*(s * as_expr(row) for s in contiguous_strides((*shape[:-1], ONE))[:-1]), ONE)
        return stride if is_dense(shape, stride, self.hint) else contiguous_strides(shape)

    def result_name(self, i: int) -> str:
        """The buffer of result `i` of the current node: a name that no other node has."""
        return self.fresh_name(f"{self.node.name}_r{i}")

    def fresh_name(self, name: str) -> str:
        while name in self.buffers or name in self.node_names:
            name += "_"
        return name

    # -- kernels ---------------------------------------------------------------------------------
    def axes(self, shape: Sequence[Expr], prefix: str = "i") -> tuple[Expr, ...]:
        """Coordinates over a shape: an axis a dimension, the constant zero where it has one element."""
        return tuple(ZERO if s is ONE else Axis(f"{prefix}{d}", s).expr for d, s in enumerate(shape))

    def emit(
        self,
        value: Callable[[tuple[Expr, ...]], Value],
        val: torch.Tensor,
        name: str | None = None,
        stride: tuple[Expr, ...] | None = None,
        checks: Sequence[Check] = (),
    ) -> View:
        """A kernel that stores `value(coordinates)`, converted to the result's dtype, at every element."""
        name = name or self.node.name
        buffer = self.buffer(name, val, "arena", stride or self.dense_stride(val))
        where = self.axes(buffer.shape)
        body = Store(name, where, Cast.of(val.dtype, value(where)))
        empty = any(s is ZERO for s in buffer.shape)  # nothing is divided or looked up
        self.add_kernel((*(() if empty else (*checks, *division_checks(body.value))), body), name)
        return View.whole(buffer)

    def add_kernel(self, body: Sequence[Store | Check], name: str) -> None:
        axes: dict[Axis, None] = {}
        params: dict[str, Param] = {}
        for root in body:
            for a in sorted(root.space, key=lambda a: a.name):
                axes[a] = None
        for v in topological(v for r in body for v in r.values):
            if isinstance(v, Load):
                params[v.param] = self.buffers[v.param].as_param()
            elif v.fields and hasattr(v, "over"):
                axes[v.over] = None
        for root in body:
            if isinstance(root, Store):
                params[root.param] = self.buffers[root.param].as_param()
        origin = self.where()
        kernel = Kernel(tuple(axes), tuple(params.values()), tuple(body), (self.node.name,))
        self.origin[self.node.name] = origin
        self.steps.append(Launch(kernel, tuple(params), None, name))

    def where(self) -> str:
        """The user's line that a node comes from, as `file.py:41 code`."""
        return source_line(self.node)

    # -- arguments -------------------------------------------------------------------------------
    def view(self, arg: fx.Node) -> View:
        found = self.env[arg]
        if not isinstance(found, View):
            raise Unsupported(f"{arg.name} is not a tensor that kernels can read")
        check_dtype(found.buffer.dtype)
        return found

    def ref(self, view: View, val: Any = None) -> TensorRef:
        """The view as strides; a copy is made where it has none.

        `val` is the traced tensor: ATen chooses memory formats by the strides of dimensions of one
        element too, so these are the ones that eager has.
        """
        found = view.strided()
        if found is not None:
            if isinstance(val, torch.Tensor):
                pairs = zip(found.shape, found.stride, self.strides(val.stride()), strict=True)
                return replace(found, stride=tuple(seen if s is ONE else d for s, d, seen in pairs))
            return found
        shape = view.shape
        name = self.fresh_name(f"{view.buffer.name}_copy")
        copy = Buffer(name, view.buffer.dtype, shape, contiguous_strides(shape), view.buffer.device)
        self.buffers[name] = copy
        where = self.axes(shape)
        self.add_kernel([Store(name, where, view.read(where))], name)
        return TensorRef(name, shape, copy.stride, ZERO)

    def scalar(self, x: Any) -> Value | None:
        """A number, symbolic or not, as a value; None when it is not one."""
        if isinstance(x, fx.Node):
            x = self.env[x]
        if isinstance(x, Expr):
            return IndexOf.of(x) if not x.is_const else Const.of(x.value, torch.int64)
        if isinstance(x, bool):
            return Const.of(x, torch.bool)
        if isinstance(x, int):
            return Const.of(x, torch.int64)
        if isinstance(x, float):
            return Const.of(x, torch.float64)
        return None

    def pointwise(self, node: fx.Node) -> View:
        row = ROWS[node.target]  # type: ignore[index]
        val = node.meta["val"]
        if val.device.type == "meta" or not dtypes.supported(val.dtype):
            raise Unsupported(f"a result of {val.dtype} on {val.device.type}")
        reads: list[Callable[[tuple[Expr, ...]], Value] | Any] = []
        for position, arg in enumerate(node.args):
            reads.append(self._argument(arg, position in row.scalars, val))
        kwargs = {k: v for k, v in node.kwargs.items() if k not in _ELSEWHERE and v is not None}
        for k, v in list(kwargs.items()):
            if isinstance(v, fx.Node):
                raise Unsupported(f"{k} given as a symbolic number")
        for number in (*(a for p, a in enumerate(node.args) if p in row.scalars), *kwargs.values()):
            check_fits(number, val.dtype)
        result = val.dtype
        common = nodes.result_type(node.args) if row.promote in ("common", "where") else result
        check_dtype(common)

        def value(where: tuple[Expr, ...]) -> Value:
            args = []
            for position, read in enumerate(reads):
                x = read(where) if callable(read) else read
                if isinstance(x, Value):
                    if row.promote == "where" and position == 0 or row.promote == "fill" and position == 1:
                        x = truth(x)
                    elif row.promote == "common":
                        x = to_compute(x, common)
                    elif row.promote == "keep":
                        x = to_compute(x, x.dtype)
                    else:
                        x = self._promote(x, result, isinstance(node.args[position], fx.Node))
                args.append(x)
            return row.fn(*args, **kwargs)

        return self.emit(value, val)

    def _promote(self, x: Value, result: torch.dtype, is_tensor: bool) -> Value:
        """To the dtype of the arithmetic. A Python number keeps float32's precision beside a half."""
        compute = dtypes.row(result).compute
        if isinstance(x, Const) and not is_tensor:
            return Cast.of(compute, x)
        return to_compute(x, result)

    def _argument(self, arg: Any, keep: bool, val: torch.Tensor) -> Any:
        if isinstance(arg, fx.Node) and isinstance(self.env[arg], View):
            view = self.view(arg)
            if view.buffer.name in self.literals:
                literal = Const.of(self.literals[view.buffer.name], view.buffer.dtype)
                return lambda where: literal
            if view.buffer.device != val.device:
                if view.shape or view.buffer.device.type != "cpu":
                    raise Unsupported(f"an argument on {view.buffer.device}")
                view = by_value(self, view, val.device)
            return view.broadcast_read
        if keep and isinstance(arg, fx.Node):
            raise Unsupported("a symbolic number where a literal is needed")
        if keep or arg is None or isinstance(arg, str):
            return arg
        number = self.scalar(arg)
        if number is None:
            raise Unsupported(f"an argument {arg!r}")
        return lambda where: number

    # -- externs ---------------------------------------------------------------------------------
    def extern(self, node: fx.Node, reason: str) -> Any:
        """A call of ATen (or of whatever the target is); its results become buffers."""
        target, args = node.target, arguments(self, node)
        if (faster := by_onednn(self, node, args)) is not None:
            (target, args), reason = faster, f"{reason}, here oneDNN ({self.ctx.device.onednn:.2g}x as fast as ATen's)"
        kwargs = tuple((k, self.tree(v)) for k, v in node.kwargs.items())
        before = set(self.symbols)
        val = node.meta.get("val")
        single = not isinstance(val, (tuple, list))
        vals: list[Any] = list(val) if isinstance(val, (tuple, list)) else [val]
        results: list[str | None] = []
        sizes: list[tuple[int, str]] = []
        env: list[Any] = []
        for i, v in enumerate(vals):
            name = None
            expr = self.size(v) if isinstance(v, torch.SymInt) else None
            if isinstance(v, torch.Tensor):
                name = node.name if single else self.result_name(i)
                stride = self.dense_stride(v) if self.node.name in self.rows else None
                env.append(View.whole(self.buffer(name, v, "extern", stride)))
            elif expr is not None and isinstance(expr.atom, Sym):
                sizes.append((i, expr.atom.name))
                env.append(expr)
            else:
                env.append(Opaque(node.name, None if single else i))
            results.append(name)
        self.steps.append(
            Extern(
                target, args, kwargs, tuple(results), reason, single, effect=is_effect(node), sizes=tuple(sizes),
                dims=self.new_sizes(results, before), origin=node.name,
            )
        )  # fmt: skip
        self.origin[node.name] = self.where()
        for written in mutated_arguments(node):
            self.mutated.add(self.env[written].buffer.name)
        return env[0] if single else tuple(env)

    def new_sizes(self, results: list[str | None], before: set[str]) -> tuple[tuple[int, int, str], ...]:
        """Sizes that are known only by looking at a result: (result, dimension, symbol)."""
        found: dict[str, tuple[int, int, str]] = {}
        for i, name in enumerate(results):
            for d, size in enumerate(self.buffers[name].shape if name is not None else ()):
                atom = size.atom
                if isinstance(atom, Sym) and atom.name not in before and not self.symbols[atom.name].source:
                    found.setdefault(atom.name, (i, d, atom.name))
        return tuple(found.values())

    def sources(self) -> None:
        """Where a call finds each size: an input of its own, or a dimension of a tensor."""
        for name, symbol in self.symbols.items():
            if symbol.source:
                continue
            for buffer in self.buffers.values():
                if buffer.storage != "input":
                    continue
                at = [f"{buffer.name}.size({d})" for d, s in enumerate(buffer.shape) if names_symbol(s, name)]
                at += [f"{buffer.name}.stride({d})" for d, s in enumerate(buffer.stride) if names_symbol(s, name)]
                if at:
                    self.symbols[name] = Symbol(name, symbol.hint, at[0])
                    break

    def tree(self, arg: Any) -> Tree:
        if isinstance(arg, fx.Node):
            found = self.env[arg]
            if isinstance(found, (tuple, list)):
                return tuple(self.ref(x) if isinstance(x, View) else x for x in found)
            return self.ref(found, arg.meta.get("val")) if isinstance(found, View) else found
        if isinstance(arg, (list, tuple)):
            made = [self.tree(a) for a in arg]
            return tuple(made) if isinstance(arg, tuple) else made
        if isinstance(arg, dict):
            return {k: self.tree(v) for k, v in arg.items()}
        if isinstance(arg, slice):
            return slice(self.tree(arg.start), self.tree(arg.stop), self.tree(arg.step))
        if isinstance(arg, torch.SymInt):
            return self.size(arg)
        return arg

    # -- the walk --------------------------------------------------------------------------------
    def run(self, name: str, output_strides: dict[int, tuple[Any, ...]]) -> Plan:
        outputs: tuple[Output, ...] = ()
        for node in self.graph.nodes:
            self.node = node
            if node.op == "placeholder":
                self.env[node] = self.placeholder(node)
            elif node.op == "get_attr":
                self.env[node] = self.attribute(node)
            elif node.op == "output":
                outputs = self.outputs(node, output_strides)
            else:
                self.env[node] = self.call(node)
        self.sources()
        # what is recorded reads its inputs where they are at every replay, so it writes over none of them
        own = self.ctx.stage == "backward" and self.ctx.options.mode not in RECORDED_MODES
        given = self.graph.find_nodes(op="placeholder") if own else []
        donated = frozenset(n.name for n in given if not compat.is_primal(n))
        targets = {n.name: str(n.target) for n in self.graph.nodes if n.name in self.origin}
        return Plan(
            name, tuple(self.inputs), self.buffers, tuple(self.steps), outputs, self.symbols, frozenset(self.mutated),
            donated, self.origin, targets,
        )  # fmt: skip

    def call(self, node: fx.Node) -> Any:
        target = node.target
        if target is operator.getitem:
            made, item = node.args
            source = self.env[made]  # type: ignore[index]
            if isinstance(source, (tuple, list)) and isinstance(item, int):
                return source[item]
            return self.extern(node, "an item of an opaque result")
        number = self.symbolic(node)
        if number is not None:
            return number
        if finds_size(node, self.symbols):
            return self.extern(node, "a result whose size is known when it has run")
        try:
            mark = len(self.steps), len(self.buffers)
            if target in STRUCTURAL:
                return self.apart(node, STRUCTURAL[target](self, node, *node.args, **node.kwargs))
            if target in ROWS:
                return self.pointwise(node)
            reason = expected(target) or fallback(target)
        except (Unsupported, DtypeError) as why:
            del self.steps[mark[0] :]
            while len(self.buffers) > mark[1]:  # a name is given once, so what is new is last
                self.buffers.popitem()
            self.numbers = {k: v for k, v in self.numbers.items() if v.buffer.name in self.buffers}
            reason = str(why)
        return self.extern(node, reason)

    def apart(self, node: fx.Node, result: Any) -> Any:
        """A result that ATen copies is copied here too where it reads an input that the graph writes, or where several
        outputs are to share its memory."""
        if not isinstance(result, View) or is_alias(node) or mutated_arguments(node):
            return result
        last = self.steps[-1] if self.steps else None
        if isinstance(last, Launch) and result.buffer.name in last.kernel.joins:
            return result  # it was written in place
        written = result.buffer.name in self.written_inputs
        if not written and (node.name in self.buffers or memory_of(node) not in self.shared):
            return result
        return self.emit(result.read, node.meta["val"])

    def symbolic(self, node: fx.Node) -> Expr | None:
        """Arithmetic on sizes is done when a call begins, not by a step."""
        val = node.meta.get("val")
        if isinstance(val, int) and not isinstance(val, bool):
            return as_expr(val)
        if isinstance(val, torch.SymInt):
            if compat.is_unbacked(val) and not compat.symbol_names(val) <= set(self.symbols):
                return None  # this step is what makes the size known
            return compat.expr_of_symint(val, self.symbols)
        return None

    def placeholder(self, node: fx.Node) -> Any:
        val = node.meta.get("val")
        if isinstance(val, torch.Tensor) and not compat.is_subclass_like(val):
            self.inputs.append(node.name)
            return View.whole(self.buffer(node.name, val, "input"))
        self.inputs.append(node.name)
        if isinstance(val, torch.SymInt):
            return compat.expr_of_symint(val, self.symbols, bind=node.name)
        if isinstance(val, int) and not isinstance(val, bool):
            return as_expr(val)
        return Opaque(node.name, None)

    def attribute(self, node: fx.Node) -> Any:
        owner = self.graph.owning_module
        value: Any = owner
        for part in str(node.target).split("."):
            value = getattr(value, part)
        self.ctx.stages.setdefault("constants", {})[node.name] = value
        if isinstance(value, torch.Tensor):
            return View.whole(self.buffer(node.name, value, "constant"))
        return Opaque(node.name, None)

    def outputs(self, node: fx.Node, strides: dict[int, tuple[Any, ...]]) -> tuple[Output, ...]:
        outs, first = list[Output](), dict[fx.Node, int]()
        memory = {n.name: memory_of(n) for n in self.graph.find_nodes(op="placeholder")}
        for i, arg in enumerate(node.args[0]):  # type: ignore[arg-type]
            value = self.env[arg] if isinstance(arg, fx.Node) else arg
            if isinstance(value, View) and first.setdefault(arg, i) != i:
                outs.append(Again(first[arg]))
            elif isinstance(value, View):
                self.node = arg
                wanted = self.strides(strides.get(i, arg.meta["val"].stride()))
                # what eager computes anew (a row of one, turned round) is no view of an input or of another output
                apart = memory.setdefault(value.buffer.name, memory_of(arg)) != memory_of(arg)
                outs.append(self.output_ref(value, wanted, apart))
            elif isinstance(value, (Expr, *Number)) or value is None or isinstance(value, Opaque):
                outs.append(value)
            else:
                raise TypeError(f"output {i} of {self.ctx.name}: expected a tensor or a number, found {value!r}")
        return tuple(outs)

    def output_ref(self, view: View, stride: tuple[Expr, ...], apart: bool) -> TensorRef:
        """The view with the strides that eager gives it, copied where it has others, or is to lie `apart`."""
        found = view.strided()
        if found is not None and not apart:
            same = all(s is ONE or a is b for s, a, b in zip(view.shape, found.stride, stride, strict=True))
            if same or any(s is ZERO for s in view.shape):
                return TensorRef(found.buffer, found.shape, stride, found.offset)
        name = self.fresh_name(f"{self.node.name}_out")
        # what eager expands has one element along the expanded dimension
        shape = tuple(ONE if d is ZERO else s for s, d in zip(view.shape, stride, strict=True))
        if not dtypes.supported(view.buffer.dtype) or not is_injective(*self.hints(shape, stride)):
            return found or self.ref(view)
        self.buffers[name] = Buffer(name, view.buffer.dtype, shape, stride, view.buffer.device)
        where = self.axes(shape)
        self.add_kernel([Store(name, where, view.read(where))], name)
        return TensorRef(name, view.shape, stride, ZERO)


def lower(graph: fx.Graph, ctx: CompileContext, output_strides: dict[int, tuple[Any, ...]] | None = None) -> Plan:
    """The plan of a functional ATen graph, one kernel an operator. `output_strides` (by position)
    are eager's where they differ from the graph's own."""
    return without_unread(Lowering(graph, ctx).run(ctx.name, output_strides or {}))
