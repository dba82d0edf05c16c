"""Random programs as callers see them: arguments that share memory, writes in place, views returned, gradients.

A program is text: a setup that makes arguments over a few storages, a function of them, and what it returns. It runs
through `torch.compile` and plainly, twice over the same arguments, and everything that a caller can see must agree:
values, dtypes, strides, which tensors share memory, identity, `requires_grad`, what became of the arguments, gradients.
Compiled again by other options (no fusion, another policy of rematerialisation), every bit is the same.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

BATCH = 6
DTYPES = (
    "torch.float32",
    "torch.float32",
    "torch.float64",
    "torch.bfloat16",
    "torch.int64",
    "torch.int32",
    "torch.bool",
)
OPTIONS: tuple[dict[str, Any], ...] = (
    {"fusion_fuel": 0}, {"fusion_fuel": 2}, {"remat": "save_all"}, {"remat": "recompute_all"},
    {"memory_budget": 0.2, "on_budget": "best"},
)  # fmt: skip

# {a}, {b}, {c} are tensors, {k} a number or a scalar argument, {d} and {e} dimensions of {a}.
PURE = (
    "{a} + {b}", "{a} - {b}", "{a} * {b}", "{a} + {k}", "{a} * {k}", "{k} - {a}", "-{a}", "{a}.relu()", "{a}.abs()",
    "torch.where({a} > 0, {a}, {b})", "{a}.clone()", "{a}.sum({d})", "{a}.sum()", "{a}.cumsum({d})",
    "{a}.contiguous()", "{a}.float()", "{a}.detach()", "{a}.to(torch.float64)", "{a}.amax({d})", "{a}.flip({d})",
    "torch.cat([{a}, {b}])", "torch.stack([{a}, {a}], {d})", "torch.maximum({a}, {b})", "{a}.clamp(-2, 2)",
    "{a} > {b}", "{a}.index_select({d}, i)", "{a}[i % {a}.shape[0]]", "F.pad({a}, [1, 0])",
    "{a}.masked_fill({a} > 1, {k})", "{a}.sin()", "{a}.tanh() * {b}", "{a}.softmax({d})", "{a}.exp().clamp(max=5)",
    "{a}.mean({d}, keepdim=True)", "{a}.to(torch.int64)", "{a}.roll(1, {d})",
    "{a}.scatter({d}, torch.zeros_like({a}, dtype=torch.int64), 1)", "{a} @ {b}", "{a}.max({d})[0]", "{a}.argmax({d})",
    "{a} * {a}.shape[0]", "torch.full_like({a}, 2)", "{a}.new_ones({a}.shape[0])", "torch.zeros_like({a})",
    "{a}.prod({d})", "{a}.requires_grad_(False) if not {a}.requires_grad else {a} * 1",
    "torch.empty_like({a}).copy_({b})", "{a}.type_as({b})", "F.layer_norm({a}, {a}.shape[-1:])", "{a}.mul(2).add_(1)",
    "{a}.clone().zero_()", "F.dropout({a}, 0.5, False)", "{a}.norm()",
)  # fmt: skip
VIEWS = (
    "{a}.t()", "{a}[1:]", "{a}[..., ::2]", "{a}.view(-1)", "{a}.reshape(-1)", "{a}.unsqueeze({d})",
    "{a}.select({d}, 0)", "{a}.expand(2, *{a}.shape)", "{a}.diagonal()", "{a}.squeeze()", "{a}.unbind({d})[-1]",
    "{a}.chunk(2, {d})[-1]", "{a}.transpose({d}, {e})", "{a}.narrow({d}, 0, 1)", "{a}.unfold({d}, 2, 1)",
    "{a}.view_as({a})", "{a}[None]", "{a}.mT", "{a}.as_strided([2], [1])", "{a}.flatten()", "{a}.movedim({d}, {e})",
    "{a}.split(2, {d})[0]", "{a}[..., -1]", "{a}", "{a}.view({a}.shape[0], -1)", "{a}.ravel()", "{a}[:, None]",
    "{a}.alias() if False else {a}.view({a}.shape)", "{a}.permute({d}, {e})",
)  # fmt: skip
WRITES = (
    "{a}.add_({b})", "{a}.mul_(2)", "{a}.add_({k})", "{a}.zero_()", "{a}.copy_({b})", "{a}[0] = {k}",
    "{a}[..., 0] = {b}", "{a}.relu_()", "{a}.clamp_(-1, 3)", "{a}.masked_fill_({a} > 1, 1)", "{a}.fill_({k})",
    "{a}.neg_()", "{a}.sub_({b})", "{a} += {b}", "{a}[1:] += 1", "{a}.t().mul_(2)", "{a}[i % {a}.shape[0]] = {k}",
    "{a}.index_add_(0, i % {a}.shape[0], {a}[i % {a}.shape[0]].clone())", "{a}.addcmul_({b}, {b})",
    "torch.add({a}, {b}, out={a})", "{a}.unsqueeze_({d})", "{a}.squeeze_()", "{a}.transpose_({d}, {e})",
    "torch._foreach_add_([{a}], 1)", "{a}[{a} > 1] = 0", "{a}.index_fill_({d}, i % {a}.shape[{d}], {k})",
    "{a}.swapaxes_({d}, {e})", "{a}.diagonal().fill_({k})", "{a}.view(-1)[::2].add_(1)",
    "{a}.select({d}, 0).copy_({a}.select({d}, -1))", "{a}.cumsum_({d})",
    "{a}.scatter_({d}, torch.zeros_like({a}, dtype=torch.int64), 1)", "{a}.sin_()", "{a}.lerp_({b}, 0.5)",
    "{a}.tril_()", "{a}.flip({d}).add_(1)",
)  # fmt: skip


@dataclass(frozen=True)
class Call:
    """A program: lines that make arguments, the names of these, the function's lines, and the names it returns."""

    seed: int
    setup: tuple[str, ...]
    args: tuple[str, ...]
    body: tuple[str, ...]
    returned: str
    dynamic: bool = False

    def source(self) -> str:
        lines = [f"def make{self.seed}():", *self.setup, f"return [{', '.join(self.args)}], [s for s in (s0, s1)]"]
        body = [f"def f{self.seed}({', '.join(self.args)}):", *self.body, f"return {self.returned}"]
        return "\n    ".join(lines) + "\n\n" + "\n    ".join(body) + "\n"

    def functions(self) -> tuple[Callable[[], Any], Callable[..., Any]]:
        """What makes the arguments and the storages under them, and the function."""
        space: dict[str, Any] = {"torch": torch, "F": F, "grid": grid}
        exec(self.source(), space)
        return space[f"make{self.seed}"], space[f"f{self.seed}"]


def grid(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Small integers, so that sums and products are exact."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=g).to(dtype)


# -- making -----------------------------------------------------------------------------------------------------------
class Maker:
    """A program in the making; every line is tried as it is written, and left out where eager refuses it."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.seed = seed
        self.setup: list[str] = []
        self.args: list[str] = []
        self.scalars: list[str] = []
        self.body: list[str] = []
        self.space: dict[str, Any] = {"torch": torch, "F": F, "grid": grid}

    def run(self, line: str) -> bool:
        try:
            exec(line, self.space)
        except Exception:
            return False
        return True

    def tensors(self) -> list[str]:
        return [n for n, v in self.space.items() if isinstance(v, Tensor) and re.fullmatch(r"[av]\d+", n)]

    def storages(self) -> None:
        rng = self.rng
        for k in range(2):
            shape = rng.choice(((4, 6), (3, 5), (24,), (2, 3, 4), (1, 4), (17,), (8, 33), ()))
            dtype = rng.choice(DTYPES)
            line = f"s{k} = grid({self.seed + k}, {shape}, {dtype})"
            if "float" in dtype and rng.random() < 0.5:
                line += ".requires_grad_()"
            self.setup.append(line)
            self.run(line)

    def arguments(self) -> None:
        rng = self.rng
        for k in range(rng.choice((1, 2, 2, 3))):
            text = rng.choice(("s0", "s0", "s1", "s0 * 1", "s0.detach()", rng.choice(VIEWS).format(a="s0", d=0, e=-1)))
            if self.run(line := f"a{k} = {text}"):
                self.setup.append(line)
                self.args.append(f"a{k}")
        for k in range(rng.choice((0, 0, 1, 2))):
            line = f"k{k} = {rng.choice((2, 3, 2.5, True, -1, 0, 1))}"
            self.setup.append(line)
            self.run(line)
            self.args.append(f"k{k}")
            self.scalars.append(f"k{k}")
        self.setup.append("i = torch.tensor([0, 2, 1])")
        self.run(self.setup[-1])
        self.args.append("i")

    def statement(self) -> None:
        rng, names = self.rng, self.tensors()
        if not names:
            raise OverflowError
        a, b = (names[max(rng.randrange(len(names)) for _ in range(2))] for _ in range(2))
        rank = max(self.space[a].dim(), 1)
        fields = {"a": a, "b": b, "k": rng.choice(("2", "1.5", "True", *self.scalars)), "d": rng.randrange(rank),
                  "e": rng.randrange(rank)}  # fmt: skip
        kind = rng.choice((PURE, PURE, VIEWS, WRITES))
        line = rng.choice(kind).format(**fields)
        if kind is not WRITES:
            line = f"v{len(self.body)} = {line}"
        elif rng.random() < 0.15:
            line = f"with torch.no_grad(): {line}"
        if not self.run(line):
            return
        if any(v.numel() > 3000 or not _small(v) for n, v in self.space.items() if n in self.tensors()):
            raise OverflowError
        self.body.append(line)

    def call(self) -> Call:
        self.storages()
        self.arguments()
        wanted = self.rng.choice((2, 4, 6, 9))
        for _ in range(4 * wanted):
            self.statement()
            if len(self.body) >= wanted:
                break
        names = self.tensors()
        late = [self.rng.randrange(len(names)) for _ in range(2 * self.rng.choice((1, 2, 3, 4)))]
        picked = [names[max(pair)] for pair in zip(late[::2], late[1::2])]
        nested = self.rng.choice(
            ("({},)", "[{}]", "({}, None, 3)", "{{'x': ({},)}}", "({}, a0.shape[0] if a0.dim() else 1)")
        )
        return Call(self.seed, tuple(self.setup), tuple(self.args), tuple(self.body), nested.format(", ".join(picked)),
                    self.seed % 4 == 3)  # fmt: skip


def _small(v: Tensor) -> bool:
    v = v.detach().double()
    return not v.numel() or bool(v.isfinite().all()) and float(v.abs().max()) < 250


def generate(seed: int) -> Call:
    """The program of a seed; of those that grow too large, the next one that does not."""
    for attempt in range(100):
        try:
            return Maker(seed + attempt * 10_000_000).call()
        except OverflowError:
            continue
    raise AssertionError("no program stays small")


# -- judging ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Seen:
    """What a caller sees after a call: tensors with their names, the rest of the outputs, and the gradients."""

    tensors: list[tuple[str, Tensor]]
    rest: list[Any]
    spec: Any
    gradients: list[Tensor | None]


def watch(make: Callable[[], Any], f: Callable[..., Any]) -> Iterator[Seen]:
    """Call twice over the same arguments; the second time sees what the first one wrote."""
    args, bases = make()
    for _ in range(2):
        leaves, spec = pytree.tree_flatten(f(*args))
        outputs = [(f"output {k}", x) for k, x in enumerate(leaves) if isinstance(x, Tensor)]
        given = [(f"argument {k}", x) for k, x in enumerate(args) if isinstance(x, Tensor)]
        under = [(f"storage {k}", x) for k, x in enumerate(bases)]
        roots = [x for _, x in outputs if x.requires_grad]
        gradients: list[Tensor | None] = []
        if roots:
            weights = [torch.arange(1, r.numel() + 1).remainder(5).sub(2).to(r.dtype).view(r.shape) for r in roots]
            wanted = [x for x in bases if x.requires_grad and x.is_leaf]
            if wanted:
                gradients = list(torch.autograd.grad(roots, wanted, weights, allow_unused=True, retain_graph=True))
        yield Seen([*outputs, *given, *under], [x for x in leaves if not isinstance(x, Tensor)], spec, gradients)


def differs(got: Seen, want: Seen, exact: bool) -> str:
    """What a caller could see differ."""
    if str(got.spec) != str(want.spec) or got.rest != want.rest:
        return f"structure: {got.spec} {got.rest}, expected {want.spec} {want.rest}"
    for (name, a), (_, b) in zip(got.tensors, want.tensors, strict=True):
        for what in ("dtype", "shape", "requires_grad", "is_leaf"):
            if getattr(a, what) != getattr(b, what):
                return f"{what} of a {name.split()[0]}: {name} has {getattr(a, what)}, expected {getattr(b, what)}"
        if b.numel() and [s for s, n in zip(a.stride(), a.shape) if n > 1] != [
            s for s, n in zip(b.stride(), b.shape) if n > 1
        ]:
            return f"strides of an {name.split()[0]}: {name} has {a.stride()}, expected {b.stride()} of {list(b.shape)}"
        if why := values(a.detach(), b.detach(), exact):
            return f"values of an {name.split()[0]}: {name} {why}"
    for k, (name, a) in enumerate(got.tensors):
        for j, (other, c) in enumerate(got.tensors[:k]):
            b, d = want.tensors[k][1], want.tensors[j][1]
            if not (b.numel() and d.numel()):
                continue
            if (a is c) != (b is d):
                return f"identity: {name} and {other} are one tensor {'here' if a is c else 'in eager'} alone"
            if _memory(a, c) != _memory(b, d):
                return f"memory: {name} and {other} share {_memory(a, c)}, expected {_memory(b, d)}"
    for k, (x, y) in enumerate(zip(got.gradients, want.gradients, strict=True)):
        if x is None or y is None:
            if x is not y:
                return f"gradient {k} is {'there' if y is None else 'missing'}"
        elif why := values(x, y, exact):
            return f"values of a gradient: {k} {why}"
    return ""


def _memory(a: Tensor, b: Tensor) -> str:
    if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return "nothing"
    return f"a storage, {a.storage_offset() - b.storage_offset()} elements apart"


def values(a: Tensor, b: Tensor, exact: bool) -> str:
    try:
        close = {"rtol": 0, "atol": 0} if exact else {}
        if not exact and a.is_floating_point():
            scale = float(b.double().abs().max()) if b.numel() else 0.0
            eps = max(torch.finfo(b.dtype).eps, torch.finfo(torch.float32).eps)  # as of steps on the way
            close = {"rtol": 16 * eps, "atol": 16 * eps * max(scale, 1.0)}
        torch.testing.assert_close(a, b, equal_nan=True, check_stride=False, **close)
    except AssertionError as why:
        return str(why).splitlines()[0] + f" {a.flatten()[:6].tolist()}, expected {b.flatten()[:6].tolist()}"
    return ""


@dataclass(frozen=True)
class Failure:
    """A program that went wrong; `kind` is what stays the same as it shrinks."""

    call: Call
    kind: str
    detail: str

    @property
    def seed(self) -> int:
        return self.call.seed

    def __str__(self) -> str:
        return f"seed {self.seed} (dynamic={self.call.dynamic}): {self.detail}\n{self.call.source()}"


def look(calls: list[Call], backend: str | None, options: dict[str, Any] | None = None) -> list[list[Seen]]:
    """What each program shows, all of them in one compiled function."""
    pairs = [c.functions() for c in calls]

    def together(given: list[list[Any]]) -> list[Any]:
        return [f(*args) for (_, f), args in zip(pairs, given, strict=True)]

    if backend is None:
        return [list(watch(make, f)) for make, f in pairs]
    torch._dynamo.reset()
    extra = {"options": {"verify": True, "rng": "eager", **(options or {})}} if backend == "minifuse" else {}
    run = torch.compile(together, backend=backend, dynamic=calls[0].dynamic or None, **extra)
    made = [make() for make, _ in pairs]

    def once() -> list[Any]:
        return run([args for args, _ in made])

    seen: list[list[Seen]] = [[] for _ in calls]
    for _ in range(2):
        results = once()
        for k, (result, (args, bases)) in enumerate(zip(results, made, strict=True)):
            seen[k].append(next(watch(lambda a=args, b=bases: (a, b), lambda *_, r=result: r)))
    return seen


def check(calls: Iterable[Call]) -> list[Failure]:
    """The failures of some programs, compiled together, or one by one where together something is wrong."""
    usable = []
    for c in calls:
        try:
            usable.append((c, look([c], None)[0]))
        except Exception:  # what eager refuses
            continue
    failures = []
    for dynamic in (False, True):
        some = [(c, want) for c, want in usable if c.dynamic is dynamic]
        if some and any(judge([c for c, _ in some], [want for _, want in some])):
            for c, want in some:
                (why,) = judge([c], [want])
                if why and not judge([c], [want], "aot_eager")[0]:
                    failures.append(Failure(c, re.sub(r"\W*\d.*", "", why), why))
    return failures


def judge(calls: list[Call], wanted: list[list[Seen]], backend: str = "minifuse") -> list[str]:
    """What is wrong with each program."""
    try:
        found = look(calls, backend)
        why = [_first(differs(a, b, False) for a, b in zip(got, want, strict=True)) for got, want in zip(found, wanted)]
        if backend != "minifuse" or any(why):
            return why
        options = OPTIONS[calls[0].seed // BATCH % len(OPTIONS)]
        again = look(calls, backend, options)
        other = [_first(differs(a, b, True) for a, b in zip(x, y, strict=True)) for x, y in zip(again, found)]
        return [f"by {options}: {o}" if o else "" for o in other]
    except Exception as error:
        text = str(error).strip().splitlines() or [""]
        return [f"{type(error).__name__}: {text[0]}"] * len(calls)


def _first(found: Iterable[str]) -> str:
    return next((w for w in found if w), "")


def shrink(failure: Failure) -> Failure:
    """A shorter program that fails in the same way."""
    best, progress = failure, True
    while progress:
        progress = False
        c = best.call
        names = re.findall(r"[av]\d+", c.returned)
        smaller = [
            replace(c, body=tuple(b for j, b in enumerate(c.body) if j != k)) for k in reversed(range(len(c.body)))
        ]
        smaller += [replace(c, returned=f"({n},)") for n in names if c.returned != f"({n},)"]
        for candidate in smaller:
            try:
                found = check([candidate])
            except Exception:  # a name that is gone
                continue
            if found and found[0].kind == best.kind:
                best, progress = found[0], True
                break
    return best
