"""What kernels and plans mean, as plain torch operations: slow, short, and what targets are tested against.

A value becomes a tensor with one dimension an axis of its kernel, of size 1 where it does not vary.
All loads see the memory as it was before the kernel, checks are judged before anything is stored.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from . import ops
from .index import ZERO, Axis, Expr, FloorDiv, Mod, Sym
from .kernel import Check, Kernel, Param, Store
from .plan import Again, Extern, Free, Join, Launch, Opaque, Plan, TensorRef
from .value import Cast, Const, Index, IndexOf, Load, Op, Pick, Random, RandomKind, Reduce, Scan, Value, topological

Number = int | torch.Tensor
ZERO_DIVISION = "ZeroDivisionError"

_WORD = 0xFFFFFFFF
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_PHILOX_ROUNDS = 10
_TWO_PI_F32 = 6.2831854820251465


# -- random numbers -----------------------------------------------------------------------------------
def philox_words(seed: Number, offset: int, index: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The four 32-bit words of Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
    1, 2, 3", SC 2011) as int64 tensors in 0..2**32-1.

    The key is (seed low, seed high), the counter (index low, index high, offset low, offset high).
    """

    def halves(x: Number) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(torch.as_tensor(h & _WORD, device=index.device) for h in (x, x >> 32))  # type: ignore[return-value]

    (k0, k1), (c0, c1), (c2, c3) = halves(seed), halves(index), halves(offset)
    for _ in range(_PHILOX_ROUNDS):
        # int64 products wrap modulo 2**64, which keeps both 32-bit halves right once masked
        p0, p1 = c0 * _PHILOX_MULTIPLIERS[0], c2 * _PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _WORD) ^ c1 ^ k0,
            p1 & _WORD,
            ((p0 >> 32) & _WORD) ^ c3 ^ k1,
            p0 & _WORD,
        )
        k0, k1 = (k0 + _PHILOX_WEYL[0]) & _WORD, (k1 + _PHILOX_WEYL[1]) & _WORD
    return c0, c1, c2, c3


def word_of_stream(seed: Number, offset: int, n: torch.Tensor) -> torch.Tensor:
    """Word n % 4 of the counter n // 4."""
    words = torch.stack(torch.broadcast_tensors(*philox_words(seed, offset, n >> 2)), -1)
    return words.gather(-1, (n & 3).expand(words.shape[:-1]).unsqueeze(-1)).squeeze(-1)


def philox(kind: RandomKind, seed: Number, offset: int, index: torch.Tensor) -> torch.Tensor:
    """Random numbers at logical linear indices: what `Random` of this kind means.

    The words of the counters 0, 1, 2... are a stream, of which "uniform" takes one a number and the others two: one
    block of Philox serves four numbers, or two. `seed` is an int or an int64 tensor that broadcasts with `index`
    (int64). Gives float32 for "uniform" (24 bits, [0, 1)) and "normal" (Box-Muller, in this order of float32
    operations), int64 for "bits".
    """
    if kind == "uniform":
        return (word_of_stream(seed, offset, index) >> 8).to(torch.float32) * 2.0**-24
    w0, w1 = (word_of_stream(seed, offset, 2 * index + k) for k in range(2))
    if kind == "bits":
        return w0 | (w1 << 32)
    u1 = ((w0 >> 8) + 1).to(torch.float32) * 2.0**-24
    u2 = (w1 >> 8).to(torch.float32) * 2.0**-24
    return torch.sqrt(-2.0 * torch.log(u1)) * torch.cos(_TWO_PI_F32 * u2)


# -- kernels ------------------------------------------------------------------------------------------
class _Run:
    """One evaluation of a kernel: its axes as dimensions, and the values found so far."""

    def __init__(self, kernel: Kernel, tensors: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> None:
        self.tensors = tensors
        self.sizes = sizes
        self.device = next((tensors[p.name].device for p in kernel.params), torch.device("cpu"))
        self.rank = max(1, len(kernel.axes))
        self.dims = {axis: d for d, axis in enumerate(kernel.axes)}
        self.extents = {axis: axis.size.evaluate(sizes) for axis in kernel.axes}
        self.aranges = {axis: self._arange(axis) for axis in kernel.axes}
        self.known: dict[Value, torch.Tensor] = {}
        self.results: dict[Reduce, tuple[torch.Tensor, ...]] = {}
        for p in kernel.params:
            self._check_param(p)

    def _check_param(self, p: Param) -> None:
        shape = tuple(s.evaluate(self.sizes) for s in p.shape)
        given = self.tensors[p.name]
        if tuple(given.shape) != shape or given.dtype is not p.dtype:
            raise ValueError(
                f"parameter {p.name}: expected {p.dtype} of {list(shape)}, found {given.dtype} of {list(given.shape)}"
            )

    def _arange(self, axis: Axis) -> torch.Tensor:
        shape = [1] * self.rank
        shape[self.dims[axis]] = self.extents[axis]
        return torch.arange(self.extents[axis], device=self.device).view(shape)

    def integer(self, e: Expr) -> Number:
        """An expression at every point: an int where no axis occurs in it."""
        total: Number = 0
        for mono, coef in e.terms:
            term: Number = coef
            for a in mono:
                if isinstance(a, FloorDiv):
                    term = term * (self.integer(a.num) // self.integer(a.den))
                elif isinstance(a, Mod):
                    term = term * (self.integer(a.num) % self.integer(a.den))
                elif isinstance(a, Sym):
                    term = term * self.sizes[a.name]
                else:
                    term = term * self.aranges[a]
            total = total + term
        return total

    def _tensor(self, x: Any, dtype: torch.dtype) -> torch.Tensor:
        if isinstance(x, torch.Tensor):
            return x.to(dtype)
        return torch.full([1] * self.rank, x, dtype=dtype, device=self.device)

    def evaluate(self, values: Iterable[Value]) -> None:
        for v in values:
            if v not in self.known:
                self.known[v] = self._compute(v)

    def _compute(self, v: Value) -> torch.Tensor:
        known = self.known
        if isinstance(v, Const):
            return self._tensor(v.value, v.dtype)
        if isinstance(v, IndexOf):
            return self._tensor(self.integer(v.expr), v.dtype)
        if isinstance(v, Load):
            return self._load(v)
        if isinstance(v, Op):
            return _apply(v.name, [known[a] for a in v.args])
        if isinstance(v, Cast):
            return known[v.arg].to(v.dtype)
        if isinstance(v, Random):
            return philox(v.kind, known[v.seed], v.offset, self._tensor(self.integer(v.index), torch.int64))
        if isinstance(v, Reduce):
            self.results[v] = self._reduce(v)
            return self.results[v][0]
        if isinstance(v, Scan):
            return self._scan(v)
        if isinstance(v, Pick):
            return self.results[v.value][v.i]
        raise TypeError(f"no meaning for {type(v).__name__}")

    def _reduce(self, v: Reduce) -> tuple[torch.Tensor, ...]:
        row, dim, extent = ops.REDUCTIONS[v.kind], self.dims[v.over], self.extents[v.over]
        args = list(torch.broadcast_tensors(*(self.known[a] for a in v.args)))
        shape = list(args[0].shape)
        shape[dim] = 1 if extent == 0 else extent
        if extent == 0:
            # the identity, and 0 for what else there is: the index of an argument reduction, a sum, a count
            fills = [row.identity(v.dtype), *[0] * (v.results - 1)]
            return tuple(
                torch.full(shape, fill, dtype=a.dtype, device=self.device)
                for a, fill in zip(v.parts, fills, strict=True)
            )
        # torch's order of summation depends on strides, and a kernel's loops must not change a bit
        found = row.meaning(*(a.expand(shape).movedim(dim, -1).contiguous() for a in args), -1)
        return tuple(x.movedim(-1, dim) for x in (found if isinstance(found, tuple) else (found,)))

    def _scan(self, v: Scan) -> torch.Tensor:
        meaning, dim = ops.REDUCTIONS[v.kind].scan, self.dims[v.over]
        assert meaning is not None
        arg = self.known[v.arg]
        shape = [self.extents[v.over] if d == dim else n for d, n in enumerate(arg.shape)]
        return meaning(arg.expand(shape), dim)

    def at(
        self, what: str, index: Sequence[Index], shape: Sequence[int], mask: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """Index tensors, 0 where masked off. Raises IndexError where an element lies outside."""
        out = []
        for d, (entry, size) in enumerate(zip(index, shape, strict=True)):
            i = self._tensor(self.integer(entry) if isinstance(entry, Expr) else self.known[entry], torch.int64)
            if mask is not None:
                i = torch.where(mask, i, 0)
            out.append(i)
            if i.numel() and (int(i.min()) < 0 or int(i.max()) >= size) and self._reaches(index, mask):
                raise IndexError(f"{what}: dimension {d} is indexed {int(i.min())}..{int(i.max())}, its size is {size}")
        return out

    def _reaches(self, index: Sequence[Index], mask: torch.Tensor | None) -> bool:
        """Whether any point of the access exists: another dimension's axis may be empty."""
        axes = frozenset[Axis]().union(*(i.axes() if isinstance(i, Expr) else i.axes for i in index))
        return all(self.extents[a] for a in axes) and (mask is None or bool(mask.any()))

    def _load(self, v: Load) -> torch.Tensor:
        source = self.tensors[v.param]
        mask = None if v.mask is None else self.known[v.mask]
        index = self.at(f"load {v.param}", v.index, source.shape, mask)
        if not index:
            found = source.clone().reshape([1] * self.rank)
        elif source.numel() == 0:
            # only masked-off points can be left, and they may not index an empty dimension
            found = source.new_zeros(torch.broadcast_shapes(*(i.shape for i in index)))
        else:
            found = source[tuple(index)]
        return found if mask is None or v.other is None else torch.where(mask, found, self.known[v.other])

    def store(self, s: Store) -> None:
        target, value = self.tensors[s.param], self.known[s.value]
        if s.mode:
            self.scatter(s)
            return
        mask = None if s.mask is None else self.known[s.mask]
        index = self.at(f"store {s.param}", s.index, target.shape, mask)
        if not index:
            if mask is None or bool(mask):
                target.copy_(value.reshape(()))
            return
        shape = torch.broadcast_shapes(*(i.shape for i in index))
        if 0 in shape:
            return
        at, value = [i.expand(shape) for i in index], value.expand(shape)
        if mask is not None:
            some = mask.expand(shape)
            at, value = [i[some] for i in at], value[some]
        target.index_put_(tuple(at), value)

    def scatter(self, s: Store) -> None:
        """Element by element of the axis that a scatter runs along."""
        target, mask = self.tensors[s.param], None if s.mask is None else self.known[s.mask]
        index = self.at(f"store {s.param}", s.index, target.shape, mask)
        given = [*index, self.known[s.value], *([] if mask is None else [mask])]
        space = [self.extents[a] if a in s.space else 1 for a in self.dims] or [1]
        given = [x.expand(space) for x in given]
        dim = 0 if s.over is None else self.dims[s.over]
        slices = [given] if s.over is None else [[x.narrow(dim, k, 1) for x in given] for k in range(space[dim])]
        for part in slices:
            some = part.pop() if mask is not None else torch.ones_like(part[-1], dtype=torch.bool)
            value, at = part.pop()[some], tuple(i[some] for i in part)
            if s.mode != "last":
                value = _apply(s.mode, [target[at].flatten(), value]).to(target.dtype)
            target.index_put_(at, value) if at else target.copy_(value.reshape(target.shape))


_DIVISIONS = {"truncdiv", "floordiv", "mod", "rem"}


def _apply(name: str, args: list[torch.Tensor]) -> torch.Tensor:
    if name not in _DIVISIONS:
        return ops.row(name).meaning(*args)
    # torch raises on a zero divisor and the processor traps on the lowest integer over -1. Kernels do
    # neither: x by 0 is 0 (a Check beside it raises), x by -1 is the wrapped negation.
    a, b = torch.broadcast_tensors(*args)
    signed = torch.iinfo(b.dtype).min < 0
    minus_one = b == -1 if signed else torch.zeros_like(b, dtype=torch.bool)
    zero = torch.zeros_like(a)
    safe = ops.row(name).meaning(a, torch.where((b == 0) | minus_one, torch.ones_like(b), b))
    negated = zero if name in ("mod", "rem") else -a
    return torch.where(b == 0, zero, torch.where(minus_one, negated, safe))


@torch.no_grad()
def run_kernel(kernel: Kernel, tensors: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> None:
    """Run a kernel on tensors by parameter name, of the parameter's shape and any strides.

    `sizes` gives every symbol by name. Stores write into the tensors. Raises IndexError with the
    message of a failed check (RuntimeError for division by zero, as torch does) before anything is
    stored, and on an unmasked access outside of a parameter; ValueError for a tensor that does not
    have its parameter's shape and dtype.
    """
    run = _Run(kernel, tensors, sizes)
    checks = [r for r in kernel.body if isinstance(r, Check)]
    run.evaluate(topological(c.condition for c in checks))
    for c in checks:
        if not bool(run.known[c.condition].all()):
            if c.message.startswith(ZERO_DIVISION):
                raise RuntimeError(ZERO_DIVISION)
            raise IndexError(c.message)
    run.evaluate(kernel.values())
    for s in kernel.stores:
        run.store(s)


# -- plans --------------------------------------------------------------------------------------------
_SOURCE = re.compile(r"(?P<input>.+)\.(?P<what>size|stride)\((?P<dim>\d+)\)")


class _Call:
    """One call of a plan: the tensors that are alive, the sizes known so far, and what is neither."""

    def __init__(self, plan: Plan, inputs: Sequence[Any], constants: Mapping[str, Any]) -> None:
        if len(inputs) != len(plan.inputs):
            raise TypeError(f"plan {plan.name} takes {len(plan.inputs)} inputs, found {len(inputs)}")
        given = {**constants, **dict(zip(plan.inputs, inputs, strict=True))}
        self.plan = plan
        self.live: dict[str, torch.Tensor] = {name: x for name, x in given.items() if name in plan.buffers}
        self.others: dict[tuple[str, int | None], Any] = {
            (name, None): x for name, x in given.items() if name not in self.live
        }
        self.sizes: dict[str, int] = {}
        for s in plan.symbols.values():
            size = self._given_size(s.name, s.source, given)
            if size is not None:
                self.sizes[s.name] = size
        self._derive()

    def _given_size(self, name: str, source: str, given: Mapping[str, Any]) -> int | None:
        number = given.get(source or name)
        if isinstance(number, int):
            return number
        found = _SOURCE.fullmatch(source)
        if found is None:
            return None
        if found["input"] not in given:
            raise ValueError(f"size {name}: expected INPUT, INPUT.size(D) or INPUT.stride(D), found {source!r}")
        tensor, dim = given[found["input"]], int(found["dim"])
        return tensor.size(dim) if found["what"] == "size" else tensor.stride(dim)

    def _derive(self) -> None:
        """Sizes that are computed from others, as far as these are known."""
        for s in self.plan.symbols.values():
            if s.name not in self.sizes and s.source and _SOURCE.fullmatch(s.source) is None:
                needed = s.mentions(self.plan.symbols)
                if needed and needed <= self.sizes.keys():
                    self.sizes[s.name] = int(eval(s.source, {"math": math}, dict(self.sizes)))

    def _ints(self, exprs: Iterable[Expr]) -> list[int]:
        return [e.evaluate(self.sizes) for e in exprs]

    def _written(self, name: str) -> torch.Tensor:
        if name not in self.live:
            b = self.plan.buffers[name]
            whole, begin = b.inside or (b.reuses, ZERO)
            if whole is None:
                shape, stride = self._ints(b.shape), self._ints(b.stride)
                self.live[name] = torch.empty_strided(shape, stride, dtype=b.dtype, device=b.device)
            else:
                self._written(whole)
                self.live[name] = self.resolve(TensorRef(whole, b.shape, b.stride, begin))
        return self.live[name]

    def resolve(self, tree: Any) -> Any:
        """An argument or an output with buffers as tensors and sizes as ints."""
        if isinstance(tree, TensorRef):
            base = self.live[tree.buffer]
            offset = base.storage_offset() + tree.offset.evaluate(self.sizes)
            return base.as_strided(self._ints(tree.shape), self._ints(tree.stride), offset)
        if isinstance(tree, Expr):
            return tree.evaluate(self.sizes)
        if isinstance(tree, Opaque):
            return self.others[tree.name, tree.item]
        if isinstance(tree, (tuple, list)):
            return [self.resolve(item) for item in tree]
        if isinstance(tree, dict):
            return {key: self.resolve(item) for key, item in tree.items()}
        return tree

    def launch(self, step: Launch) -> None:
        writes = set(step.writes)
        for run in step.members:
            tensors = {p: self._written(b) if b in writes else self.live[b] for p, b in run.buffers.items()}
            for p in step.kernel.params if run.sizes else ():
                shape, stride = map(self._ints, run.layout(p))
                tensors[p.name] = tensors[p.name].as_strided(shape, stride)
            own = {s.name: e.evaluate(self.sizes) for s, e in run.sizes.items()}
            run_kernel(step.kernel, tensors, {**self.sizes, **own})

    def extern(self, step: Extern) -> None:
        args = [self.resolve(a) for a in step.args]
        memory = {_address(x) for x in self.live.values()} - {None}
        found = step.target(*args, **{k: self.resolve(v) for k, v in step.kwargs})
        results = (found,) if step.single else tuple(found or ())
        for at, symbol in step.sizes:
            self.sizes[symbol] = results[at]
        for at, dim, symbol in step.dims:
            self.sizes[symbol] = results[at].size(dim)
        if step.sizes or step.dims:
            self._derive()
        for at, (name, result) in enumerate(zip(step.results, results, strict=False)):
            if name is not None:
                # what shares an argument's memory is copied: the plan may write a result's memory once it has been read
                apart = _address(result) in memory and not self.plan.keeps_view(step)
                self._adopt(name, result.clone() if apart else result)
            else:
                self.others[step.origin, None if step.single else at] = result

    def _adopt(self, name: str, result: torch.Tensor) -> None:
        """Take a result as the buffer, or copy it where the buffer exists or has another layout or dtype."""
        buffer = self.plan.buffers[name]
        shape, stride = self._ints(buffer.shape), self._ints(buffer.stride)
        if list(result.shape) != shape:
            raise ValueError(f"buffer {name}: expected a tensor of {shape}, found {list(result.shape)}")
        result = result.to(buffer.dtype)
        laid_out = all(a == b for a, b, s in zip(result.stride(), stride, shape, strict=True) if s > 1)
        if name not in self.live and buffer.inside is None and (laid_out or 0 in shape):
            self.live[name] = result
        else:
            self._written(name).copy_(result)

    def run(self) -> list[Any]:
        for step in self.plan.steps:
            if isinstance(step, Launch):
                self.launch(step)
            elif isinstance(step, Extern):
                self.extern(step)
            elif isinstance(step, Join):
                self._written(step.buffer)
            elif isinstance(step, Free):
                for name in step.buffers:
                    del self.live[name]
        found: list[Any] = []
        for o in self.plan.outputs:
            found.append(found[o.output] if isinstance(o, Again) else self.resolve(o))
        return found


def _address(x: torch.Tensor) -> int | None:
    """Where a tensor's storage lies; None where it has no memory, or not one."""
    return x.untyped_storage().data_ptr() or None if x.layout is torch.strided else None


@torch.no_grad()
def run_plan(plan: Plan, inputs: Sequence[Any], constants: Mapping[str, Any] | None = None) -> list[Any]:
    """Run a plan on its inputs (tensors, ints for symbols, opaque objects), in `plan.inputs` order.

    `constants` holds the graph's own tensors by buffer name. Gives the outputs: tensors that view the
    plan's buffers, ints, and literals as they are. Inputs that the plan mutates are written. Raises
    what the kernels' checks and the externs raise, ValueError where a tensor is not of its
    buffer's shape and dtype.
    """
    return _Call(plan, inputs, constants or {}).run()
