"""Plans: the steps of a program over buffers, and the one accounting of the bytes that they move."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import torch

from . import dtypes
from .index import ZERO, Expr, Sym
from .kernel import Kernel, Param, Schedule
from .lazy import lazy
from .shape import contiguous_strides, linearize, product
from .value import index_axes

Storage = Literal["input", "constant", "pooled", "arena", "extern", "inside"]


@dataclass(frozen=True)
class Buffer:
    """Memory that steps read and write. Shape in elements, strides in elements.

    `storage`: "input" is the caller's, "constant" the graph's own, "pooled" is a block of its own (what the caller
    gets, and what is large), "arena" shares the call's arena, "extern" is what an ATen operator allocated, "inside" is
    a region of another buffer. `reuses` names a buffer of as many elements whose memory this one takes over in the step
    that writes it, the last to read that. `inside` names the buffer whose memory holds this one, itself inside of none,
    and the element of it where this one begins; a `Join` says when that buffer is whole.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[Expr, ...]
    stride: tuple[Expr, ...]
    device: torch.device
    storage: Storage = "arena"
    reuses: str | None = None
    inside: tuple[str, Expr] | None = None

    @property
    def numel(self) -> Expr:
        return product(self.shape)

    @property
    def nbytes(self) -> Expr:
        """Bytes of the distinct elements: an expanded dimension (stride 0) counts once."""
        return _nbytes(self.shape, self.stride, self.dtype)

    @property
    def extent(self) -> Expr:
        """Elements from the first to one past the last: what an allocation must hold."""
        return linearize([s - 1 for s in self.shape], self.stride) + 1

    @property
    def is_dense(self) -> bool:
        """Whether the elements fill the memory from the first to the last, in whatever order."""
        return self.extent is self.numel or self.numel is ZERO

    @property
    def is_contiguous(self) -> bool:
        return self.stride == contiguous_strides(self.shape)

    def as_param(self, name: str | None = None) -> Param:
        return Param(name or self.name, self.dtype, self.shape, self.stride)


@lru_cache(4096)
def _nbytes(shape: tuple[Expr, ...], stride: tuple[Expr, ...], dtype: torch.dtype) -> Expr:
    return product(s for s, d in zip(shape, stride, strict=True) if d is not ZERO) * dtypes.itemsize(dtype)


@dataclass(frozen=True)
class TensorRef:
    """A strided view of a buffer, as an extern argument or an output sees it."""

    buffer: str
    shape: tuple[Expr, ...]
    stride: tuple[Expr, ...]
    offset: Expr


@dataclass(frozen=True)
class Opaque:
    """What kernels never see: an input that is no tensor and no size (a generator), or a result
    (`item` of several) of the extern whose origin is `name`."""

    name: str
    item: int | None = None


Sizes = tuple[tuple[Sym, Expr], ...]


@dataclass(frozen=True)
class Binding:
    """What a kernel's parameters stand for in one of its runs, and what its own sizes are there."""

    buffers: Mapping[str, str]
    sizes: Mapping[Any, Expr]

    def layout(self, p: Param) -> tuple[tuple[Expr, ...], tuple[Expr, ...]]:
        """The shape and the strides of a parameter in this run."""
        return tuple(s.substitute(self.sizes) for s in p.shape), tuple(s.substitute(self.sizes) for s in p.stride)


@dataclass(frozen=True)
class Region:
    """Launches that run tile by tile, one behind the other: each all points of a tile before the first starts the next.

    A tile is one of `tiles` equal parts of each launch's grid. In each a launch reads and writes but that part of the
    buffers `shared`, which one of them leaves for another. `number` tells a region from its neighbours.
    """

    number: int
    tiles: int
    shared: frozenset[str]


@dataclass(frozen=True)
class Launch:
    """A kernel with the buffers that its parameters stand for, in order of `kernel.params`.

    A batch runs its kernel for many tensors, none of which needs what the kernel makes of another: `binding` then holds
    the buffers of one after the other. `sizes` has a row for each, with what the sizes that are the kernel's own, and
    not the plan's, are there. A parameter of such a size is the memory of its buffer, from the first element to the
    last.
    """

    kernel: Kernel
    binding: tuple[str, ...]
    schedule: Schedule | None = None
    name: str = "kernel"
    sizes: tuple[Sizes, ...] = ((),)
    region: Region | None = None

    @lazy
    def members(self) -> tuple[Binding, ...]:
        """The runs of the kernel: one, or one for each tensor of a batch."""
        names, width = [p.name for p in self.kernel.params], len(self.kernel.params)
        rows = (self.binding[k * width : (k + 1) * width] for k in range(len(self.sizes)))
        return tuple(Binding(dict(zip(names, r, strict=True)), dict(s)) for r, s in zip(rows, self.sizes, strict=True))

    def buffers(self, params: Iterable[str]) -> tuple[str, ...]:
        at = {p.name: k for k, p in enumerate(self.kernel.params)}
        places = [at[p] for p in params]
        return tuple([self.binding[row * len(at) + k] for row in range(len(self.sizes)) for k in places])

    @lazy
    def reads(self) -> tuple[str, ...]:
        return self.buffers(self.kernel.reads)

    @lazy
    def writes(self) -> tuple[str, ...]:
        return self.buffers(self.kernel.writes)

    @property
    def batched(self) -> bool:
        return len(self.sizes) > 1 or bool(self.sizes[0])

    @property
    def own(self) -> frozenset[Sym]:
        """The sizes that differ between the tensors of a batch."""
        return frozenset(s for s, _ in self.sizes[0])

    @lazy
    def symbols(self) -> frozenset[Sym]:
        """The sizes of the plan that a launch depends on."""
        given = (e.symbols() for row in self.sizes for _, e in row)
        return (self.kernel.symbols() - self.own).union(*given)


@dataclass(frozen=True)
class Extern:
    """A call of something that minifuse does not generate, with the reason why.

    `args` and `kwargs` hold `TensorRef`, `Expr` (sizes), `Opaque`, and plain values, nested as the operator
    takes them. `results` names the buffers of its tensor results, by position; None is dropped.
    A result given in `sizes` is a number that defines that symbol.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    results: tuple[str | None, ...]
    reason: str
    single: bool = True
    out: bool = False
    effect: bool = False
    sizes: tuple[tuple[int, str], ...] = ()
    dims: tuple[tuple[int, int, str], ...] = ()
    origin: str = ""

    @property
    def refs(self) -> Iterator[TensorRef]:
        return _refs((self.args, tuple(v for _, v in self.kwargs)))

    @lazy
    def reads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(r.buffer for r in self.refs))

    @property
    def writes(self) -> tuple[str, ...]:
        return tuple(r for r in self.results if r is not None)

    @property
    def defines(self) -> tuple[str, ...]:
        """The names of what is no tensor: the opaque result, and sizes that are known from here on."""
        return (self.origin, *(name for _, name in self.sizes), *(name for _, _, name in self.dims))

    @lazy
    def mentions(self) -> frozenset[str]:
        """The names of the sizes and of the opaque values among the arguments."""
        found: set[str] = set()
        stack: list[Any] = [self.args, [v for _, v in self.kwargs]]
        while stack:
            x = stack.pop()
            if isinstance(x, Opaque):
                found.add(x.name)
            elif isinstance(x, Expr):
                found |= {s.name for s in x.symbols()}
            elif isinstance(x, TensorRef):
                stack += [*x.shape, *x.stride, x.offset]
            elif isinstance(x, slice):
                stack += [x.start, x.stop, x.step]
            elif isinstance(x, dict):
                stack += x.values()
            elif isinstance(x, (tuple, list)):
                stack += x
        return frozenset(found)


def _refs(tree: Any) -> Iterator[TensorRef]:
    if isinstance(tree, TensorRef):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from _refs(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from _refs(item)


@dataclass(frozen=True)
class Join:
    """A buffer is whole: its regions, which steps before have written, are all of it. Moves no byte.

    `origin` is the FX node whose result the buffer is.
    """

    buffer: str
    regions: tuple[str, ...]
    origin: str = ""

    @property
    def reads(self) -> tuple[str, ...]:
        return self.regions

    @property
    def writes(self) -> tuple[str, ...]:
        return (self.buffer,)


@dataclass(frozen=True)
class Free:
    """The last reader of these buffers has run."""

    buffers: tuple[str, ...]


@dataclass(frozen=True)
class Again:
    """An output that is the tensor of an earlier one; equal references are two tensors over one memory."""

    output: int

    def __str__(self) -> str:
        return f"output {self.output}"


Step = Launch | Extern | Join | Free
Output = TensorRef | Expr | Opaque | Again | int | float | bool | str | None


@dataclass(frozen=True)
class Symbol:
    """What is known of a dynamic size: a value to plan with, and where a call finds it.

    `source` is `INPUT.size(D)`, `INPUT.stride(D)`, the name of an int input, or empty where the
    symbol's own name is that of an int input or an extern defines it.
    """

    name: str
    hint: int
    source: str = ""

    def mentions(self, names: Iterable[str]) -> frozenset[str]:
        """Those of `names` that the source is computed from."""
        return frozenset(re.findall(r"[A-Za-z_]\w*", self.source)) & frozenset(names)


@dataclass(frozen=True)
class Plan:
    """Everything that a program does, in order. Frozen; passes make new ones.

    `mutated` are inputs that it writes; `donated` inputs that die with the call unless their owner keeps them (what
    the forward saved for the backward), so that their last reader frees memory. `origins` and `targets` give the
    user's line and the operator (`aten.add.Tensor`) of each FX node.
    """

    name: str
    inputs: tuple[str, ...]
    buffers: Mapping[str, Buffer]
    steps: tuple[Step, ...]
    outputs: tuple[Output, ...]
    symbols: Mapping[str, Symbol] = field(default_factory=dict)
    mutated: frozenset[str] = frozenset()
    donated: frozenset[str] = frozenset()
    origins: Mapping[str, str] = field(default_factory=dict)
    targets: Mapping[str, str] = field(default_factory=dict)

    @property
    def launches(self) -> tuple[Launch, ...]:
        return tuple(s for s in self.steps if isinstance(s, Launch))

    @property
    def externs(self) -> tuple[Extern, ...]:
        return tuple(s for s in self.steps if isinstance(s, Extern))

    def runs(self, written: Container[int]) -> list[list[int]]:
        """The launches that one call does, by their steps: those that are `written` and that no other step parts."""
        found: list[list[int]] = []
        fresh = True
        for i, step in enumerate(self.steps):
            if isinstance(step, (Free, Join)):
                continue
            if i in written and fresh:
                found.append([])
            fresh = i not in written
            if not fresh:
                found[-1].append(i)
        return found

    def memory(self, name: str) -> str:
        """The buffer whose memory a buffer lives in: itself, or the one that it is inside of."""
        inside = self.buffers[name].inside
        return name if inside is None else inside[0]

    @lazy
    def regions(self) -> Mapping[str, tuple[str, ...]]:
        """The buffers that live inside of each one that has any."""
        found: dict[str, tuple[str, ...]] = {}
        for b in self.buffers.values():
            if b.inside is not None:
                found[b.inside[0]] = (*found.get(b.inside[0], ()), b.name)
        return found

    def keeps_view(self, step: Extern) -> bool:
        """Whether a view and what it views are returned: the caller sees one memory, and nothing writes it again."""
        names = {*step.reads, *step.writes}
        returned = {o.buffer for o in self.outputs if isinstance(o, TensorRef)}
        return names <= returned and all(self.buffers[n].storage == "extern" for n in names)

    def hint(self, size: Expr, sizes: Mapping[Any, Expr] | None = None) -> int:
        """A size with every symbol at its hint, the own `sizes` of a launch at what they are there."""
        size = size.substitute(sizes or {})
        if size.is_const:
            return size.value
        return size.evaluate({name: s.hint for name, s in self.symbols.items()})


@dataclass(frozen=True)
class Traffic:
    """Bytes that a step reads and writes."""

    read: int
    written: int

    @property
    def total(self) -> int:
        return self.read + self.written


def launch_traffic(plan: Plan, step: Launch | Extern) -> Traffic:
    """Bytes that one step of a plan moves: of each buffer the elements that its accesses run over, at most all of them.
    Sizes that are symbols count at their hint.

    This is the one accounting that fusion, rematerialisation, the report and the benchmarks use.
    """
    read, written = touched(plan, step)
    return Traffic(sum(read.values()), sum(written.values()))


def touched(plan: Plan, step: Launch | Extern) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of each buffer that a step reads, and of each that it writes."""
    read: dict[str, int] = {}
    written: dict[str, int] = {}

    def add(found: dict[str, int], name: str, elements: int) -> None:
        buffer = plan.buffers[name]
        nbytes = found.get(name, 0) + elements * dtypes.itemsize(buffer.dtype)
        found[name] = min(plan.hint(buffer.nbytes), nbytes)

    if isinstance(step, Extern):
        for ref in step.refs:
            add(read, ref.buffer, plan.hint(product(ref.shape)))
        return read, {name: plan.hint(plan.buffers[name].nbytes) for name in step.writes}
    loads = dict.fromkeys((v.param, v.index, v.axes) for v in step.kernel.loads)
    for run in step.members:
        for param, index, _ in loads:
            add(read, run.buffers[param], plan.hint(product(a.size for a in index_axes(index)), run.sizes))
        for store in step.kernel.stores:
            elements = plan.hint(product(a.size for a in index_axes(store.index)), run.sizes)
            add(written, run.buffers[store.param], elements)
            if store.mode and store.mode != "last":
                add(read, run.buffers[store.param], elements)
    return read, written


def least_traffic(plan: Plan) -> Traffic:
    """Bytes that no choice of kernels saves: what kernels read of inputs and of externs' results, once, and what they
    write for externs and for the caller, once. The plan is one before fusion; its externs are given."""
    read: dict[str, int] = {}
    written: dict[str, int] = {}
    for step in plan.launches:
        reads, writes = touched(plan, step)
        for name, nbytes in reads.items():
            read[name] = max(read.get(name, 0), nbytes)
        for name, nbytes in writes.items():
            written[name] = min(plan.hint(plan.buffers[name].nbytes), written.get(name, 0) + nbytes)
    leaving = {o.buffer for o in plan.outputs if isinstance(o, TensorRef)} | plan.mutated
    leaving |= {name for e in plan.externs for name in e.reads}
    given = read.keys() - written.keys() | plan.mutated
    return Traffic(sum(read[n] for n in given if n in read), sum(written[n] for n in leaving if n in written))


def content_hash(text: str) -> str:
    """The name of a kernel or a source by its content: 16 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
