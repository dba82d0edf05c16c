"""Random programs over tensors, as text: statements that eager runs, that capture traces, and that a person can read.

Values carry whether they are exact: equal in bits whoever computes them by the rules of IEEE arithmetic. What jumps
(comparisons, rounding, casts to integers, argmax) is applied to exact values alone, so that two right answers never
differ by more than rounding.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from string import Template
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import LAYOUTS, Input, make
from .operators import (
    BLOCKS,
    BLOCKS_OF_IMAGES,
    BOOL_BINARY,
    BOOL_UNARY,
    CREATE,
    FLOAT_BINARY,
    FLOAT_UNARY,
    INT_BINARY,
    INT_UNARY,
    LIBRARY,
    POOLS,
    REDUCE_FLOATS,
    REDUCE_INTEGERS,
    SCATTERS,
    VIEWS,
    VIEWS_OF_MATRICES,
)

FLOATS = (torch.float32, torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
SMALL = (1, 2, 3, 4, 5, 7, 8, 16, 17, 31, 32, 33, 48, 64)
MIDDLE = (100, 127, 128, 129, 150, 257, 300)
LONG = (1000, 4096, 4100, 5000, 9000)
LARGEST = 1e4


@dataclass(frozen=True)
class Statement:
    """`results = text`, where {0}, {1}… stand for `args`. `exact`: whether the results are (see the module)."""

    text: str
    args: tuple[str, ...]
    results: tuple[str, ...]
    exact: bool

    def __str__(self) -> str:
        return f"{', '.join(self.results)} = {self.text.format(*self.args)}"


@dataclass(frozen=True)
class Recipe:
    """A program: inputs x0, x1…, statements, the names it returns, and the inputs it writes at its end."""

    seed: int
    inputs: tuple[Input, ...]
    statements: tuple[Statement, ...]
    outputs: tuple[str, ...]
    writes: tuple[tuple[str, str], ...] = ()
    dynamic: bool = False

    def source(self) -> str:
        """The program as Python."""
        lines = [f"def f({', '.join(f'x{i}' for i in range(len(self.inputs)))}):"]
        lines += [f"    {s}" for s in self.statements]
        lines += [f"    {x}.copy_({v})" for x, v in self.writes]
        return "\n".join([*lines, f"    return ({', '.join(self.outputs)},)"]) + "\n"

    def function(self) -> Callable[..., tuple[Tensor, ...]]:
        space: dict[str, Any] = {"torch": torch, "F": F}
        exec(self.source(), space)
        return space["f"]  # type: ignore[no-any-return]

    def arguments(self, sizes: dict[int, int] | None = None) -> list[Tensor]:
        """Fresh inputs, the same at each call; `sizes` replaces dimensions of a given size."""
        made: list[Tensor] = []
        for k, spec in enumerate(self.inputs):
            if sizes:
                spec = replace(spec, shape=tuple(sizes.get(s, s) for s in spec.shape))
            made.append(make(spec, self.seed * 1000 + k, made[-1] if made else None))
        return made

    def script(self) -> str:
        """A program that runs this recipe through torch.compile and eager."""
        specs = ",\n    ".join(repr(i) for i in self.inputs)
        return (
            "import torch\nimport torch.nn.functional as F\n"
            "from tests.fuzz.generate import Recipe\nfrom tests.fuzz.inputs import Input\n\n"
            f"{self.source()}\n"
            f"recipe = Recipe({self.seed}, (\n    {specs},\n), (), ())\n"
            f"print(f(*recipe.arguments()))\n"
            f'print(torch.compile(f, backend="minifuse", dynamic={self.dynamic})(*recipe.arguments()))\n'
        )


class RejectedError(Exception):
    """A statement that this program cannot have: eager refuses it, or its numbers or its size grow too much."""


class Maker:
    """A program in the making, with every value that eager gives it."""

    float_unary: ClassVar[Sequence[tuple[str, str]]] = FLOAT_UNARY
    float_binary: ClassVar[Sequence[tuple[str, str]]] = FLOAT_BINARY
    reduce_floats: ClassVar[Sequence[tuple[str, str, int]]] = REDUCE_FLOATS
    lengths: ClassVar[Sequence[int]] = (2, 4, 6, 9, 12, 16)

    def __init__(self, seed: int, dynamic: bool) -> None:
        self.rng = random.Random(seed)
        self.seed, self.dynamic = seed, dynamic
        self.inputs: list[Input] = []
        self.statements: list[Statement] = []
        self.values: dict[str, Tensor] = {}
        self.exact: set[str] = set()
        self.special = self.rng.random() < 0.08
        self.most = self.rng.choice((3000, 20_000, 20_000, 120_000))
        pool = [SMALL] * 4 + [MIDDLE] * 2 + [LONG] * (self.most > 3000)
        low = 2 if dynamic else 1
        self.palette = [self.rng.choice([s for s in self.rng.choice(pool) if s >= low]) for _ in range(4)]
        if not dynamic and self.rng.random() < 0.06:
            self.palette[0] = 0

    # -- values --------------------------------------------------------------------------------------------------------
    def new_input(self, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None, values: str = "") -> str:
        rng = self.rng
        if shape is None:
            shape = [rng.choice(self.palette) for _ in range(rng.choice((0, 1, 1, 2, 2, 2, 3, 3, 4)))]
            while math.prod(max(s, 1) for s in shape) > self.most:
                shape = shape[1:]
        if dtype is None:
            pool = FLOATS if self.special or rng.random() < 0.75 else (*INTEGERS, torch.bool)
            dtype = rng.choice(pool)
        if not values:
            values = "special" if self.special else rng.choice(("normal", "normal", "grid"))
        layout = rng.choice(LAYOUTS) if rng.random() < 0.35 else "contiguous"
        last = self.inputs[-1] if self.inputs else None
        if layout == "alias" and (last is None or (last.shape, last.dtype) != (tuple(shape), dtype)):
            layout = "offset"
        name = f"x{len(self.inputs)}"
        self.inputs.append(Input(tuple(shape), dtype, layout, values))
        before = self.values.get(f"x{len(self.inputs) - 2}")
        self.values[name] = make(self.inputs[-1], self.seed * 1000 + len(self.inputs) - 1, before)
        self.exact.add(name)
        return name

    def pick(self, want: Callable[[Tensor], bool] | None = None, exact: bool = False) -> str:
        """A value of the program, late ones more often, or a new input. Raises RejectedError."""
        names = [n for n, v in self.values.items() if (want is None or want(v)) and (not exact or n in self.exact)]
        if names and self.rng.random() < 0.96:
            return names[max(self.rng.randrange(len(names)) for _ in range(3))]
        name = self.new_input()
        if want is not None and not want(self.values[name]):
            raise RejectedError("no value fits")
        return name

    def size(self, name: str, d: int, at: int = 0) -> str:
        """The text of a size: a symbol of argument `at` where sizes are dynamic."""
        return f"{{{at}}}.size({d})" if self.dynamic else str(self.values[name].shape[d])

    def add(self, text: str, args: Sequence[str], how: str = "same", results: int = 1) -> tuple[str, ...]:
        """Append a statement. Raises RejectedError."""
        pure = all(a in self.exact for a in args)
        if how == "jump" and not pure:
            raise RejectedError("jumps at a value that is not exact")
        if self.special and how == "loose" and text in LIBRARY:
            raise RejectedError("a library's own answer to NaN and infinities")
        exact = pure and how != "loose"
        names = tuple(f"v{len(self.statements)}" + (f"_{i}" if results > 1 else "") for i in range(results))
        made = Statement(text, tuple(args), names, exact)
        space = {"torch": torch, "F": F, **{a: self.values[a] for a in args}}
        try:
            found = eval(made.text.format(*args), space)
        except (RuntimeError, IndexError, ValueError, TypeError) as why:
            raise RejectedError(str(why)) from why
        found = found if isinstance(found, tuple) else (found,)
        if len(found) != results:
            raise RejectedError("another number of results")
        for v in found:
            self.admit(v, exact)
        self.statements.append(made)
        self.values.update(zip(names, found, strict=True))
        if exact:
            self.exact.update(names)
        return names

    def admit(self, v: Any, exact: bool) -> None:
        if not isinstance(v, Tensor) or v.numel() > 2 * self.most or v.dim() > 5:
            raise RejectedError("too large")
        if v.is_floating_point() and v.numel() and not self.special:
            most = float(v.abs().max())
            if not most <= (LARGEST if v.dtype is not torch.float16 else 500):
                raise RejectedError("numbers grow")
        if v.dtype not in (*FLOATS, *INTEGERS, torch.bool) or not exact and not v.is_floating_point():
            raise RejectedError("a dtype that is not handled")

    # -- kinds of statements -------------------------------------------------------------------------------------------
    def unary(self) -> None:
        x = self.pick()
        v = self.values[x]
        if v.is_floating_point():
            text, how = self.rng.choice(self.float_unary)
            self.add(text, [x], how)
        else:
            self.add(self.rng.choice(BOOL_UNARY if v.dtype is torch.bool else INT_UNARY), [x])

    def partner(self, x: str, family: Callable[[Tensor], bool]) -> str:
        """A value that broadcasts with x, or a new input that does."""
        shape = self.values[x].shape

        def fits(v: Tensor) -> bool:
            same = zip(reversed(v.shape), reversed(shape))
            return family(v) and all(a == b or a == 1 or b == 1 for a, b in same)

        names = [n for n, v in self.values.items() if n != x and fits(v)]
        if names and self.rng.random() < 0.75:
            return self.rng.choice(names)
        v = self.values[x]
        new = [1 if self.rng.random() < 0.25 else s for s in shape][self.rng.choice((0, 0, 0, 1, 2)) :]
        dtype = v.dtype if self.rng.random() < 0.7 else self.rng.choice((*FLOATS, *INTEGERS))
        if not family(torch.empty(0, dtype=dtype)):
            dtype = v.dtype
        return self.new_input(new, dtype)

    def binary(self) -> None:
        x = self.pick()
        v = self.values[x]
        if v.is_floating_point():
            text, how = self.rng.choice(self.float_binary)
            y = self.partner(x, lambda t: t.is_floating_point() or self.rng.random() < 0.1)
            args = [x, y] if self.rng.random() < 0.5 or not self.values[y].is_floating_point() else [y, x]
            self.add(text, args, how)
        elif v.dtype is torch.bool:
            self.add(self.rng.choice(BOOL_BINARY), [x, self.partner(x, lambda t: t.dtype is torch.bool)])
        else:
            y = self.partner(x, lambda t: not t.is_floating_point() and t.dtype is not torch.bool)
            self.add(self.rng.choice(INT_BINARY), [x, y])

    def choose(self) -> None:
        """where by a mask, and masked_fill."""
        x = self.pick()
        m = self.partner(x, lambda t: t.dtype is torch.bool)
        if self.values[m].dtype is not torch.bool:
            m = self.new_input(self.values[x].shape, torch.bool)
        if self.rng.random() < 0.3:
            self.add("{0}.masked_fill({1}, 1)", [x, m])
        else:
            y = self.partner(x, lambda t: True)
            self.add("torch.where({2}, {0}, {1})", [x, y, m])

    def cast(self) -> None:
        x = self.pick()
        v = self.values[x]
        target = self.rng.choice((*FLOATS, *FLOATS, *INTEGERS, torch.bool))
        text = "{0}"
        if v.is_floating_point() and not target.is_floating_point and target is not torch.bool:
            text = "{0}.clamp(0, 100)" if target is torch.uint8 else "{0}.clamp(-100, 100)"
            if self.special:
                raise RejectedError("NaN as an integer")
        jumps = v.is_floating_point() and not target.is_floating_point
        self.add(f"{text}.to({target})", [x], "jump" if jumps else "same")

    def view(self) -> None:
        x = self.pick(lambda t: t.dim() > 0)
        shape, rng = self.values[x].shape, self.rng
        rank = len(shape)
        d, e = rng.randrange(rank), rng.randrange(rank)
        order = rng.sample(range(rank), rank)
        a = rng.randrange(max(shape[d], 1))
        b = rng.randrange(a, max(shape[d], 1)) + 1
        sized = self.size(x, d)
        fields = {
            "d": d, "e": e, "order": order, "both": sorted({d, e}), "n": sized,
            "wide": [-1] * d + [3] + [-1] * (rank - d), "ones": [1] * rank, "last": self.size(x, rank - 1),
            "same": f"[{', '.join(self.size(x, i) for i in range(rank))}]",
            "twice": [2 if k == d else 1 for k in range(rank)], "diagonal": rng.choice((0, 0, 1, -1)),
        }  # fmt: skip
        texts = list(VIEWS)
        if rank > 1:
            k = rng.randrange(rank - 1)
            merged = [self.size(x, i) for i in range(rank)]
            merged[k : k + 2] = [f"{merged[k]} * {merged[k + 1]}"]
            fields |= {"k": k, "l": k + 1, "merged": ", ".join(merged)}
            texts += VIEWS_OF_MATRICES
        divisors = [q for q in (2, 3, 4, 8, 16) if shape[d] % q == 0 and shape[d] > q]
        if divisors:
            q = rng.choice(divisors)
            texts += [
                f"{{0}}.unflatten({d}, ({q}, -1))",
                f"{{0}}.unflatten({d}, (-1, {q}))",
                f"{{0}}.chunk({q}, {d})[1]",
            ] * 2
        if not self.dynamic:
            index = ", ".join([":"] * d + [f"{a}:{b}"])
            texts += [f"{{0}}[{index}]", f"{{0}}[{', '.join([':'] * d + [f'{a}::2'])}]", f"{{0}}.select({d}, {a})",
                      f"{{0}}.split({max(b - a, 1)}, {d})[-1]", f"{{0}}.repeat_interleave(2, {d})"]  # fmt: skip
            if math.prod(shape):
                texts.append(f"{{0}}.reshape({self.factors(math.prod(shape))})")
            if 1 in shape:
                texts.append(f"{{0}}.expand({[rng.choice((1, 3, 17)) if s == 1 else s for s in shape]})")
        else:
            texts += [
                f"{{0}}.narrow({d}, 0, {sized} // 2)",
                f"{{0}}.reshape({sized}, -1)",
                f"{{0}}.narrow({d}, {sized} // 2, 1)",
            ]
        text = Template(rng.choice(texts)).substitute(fields)
        sums = self.values[x].is_floating_point() and (".sum" in text or "torch.trace" in text)
        self.add(text, [x], "loose" if sums else "same")

    def factors(self, n: int) -> list[int]:
        """A shape of n elements."""
        out = []
        while n > 1 and len(out) < 3:
            f = self.rng.choice([k for k in (2, 3, 4, 5, 7, 8, 16, 17, n) if n % k == 0])
            out.append(f)
            n //= f
        out.append(n)
        self.rng.shuffle(out)
        return out

    def join(self) -> None:
        x = self.pick(lambda t: t.dim() > 0)
        v, rng = self.values[x], self.rng
        d = rng.randrange(v.dim())
        kind = rng.choice(("cat", "cat", "stack", "pad", "pad", "scatter"))
        if kind == "pad":
            pads = [rng.choice((0, 1, 2, 5)) for _ in range(2 * rng.choice((1, 1, 2)))]
            if rng.random() < 0.2:
                pads[0] = -1
            self.add(f"F.pad({{0}}, {pads}, value={rng.choice((0, 1, 3))})", [x])
        elif kind == "scatter":
            if self.rng.random() < 0.5:
                self.add(f"torch.select_scatter({{0}}.contiguous(), {{0}}.select({d}, -1) * 2, {d}, 0)", [x])
            else:
                self.add(f"torch.slice_scatter({{0}}.contiguous(), {{0}}.narrow({d}, 0, 2) + 1, {d}, 1, 3)", [x])
        else:

            def like(t: Tensor) -> bool:
                return t.dim() == v.dim() and all(
                    a == b or kind == "cat" and k == d for k, (a, b) in enumerate(zip(t.shape, v.shape))
                )

            names = [n for n, t in self.values.items() if like(t)]
            others = [rng.choice(names) for _ in range(rng.choice((1, 1, 2)))]
            args = [x, *others]
            self.add(f"torch.{kind}([{', '.join('{%d}' % i for i in range(len(args)))}], {d})", args)

    def reduce(self) -> None:
        x = self.pick(lambda t: t.dim() > 0)
        v, rng = self.values[x], self.rng
        rank = v.dim()
        dims = sorted(rng.sample(range(rank), rng.choice((1, 1, min(2, rank)))))
        keep = rng.random() < 0.4
        fields = {"dims": dims, "dim": dims[-1], "keep": keep}
        text, how, results = rng.choice(self.reduce_floats if v.is_floating_point() else REDUCE_INTEGERS)
        if self.special and ("var" in text or "std" in text):
            raise RejectedError("eager's own answer to infinities")
        self.add(Template(text).substitute(fields), [x], how, results)

    def block(self) -> None:
        """What networks are made of: norms, softmax, losses, an operator that is not compiled."""
        x = self.pick(lambda t: t.dim() > 0 and t.is_floating_point() and t.shape[-1] > 0)
        v, rng = self.values[x], self.rng
        d = rng.randrange(v.dim())
        fields = {"d": d, "last": self.size(x, v.dim() - 1), "channels": self.size(x, min(1, v.dim() - 1))}
        texts = [*BLOCKS, *(BLOCKS_OF_IMAGES if v.dim() >= 3 else ())]
        text = rng.choice(texts)
        if self.special and "multi_margin" in text:
            raise RejectedError("eager's own answer to NaN: torch's decomposition for compilers has another")
        self.add(Template(text).substitute(fields), [x], "loose")

    def pool(self) -> None:
        x = self.pick(lambda t: t.dim() >= 3 and t.is_floating_point())
        text, results = self.rng.choice(POOLS)
        self.add(text, [x], "jump", results)

    def scatter(self) -> None:
        x = self.pick(lambda t: t.dim() > 0 and min(t.shape) > 0)
        v = self.values[x]
        d = self.rng.randrange(v.dim())
        text, how = self.rng.choice(SCATTERS)
        if how == "unique":  # of several that are written to one place, any may stay
            text, how = text.replace("{1} % $n", "torch.zeros_like({0}, dtype=torch.int64).cumsum($d)"), "same"
            text = text.replace("torch.zeros_like", "torch.ones_like").replace(".cumsum($d)", ".cumsum($d) - 1")
        if not v.is_floating_point() and how == "loose":
            how = "same"
        i = self.new_input(v.shape, torch.int64, "index")
        self.add(Template(text).substitute(d=d, n=self.size(x, d)), [x, i], how)

    def index(self) -> None:
        x = self.pick(lambda t: t.dim() > 0 and min(t.shape) > 0)
        v, rng = self.values[x], self.rng
        d = rng.randrange(v.dim())
        n = self.size(x, d)
        like = [
            n for n, t in self.values.items() if t.dtype in (torch.int64, torch.int32) and t.dim() and t.numel() < 600
        ]
        i = (
            rng.choice(like)
            if like and rng.random() < 0.5
            else self.new_input(
                [rng.choice(self.palette) for _ in range(rng.choice((1, 1, 2)))],
                rng.choice((torch.int64, torch.int64, torch.int32)),
                "index",
            )
        )
        at = f"({{1}}.long() % {n})"
        texts = [f"{{0}}[{':, ' * d}{at}]", f"{{0}}[{':, ' * d}{at} - {n}]"]
        if self.values[i].dim() == 1:
            texts.append(f"torch.index_select({{0}}, {d}, {at})")
        if v.dim() == 2:
            texts += [f"F.embedding({{1}}.long() % {self.size(x, 0)}, {{0}})",
                      f"{{0}}[{{1}}.long() % {self.size(x, 0)}, {{1}}.long() % {self.size(x, 1)}]"]  # fmt: skip
        if rng.random() < 0.4:
            whole = self.new_input(v.shape, torch.int64, "index")
            self.add(f"torch.gather({{0}}, {d}, {{1}} % {n})", [x, whole])
        else:
            self.add(rng.choice(texts), [x, i])

    def create(self) -> None:
        x = self.pick(lambda t: t.dim() > 0)
        rank = self.values[x].dim()
        text = Template(self.rng.choice(CREATE)).substitute(n=self.size(x, rank - 1))
        self.add(text, [x])

    # -- the whole -----------------------------------------------------------------------------------------------------
    def kinds(self) -> list[tuple[Callable[[], None], int]]:
        """What makes a statement, and how often."""
        return [
            (self.unary, 20), (self.binary, 26), (self.choose, 6), (self.cast, 8), (self.view, 22), (self.join, 8),
            (self.reduce, 16), (self.block, 8), (self.pool, 2), (self.index, 6), (self.scatter, 4), (self.create, 3),
        ]  # fmt: skip

    def recipe(self) -> Recipe:
        rng = self.rng
        makers, weights = zip(*self.kinds(), strict=True)
        self.new_input()
        wanted = rng.choice(self.lengths)
        for _ in range(4 * wanted):
            try:
                rng.choices(makers, weights)[0]()
            except RejectedError:
                continue
            if len(self.statements) >= wanted:
                break
        return self.finish()

    def finish(self) -> Recipe:
        rng = self.rng
        made = [r for s in self.statements for r in s.results]
        read = {a for s in self.statements for a in s.args}
        outputs = [n for n in made if n not in read or rng.random() < 0.12] or ["x0"]
        rng.shuffle(outputs)
        writes: list[tuple[str, str]] = []
        used = {self.values[o].untyped_storage().data_ptr() for o in outputs}
        for k, spec in enumerate(self.inputs):
            x = f"x{k}"
            shared = spec.layout in ("alias", "expanded", "overlapping") or (
                k + 1 < len(self.inputs) and self.inputs[k + 1].layout == "alias"
            )
            same = [
                n
                for n in made
                if self.values[n].shape == self.values[x].shape and (n in self.exact or spec.dtype.is_floating_point)
            ]
            if shared or not same or rng.random() < 0.8 or self.values[x].untyped_storage().data_ptr() in used:
                continue
            v = rng.choice(same)
            mine = self.values[v].dtype
            if mine is not spec.dtype and not (mine.is_floating_point and spec.dtype.is_floating_point):
                continue
            if self.values[v].untyped_storage().data_ptr() not in {
                self.values[f"x{j}"].untyped_storage().data_ptr() for j in range(len(self.inputs))
            }:
                writes.append((x, v))
        return Recipe(
            self.seed, tuple(self.inputs), tuple(self.statements), tuple(outputs[:6]), tuple(writes), self.dynamic
        )


def generate(seed: int) -> Recipe:
    """The program of a seed: one in four has dynamic sizes."""
    return Maker(seed, dynamic=seed % 4 == 3).recipe()
