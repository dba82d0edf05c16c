"""The host side of a program: readable Python that runs a plan's steps, written to be read in a dump.

The text defines `call(args)`. It takes its arguments boxed and clears the list, so that saved
activations die as soon as their last reader has run. What the text mentions is in the namespace
that `runtime.program` gives it: `run0`… (C functions), `ext0`… (ATen operators), `const0`…
(objects that have no literal), `enter`, `view`, `empty`, `new`, `adopt`, `fail`, `threads`, `interpret`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from minifuse import compat
from minifuse.ir.index import ZERO, Axis, Expr, Sym
from minifuse.ir.plan import Again, Buffer, Extern, Free, Join, Launch, Opaque, Plan, TensorRef
from minifuse.passes.memory import POOLED_BYTES, exchanged, needs, out_overload, unknown_at_start

aten = torch.ops.aten
DIRECT: dict[Any, str] = {aten.mm.out: "torch.mm", aten.addmm.out: "torch.addmm", aten.bmm.out: "torch.bmm",
          aten.baddbmm.out: "torch.baddbmm"}  # fmt: skip
"""torch's own functions of operators: called in two thirds of the time."""


@dataclass
class HostProgram:
    """The text, the objects that it names, and the views of arena buffers that it takes from a frame."""

    source: str
    objects: dict[str, Any]
    views: tuple[TensorRef, ...]
    key_symbols: tuple[str, ...]


@dataclass
class _Writer:
    plan: Plan
    binding: tuple[tuple[str, ...], ...]
    unit_symbols: tuple[str, ...]
    run_of: dict[int, int]
    threads: tuple[int, ...] = ()
    behind: int = 0
    limited: bool = False
    lines: list[str] = field(default_factory=list)
    objects: dict[str, Any] = field(default_factory=dict)
    views: dict[TensorRef, int] = field(default_factory=dict)
    makers: dict[str, str] = field(default_factory=dict)
    known: set[str] = field(default_factory=set)

    # -- expressions -----------------------------------------------------------------------------
    def size(self, e: Expr) -> str:
        def leaf(a: Sym | Axis) -> str:
            return f"sym_{a.name}"

        return e.render(leaf)

    def sizes(self, sizes: tuple[Expr, ...]) -> str:
        return "(" + "".join(self.size(s) + ", " for s in sizes).rstrip(" ") + ")"

    def var(self, buffer: str) -> str:
        return "b_" + re.sub(r"\W", "_", buffer)

    def ref(self, r: TensorRef) -> str:
        buffer = self.plan.buffers[r.buffer]
        if self.home(r.buffer).storage == "arena":
            at = self.views.setdefault(r, len(self.views))
            return f"V[{at}]"
        if buffer.inside is not None:
            whole, begin = buffer.inside
            return self.view(TensorRef(whole, r.shape, r.stride, begin + r.offset))
        name = self.var(r.buffer)
        if r.shape == buffer.shape and r.stride == buffer.stride and r.offset.is_const and r.offset.value == 0:
            return name
        return self.view(r)

    def home(self, name: str) -> Buffer:
        """The buffer whose memory holds this one."""
        return self.plan.buffers[self.plan.memory(name)]

    def view(self, r: TensorRef) -> str:
        return f"view({self.var(r.buffer)}, {self.sizes(r.shape)}, {self.sizes(r.stride)}, {self.size(r.offset)})"

    def constant(self, value: Any, prefix: str = "const") -> str:
        for name, known in self.objects.items():
            if known is value and name.startswith(prefix):
                return name
        name = f"{prefix}{sum(n.startswith(prefix) for n in self.objects)}"
        self.objects[name] = value
        return name

    def tree(self, x: Any) -> str:
        if isinstance(x, TensorRef):
            return self.ref(x)
        if isinstance(x, Expr):
            return self.size(x)
        if isinstance(x, Opaque):
            name = self.var(x.name)
            return name if x.item is None else f"{name}[{x.item}]"
        if x is None or isinstance(x, (bool, int)):
            return repr(x)
        if isinstance(x, float) and math.isfinite(x):
            return repr(x)
        if isinstance(x, torch.dtype):
            return str(x)
        if isinstance(x, list):
            return "[" + ", ".join(self.tree(i) for i in x) + "]"
        if type(x) is tuple:
            return "(" + "".join(self.tree(i) + ", " for i in x) + ")"
        if isinstance(x, dict):
            return "{" + ", ".join(f"{self.constant(k)}: {self.tree(v)}" for k, v in x.items()) + "}"
        if isinstance(x, slice):
            return f"slice({self.tree(x.start)}, {self.tree(x.stop)}, {self.tree(x.step)})"
        return self.constant(x)

    # -- the text --------------------------------------------------------------------------------
    def write(self) -> HostProgram:
        plan = self.plan
        late, used = self.late, self.used_symbols
        names = [self.var(n) for n in plan.inputs]
        out = self.lines
        if names:
            out.append(f"({', '.join(names)},) = args")
        out.append("args.clear()")
        wants = needs(plan, self.behind)
        if wants.beside or (self.limited and wants.peak >= POOLED_BYTES):
            out.append(f"expect({wants.peak}, {wants.given}, {self.limited})")
        for name, symbol in plan.symbols.items():
            if name in used and name not in late:
                out.append(f"sym_{name} = {self.source(symbol.source, name)}")
        key = tuple(sorted(n for n in used if n not in late))
        mark = len(out)
        self.steps(wants.beside)
        body = out[mark:]
        del out[mark:]
        if len(plan.steps) in wants.beside:
            body.append(f"beside({wants.beside[len(plan.steps)]})")
        body.append(f"return ({', '.join(self.outputs())}{',' if len(plan.outputs) == 1 else ''})")
        if any("V[" in line for line in body):
            body.insert(0, "V = frame.views")
        if any("frame." in line for line in body):
            enter = f"frame = enter(({''.join(f'sym_{n}, ' for n in key)}))"
            out += [enter, "try:", *(f"    {line}" for line in body), "finally:", "    leave(frame)"]
        else:
            out += body
        text = "def call(args):\n" + "\n".join(f"    {line}" for line in out) + "\n"
        return HostProgram(text, self.objects, tuple(self.views), key)

    def source(self, source: str, name: str) -> str:
        if source in self.plan.inputs:
            return self.var(source)
        found = re.fullmatch(r"(\w+)\.(size|stride)\((\d+)\)", source)
        if found:
            return f"{self.var(found[1])}.{found[2]}({found[3]})"
        if not source:
            raise ValueError(f"nothing in the inputs of {self.plan.name} gives the size {name}")
        return re.sub(r"\b([A-Za-z_]\w*)\b", lambda m: f"sym_{m[1]}" if m[1] in self.plan.symbols else m[1], source)

    @cached_property
    def late(self) -> set[str]:
        """The sizes that are known only when some step has run."""
        return unknown_at_start(self.plan)

    @cached_property
    def used_symbols(self) -> set[str]:
        outputs = self.plan.outputs
        exprs = [o for o in outputs if isinstance(o, Expr)]
        for r in (r for r in outputs if isinstance(r, TensorRef)):
            exprs += [*r.shape, *r.stride, r.offset]
        for b in self.plan.buffers.values():
            exprs += [*b.shape, *b.stride, *(() if b.inside is None else b.inside[1:])]
        found = {s.name for e in exprs for s in e.symbols()} | {s.name for k in self.plan.launches for s in k.symbols}
        mentioned = {name for step in self.plan.externs for name in step.mentions}
        found |= (mentioned | set(self.unit_symbols)) & self.plan.symbols.keys()
        grew = True
        while grew:
            more = {
                n
                for name in found
                for n in re.findall(r"\w+", self.plan.symbols[name].source if name in self.plan.symbols else "")
                if n in self.plan.symbols
            }
            grew = not more <= found
            found |= more
        return found

    def steps(self, beside: Mapping[int, int]) -> None:
        plan, out = self.plan, self.lines
        done_runs: set[int] = set()
        made = set(plan.inputs) | {n for n, b in plan.buffers.items() if b.storage == "constant"}
        for i, step in enumerate(plan.steps):
            if i in beside:
                out.append(f"beside({beside[i]})")
            if isinstance(step, Free):
                dead = [self.var(n) for n in step.buffers if plan.buffers[n].storage != "arena" and n in made]
                if dead:
                    # Names die behind the run that holds their last reader: a run reads addresses, not names.
                    out.append(f"del {', '.join(dead)}")
                continue
            if isinstance(step, Join):
                continue
            if isinstance(step, Extern):
                self.extern(step, made)
                continue
            self.make(step, made)
            run = self.run_of.get(i)
            if run is None:
                self.interpret(step)
                continue
            if run in done_runs:
                continue
            done_runs.add(run)
            # everything that the run writes for the caller is made before it starts
            for _, other in self.members(run):
                assert isinstance(other, Launch)
                self.make(other, made)
            out.append(f"P = frame.pointers[{run}]")
            for k, name in enumerate(self.binding[run]):
                if self.home(name).storage not in ("arena", "constant"):
                    out.append(f"P[{k}] = {self.address(name)}")
            launches = ", ".join(plan.steps[j].name for j, _ in self.members(run))  # type: ignore[union-attr]
            for k, symbol in enumerate(self.unit_symbols):
                if symbol in self.late & self.known:
                    out.append(f"frame.sizes[{k}] = sym_{symbol}")
            threads = "1" if self.threads and self.threads[run] == 1 else "threads()"
            out.append(f"error = run{run}(P, frame.sizes, {threads})  # {launches}")
            out.append(f"if error: fail({run}, error)")

    def interpret(self, step: Launch) -> None:
        """A line for each run of a kernel that there is no code for."""
        kernel, symbols = self.constant(step.kernel), sorted(step.kernel.symbols(), key=lambda s: s.name)
        for run in step.members:
            refs = (TensorRef(run.buffers[p.name], *run.layout(p), ZERO) for p in step.kernel.params)
            sizes = (f"{s.name!r}: {self.size(run.sizes.get(s, s.expr))}" for s in symbols)
            at = ", ".join(map(self.ref, refs))
            self.lines.append(f"interpret({kernel}, [{at}], {{{', '.join(sizes)}}})  # {step.name}")

    def members(self, run: int) -> list[tuple[int, Any]]:
        return [(j, self.plan.steps[j]) for j, r in self.run_of.items() if r == run]

    def whole(self, name: str) -> str:
        b = self.plan.buffers[name]
        return self.ref(TensorRef(name, b.shape, b.stride, ZERO))

    def address(self, name: str) -> str:
        b = self.plan.buffers[name]
        if b.inside is None or b.inside[1] is ZERO:
            return f"{self.var(self.plan.memory(name))}.data_ptr()"
        return f"{self.var(b.inside[0])}.data_ptr() + {self.size(b.inside[1] * b.dtype.itemsize)}"

    def make(self, step: Launch | Extern, made: set[str]) -> None:
        """Allocate what a step writes first, whole or in part."""
        for name in map(self.plan.memory, step.writes):
            if self.plan.buffers[name].storage == "pooled" and name not in made:
                self.lines.append(self.allocate(self.plan.buffers[name]))
                made.add(name)

    def allocate(self, b: Buffer) -> str:
        if b.reuses is not None:
            return f"{self.var(b.name)} = {self.ref(TensorRef(b.reuses, b.shape, b.stride, ZERO))}"
        layout = f"{self.sizes(b.shape)}, {self.sizes(b.stride)}, {b.dtype}"
        if b.device.type != "cpu":
            return f"{self.var(b.name)} = new({layout}, {self.constant(b.device)})"
        nbytes = b.extent * b.dtype.itemsize
        if nbytes.is_const:
            maker = "empty" if nbytes.value < POOLED_BYTES else "new"
        else:  # asked once a size
            size = self.size(nbytes)
            maker = self.makers.setdefault(size, f"make{len(self.makers)}")
            line = f"{maker} = empty if {size} < {POOLED_BYTES} else new"
            if line not in self.lines:
                self.lines.append(line)
        return f"{self.var(b.name)} = {maker}({layout})"

    def extern(self, step: Extern, made: set[str]) -> None:
        plan, out = self.plan, self.lines
        target = step.target
        args = [self.tree(a) for a in step.args] + [f"{n}={self.tree(v)}" for n, v in step.kwargs]
        comment = f"  # {step.origin}: {step.reason}"
        if step.out:
            (name,) = step.writes
            target = out_overload(target)
            self.make(step, made)
            called = DIRECT.get(target) or self.constant(target, "ext")
            out.append(f"{called}({', '.join([*args, f'out={self.whole(name)}'])}){comment}")
            return
        call = f"{self.constant(target, 'ext')}({', '.join(args)})"
        if not step.writes and not step.sizes:
            out.append(f"{self.var(step.origin)} = {call}{comment}")
            return
        copies = returns_alias(step.target) and not self.plan.keeps_view(step)
        if step.single:
            if step.sizes:
                out.append(f"sym_{step.sizes[0][1]} = {call}{comment}")
                self.derive({step.sizes[0][1]})
                return
            (name,) = step.writes
            made_by = self.adopt(call, plan.buffers[name], copies, step)
            if exchanged(step.target, plan.buffers[name]):
                out.append(f"lend({self.size(plan.buffers[name].nbytes)})")
                made_by = f"own({made_by})"
            out.append(f"{self.var(name)} = {made_by}{comment}")
            made.add(name)
        else:
            whole = step.origin in self.opaques  # held by what takes it
            large = [] if whole else [r for r in step.writes if exchanged(step.target, plan.buffers[r])]
            out.extend(f"lend({self.size(plan.buffers[r].nbytes)})" for r in large)
            out.append(f"{self.var(step.origin)} = {call}{comment}")
            for i, result in enumerate(step.results):
                if result is not None and result in plan.buffers:
                    item = self.adopt(f"{self.var(step.origin)}[{i}]", plan.buffers[result], copies, step)
                    out.append(f"{self.var(result)} = {f'own({item})' if result in large else item}")
                    made.add(result)
            for i, symbol in step.sizes:
                out.append(f"sym_{symbol} = {self.var(step.origin)}[{i}]")
            if not whole:
                out.append(f"del {self.var(step.origin)}")
        for i, d, symbol in step.dims:
            out.append(f"sym_{symbol} = {self.var(step.results[i] or '')}.size({d})")
        self.derive({symbol for _, symbol in step.sizes} | {symbol for _, _, symbol in step.dims})
        for result in step.results:
            if result is not None and result in plan.buffers and self.is_late(plan.buffers[result], step):
                name = self.var(result)
                out.append(f"{name} = {self.adopt(name, plan.buffers[result], copies, step, known=True)}")

    @cached_property
    def opaques(self) -> set[str]:
        """The results that are taken whole by an operator or by the caller."""
        returned = {o.name for o in self.plan.outputs if isinstance(o, Opaque)}
        return returned.union(*(step.mentions for step in self.plan.externs))

    def derive(self, known: set[str]) -> None:
        """Sizes that are computed from ones that a step has just defined."""
        self.known |= known
        while more := [
            n
            for n in self.used_symbols & self.late - self.known
            if self.plan.symbols[n].source and self.plan.symbols[n].mentions(self.late) <= self.known
        ]:
            for n in sorted(more):
                self.lines.append(f"sym_{n} = {self.source(self.plan.symbols[n].source, n)}")
            self.known.update(more)

    def is_late(self, b: Buffer, step: Extern) -> bool:
        """Whether the sizes of a step's result are known only when it has run."""
        late = {name for _, _, name in step.dims}
        return any(s.name in late for s in b.extent.symbols())

    def adopt(self, call: str, b: Buffer, copies: bool, step: Extern, known: bool = False) -> str:
        how = ", True" if copies else ""
        if not known and self.is_late(b, step):
            return call
        return f"adopt({call}, {self.sizes(b.shape)}, {self.sizes(b.stride)}, {b.dtype}{how})"

    def outputs(self) -> list[str]:
        """What is returned: a tensor of its own for each output, but for those that are an earlier one again."""
        found: list[str] = []
        named = {o.output for o in self.plan.outputs if isinstance(o, Again)}
        for k, o in enumerate(self.plan.outputs):
            text = f"out{o.output}" if isinstance(o, Again) else self.tree(o)
            if isinstance(o, TensorRef) and text in found:
                text = self.view(o)
            found.append(f"(out{k} := {text})" if k in named else text)
        return found


def returns_alias(target: Any) -> bool:
    """Whether an operator's result may share memory with an argument, by its schema."""
    if not isinstance(target, compat.OpOverload):
        return False
    return any(r.alias_info is not None for r in target._schema.returns)


def write_program(
    plan: Plan,
    binding: tuple[tuple[str, ...], ...],
    unit_symbols: tuple[str, ...],
    run_of: dict[int, int],
    threads: tuple[int, ...] = (),
    behind: int = 0,
    limited: bool = False,
) -> HostProgram:
    """The host program of a placed plan. `run_of` maps a launch's step to the C run that holds it; launches without one
    are interpreted. `threads` is how many each run has work for, where that is known, `behind` the bytes that are
    allocated when it has returned; `limited` says that a step is to stay within a budget of memory."""
    return _Writer(plan, binding, unit_symbols, run_of, threads, behind, limited).write()
