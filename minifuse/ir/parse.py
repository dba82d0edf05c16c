"""Reads kernels as `text.py` prints them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch

from . import dtypes, ops, shape
from .index import Atom, Axis, Expr, Sym
from .kernel import Check, Kernel, Loop, Param, Root, Schedule, Store
from .shape import contiguous_strides
from .value import Cast, Const, Index, IndexOf, Load, Op, Pick, Random, Reduce, Scan, Value

T = TypeVar("T")
_SPACES = re.compile(r"\s*")
_WORD = re.compile(r"[A-Za-z_]\w*")
_INTEGER = re.compile(r"-?\d+")
_LITERAL = re.compile(r"(True|False|nan|-?inf|-?\d+(\.\d*)?(e[+-]?\d+)?)(?!\w)")
_STRING = re.compile(r'"(\\.|[^"\\])*"')


@dataclass(frozen=True)
class Parsed:
    """What a kernel's text says: the kernel, the schedule if it has one, the name, and what a batch runs over: the
    buffers of all its tensors in turn, and a row of sizes for each."""

    name: str
    kernel: Kernel
    schedule: Schedule | None
    binding: tuple[str, ...] = ()
    sizes: tuple[tuple[tuple[Sym, Expr], ...], ...] = ((),)


@dataclass(frozen=True)
class _Bare:
    """A literal whose dtype its neighbours know."""

    value: Any


class _Reader:
    """A line and a place in it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def fail(self, expected: str) -> NoReturn:
        raise ValueError(f"expected {expected}, found {self.text[self.at :][:30] or 'the end of the line'!r}")

    def match(self, pattern: re.Pattern[str]) -> str | None:
        self.at = _SPACES.match(self.text, self.at).end()  # type: ignore[union-attr]
        found = pattern.match(self.text, self.at)
        if found is None:
            return None
        self.at = found.end()
        return found.group()

    def need(self, pattern: re.Pattern[str], what: str) -> str:
        found = self.match(pattern)
        return self.fail(what) if found is None else found

    def accept(self, mark: str) -> bool:
        """Take a mark, or a whole word, if it comes next."""
        return self.match(re.compile(re.escape(mark) + (r"\b" if mark[-1].isalnum() else ""))) is not None

    def expect(self, *marks: str) -> None:
        for mark in marks:
            if not self.accept(mark):
                self.fail(repr(mark))

    def word(self, what: str = "a name") -> str:
        return self.need(_WORD, what)

    def integer(self) -> int:
        return int(self.need(_INTEGER, "an integer"))

    def peek(self) -> str:
        self.match(_SPACES)
        return self.text[self.at : self.at + 1]

    def raw(self) -> str:
        """The text up to the comma or the bracket that ends it."""
        depth, start = 0, self.at
        while self.at < len(self.text):
            c = self.text[self.at]
            if depth == 0 and c in ",)]":
                break
            depth += (c in "([") - (c in ")]")
            self.at += 1
        return self.text[start : self.at].strip()

    def raws(self) -> list[str]:
        """The entries of `[a, b]`."""
        self.expect("[")
        out = self.entries(self.raw, "]")
        self.expect("]")
        return out

    def entries(self, read: Callable[[], T], *ends: str) -> list[T]:
        """What stands between commas, up to one of some marks, which may be the end of the line."""
        out: list[T] = []
        while self.peek() not in ends:
            if out:
                self.expect(",")
            out.append(read())
        return out

    def some(self, read: Callable[[], T]) -> list[T]:
        """What stands between commas, one at least, as long as a comma comes."""
        out = [read()]
        while self.accept(","):
            out.append(read())
        return out

    def end(self) -> None:
        if self.peek():
            self.fail("the end of the line")


class _Parser:
    """The names that the lines of one kernel have defined so far."""

    def __init__(self) -> None:
        self.name = ""
        self.header = ""
        self.atoms: dict[str, Atom] = {}
        self.axes: list[Axis] = []
        self.params: dict[str, Param] = {}
        self.values: dict[str, Value] = {}
        self.body: list[Root] = []
        self.schedule: Schedule | None = None
        self.binding: list[str] = []
        self.sizes: list[tuple[tuple[Sym, Expr], ...]] = []

    def expr(self, text: str) -> Expr:
        try:
            return shape.parse(text, self.atoms)
        except SyntaxError:
            raise ValueError(f"expected an integer expression, found {text!r}") from None

    # -- lines -----------------------------------------------------------------------------------
    def line(self, text: str) -> None:
        r = _Reader(text)
        rules: Mapping[str, Callable[[_Reader], None]] = {
            "kernel": self.kernel_line,
            "sizes": self.sizes_line,
            "param": self.param_line,
            "store": self.store_line,
            "check": self.check_line,
            "schedule": self.schedule_line,
            "over": self.over_line,
        }
        word = r.word("a line of a kernel")
        if r.peek() == ":" and word not in self.values:
            self.value_line(word, r)
        elif word in rules:
            if word not in ("kernel", "sizes"):
                self.define_axes()
            rules[word](r)
        else:
            r.fail(f"a line that starts with one of {', '.join(rules)}, or a new value")
        r.end()

    def kernel_line(self, r: _Reader) -> None:
        self.name = r.need(re.compile(r"\S+"), "a kernel's name")
        self.header, r.at = r.text[r.at :].strip(), len(r.text)

    def sizes_line(self, r: _Reader) -> None:
        for sym in r.some(lambda: self.symbol(r)):
            self.atoms[sym.name] = sym

    def symbol(self, r: _Reader) -> Sym:
        low = r.match(_INTEGER)
        if low is not None:
            r.expect("<=")
        name = r.word("a symbol")
        r.expect(">=" if low is None else "<=")
        return Sym(name, r.integer()) if low is None else Sym(name, int(low), r.integer())

    def define_axes(self) -> None:
        """The header's axes, read once the symbols below it are known."""
        header, self.header = _Reader(self.header), ""
        self.axes += header.entries(lambda: self.new_axis(header), "")
        self.atoms.update((a.name, a) for a in self.axes)

    def new_axis(self, r: _Reader) -> Axis:
        name = r.word("an axis")
        r.expect("<")
        return Axis(name, self.expr(r.raw()))

    def param_line(self, r: _Reader) -> None:
        name = r.word("a parameter")
        r.expect(":")
        dtype = self.dtype(r)
        shape = tuple(map(self.expr, r.raws()))
        stride = tuple(map(self.expr, r.raws())) if r.accept("strides") else contiguous_strides(shape)
        self.params[name] = Param(name, dtype, shape, stride)

    def value_line(self, name: str, r: _Reader) -> None:
        self.define_axes()
        r.expect(":")
        dtype = self.dtype(r)
        axes = r.raws() if r.peek() == "[" else []
        r.expect("=")
        v = self.value(r, dtype)
        found = [a.name for a in self.axes if a in v.axes]
        if v.dtype is not dtype or sorted(found) != sorted(axes):
            raise ValueError(
                f"{name} is declared {dtypes.name(dtype)}{axes}, its value is {dtypes.name(v.dtype)}{found}"
            )
        self.values[name] = v

    def store_line(self, r: _Reader) -> None:
        name = r.word("a parameter")
        at = tuple(map(self.entry, r.raws()))
        mode = "" if r.peek() == "=" else r.word("a mode")
        r.expect("=")
        value = self.value(r, self.param(name).dtype)
        over = self.axis(r) if r.accept("over") else None
        self.body.append(Store(name, at, value, self.value(r, torch.bool) if r.accept("if") else None, mode, over))

    def check_line(self, r: _Reader) -> None:
        condition = self.value(r, torch.bool)
        self.body.append(Check(condition, json.loads(r.need(_STRING, "a message in double quotes"))))

    def schedule_line(self, r: _Reader) -> None:
        loops = [] if r.accept("scalar") else r.some(lambda: self.loop(r))
        held: list[Value] = []
        past: list[str] = []
        warps = 0
        while r.accept(";"):
            if r.accept("held"):
                held = r.some(lambda: self.value(r, None))
            elif r.accept("warps"):
                warps = r.integer()
            else:
                r.expect("past")
                past = r.some(lambda: r.word("a parameter"))
        self.schedule = Schedule(tuple(loops), tuple(held), tuple(past), warps)

    def loop(self, r: _Reader) -> Loop:
        axis = self.axis(r)
        r.expect(":")
        kind = r.word("grid, loop or lane")
        if kind not in ("grid", "loop", "lane"):
            raise ValueError(f"a loop is grid, loop or lane, found {kind!r}")
        return Loop(axis, kind, r.integer() if r.accept("tile") else 1)  # type: ignore[arg-type]

    def over_line(self, r: _Reader) -> None:
        buffers = r.entries(lambda: r.word("a buffer"), ";", "")
        self.binding += buffers
        if len(buffers) != len(self.params):
            raise ValueError(f"{len(buffers)} buffers for {len(self.params)} parameters")
        row: list[tuple[Sym, Expr]] = []
        while r.accept(";"):
            name = r.word("a size")
            symbol = self.atoms.get(name)
            if not isinstance(symbol, Sym):
                raise ValueError(f"no size {name!r} above this line")
            r.expect("=")
            text, _, rest = r.text[r.at :].partition(";")
            row.append((symbol, self.expr(text.strip())))
            r.at = len(r.text) - len(rest) - bool(rest)
        self.sizes.append(tuple(row))

    # -- parts of a line -------------------------------------------------------------------------
    def dtype(self, r: _Reader) -> torch.dtype:
        name = r.word("a dtype")
        if name not in dtypes.BY_NAME:
            raise ValueError(f"no dtype {name!r}; known: {', '.join(dtypes.BY_NAME)}")
        return dtypes.BY_NAME[name]

    def param(self, name: str) -> Param:
        if name not in self.params:
            raise ValueError(f"no parameter {name!r}; known: {', '.join(self.params)}")
        return self.params[name]

    def axis(self, r: _Reader) -> Axis:
        name = r.word("an axis")
        found = self.atoms.get(name)
        if not isinstance(found, Axis):
            raise ValueError(f"no axis {name!r}; known: {', '.join(a.name for a in self.axes)}")
        return found

    def entry(self, text: str) -> Index:
        return self.values[text] if text in self.values else self.expr(text)

    def value(self, r: _Reader, dtype: torch.dtype | None) -> Value:
        """A value; `dtype` is that of a bare literal, None where one may not stand."""
        v = self.value_or_bare(r)
        if isinstance(v, Value):
            return v
        if isinstance(v.value, bool):
            return Const.of(v.value, torch.bool)
        if dtype is None:
            raise ValueError(f"nothing here says the dtype of {v.value}: write const(DTYPE, {v.value})")
        return Const.of(v.value, dtype)

    def value_or_bare(self, r: _Reader) -> Value | _Bare:
        text = r.match(_LITERAL)
        if text is not None:
            return _Bare(_literal(text))
        name = r.word("a value")
        if name in self.values:
            return self.values[name]
        if name == "load":
            return self.load(r)
        if r.peek() != "(":
            raise ValueError(f"no value {name!r} above this line")
        r.expect("(")
        rules: Mapping[str, Callable[[_Reader], Value]] = {
            "const": self.const,
            "cast": self.cast,
            "index": self.index,
            "random": self.random,
            "reduce": self.reduce,
            "scan": self.scan,
            "pick": self.pick,
        }
        v = rules[name](r) if name in rules else self.op(name, r)
        r.expect(")")
        return v

    def load(self, r: _Reader) -> Value:
        param = self.param(r.word("a parameter"))
        at = tuple(map(self.entry, r.raws()))
        if " else " not in r.text or not r.accept("if"):  # a store may have a mask behind what it loads
            return Load.of(param.name, at, param.dtype)
        mask = self.value(r, torch.bool)
        r.expect("else")
        return Load.of(param.name, at, param.dtype, mask, self.value(r, param.dtype))

    def const(self, r: _Reader) -> Value:
        dtype = self.dtype(r)
        r.expect(",")
        return Const.of(_literal(r.need(_LITERAL, "a literal")), dtype)

    def cast(self, r: _Reader) -> Value:
        dtype = self.dtype(r)
        r.expect(",")
        return Cast.of(dtype, self.value(r, None))

    def index(self, r: _Reader) -> Value:
        first = r.raw()
        if not r.accept(","):
            return IndexOf.of(self.expr(first))
        return IndexOf.of(self.expr(r.raw()), self.dtype(_Reader(first)))

    def random(self, r: _Reader) -> Value:
        kind = r.word("uniform, normal or bits")
        r.expect(",", "seed")
        seed = self.value(r, torch.int64)
        r.expect(",", "offset")
        offset = r.integer()
        r.expect(",", "index")
        return Random.of(kind, seed, offset, self.expr(r.raw()))  # type: ignore[arg-type]

    def reduce(self, r: _Reader) -> Value:
        kind = r.word("a reduction")
        args: list[Value] = []
        r.expect(",")
        while not r.accept("over"):
            args.append(self.value(r, None))
            r.expect(",")
        over = self.axis(r)
        r.expect(",", "lanes")
        return Reduce.of(kind, args, over, r.integer())

    def scan(self, r: _Reader) -> Value:
        kind = r.word("a scan")
        r.expect(",")
        arg = self.value(r, None)
        r.expect(",", "over")
        over = self.axis(r)
        r.expect(",", "lanes")
        return Scan.of(kind, arg, over, r.integer())

    def pick(self, r: _Reader) -> Value:
        v = self.value(r, None)
        if not isinstance(v, Reduce):
            raise ValueError(f"a pick takes a reduction, found {v!r}")
        r.expect(",")
        return Pick.of(v, r.integer())

    def op(self, name: str, r: _Reader) -> Value:
        where = ops.row(name).rule == "where"
        found = r.entries(lambda: self.value_or_bare(r), ")")
        dtype = next((v.dtype for v in found[where:] if isinstance(v, Value)), None)
        if dtype is None and all(isinstance(v, _Bare) and isinstance(v.value, bool) for v in found[where:]):
            dtype = torch.bool
        args = []
        for n, v in enumerate(found):
            if isinstance(v, _Bare):
                known = torch.bool if where and n == 0 else dtype
                if known is None:
                    raise ValueError(f"nothing here says the dtype of {v.value}: write const(DTYPE, {v.value})")
                v = Const.of(v.value, known)
            args.append(v)
        return Op.of(name, *args)


def _literal(text: str) -> Any:
    if text in ("True", "False"):
        return text == "True"
    return int(text) if _INTEGER.fullmatch(text) else float(text)


def parse(text: str) -> Parsed:
    """Read what `print_kernel` prints. Raises ValueError with the line and what it lacks."""
    parser = _Parser()
    for n, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        try:
            parser.line(stripped)
        except (ValueError, TypeError, KeyError, IndexError) as e:
            raise ValueError(f"line {n}: {e.args[0]}: {stripped}") from e
    parser.define_axes()
    kernel = Kernel(tuple(parser.axes), tuple(parser.params.values()), tuple(parser.body))
    return Parsed(parser.name, kernel, parser.schedule, tuple(parser.binding), tuple(parser.sizes) or ((),))


def parse_kernel(text: str) -> Kernel:
    """The kernel of a text. Raises ValueError with the line and what it lacks."""
    return parse(text).kernel
