"""The C text that generated kernels stand on: register types, and helpers `mf_*`, as far as a kernel uses them.

Registers are scalars or vectors of 16 lanes (`v_f32` …) whatever the machine. A pointwise helper is one lane
expression from a table. Its vector form is that expression in a `#pragma omp simd` loop over the lanes, which
gcc and clang turn into whole-register code at -O1 already (gcc 12 splits a comparison of vectors that are wider
than the machine's into scalars, so vector operators are not used for them); its scalar form is the expression
itself. Both have equal bits by construction. Transcendental functions are calls of a vector library, and
their scalar form calls the same function. No header is included: reading one costs more than the compile.

bool is 0/-1 in an int32 lane, 0/1 in memory; bf16 and f16 are float lanes already rounded to the format.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from string import Template

from minifuse.codegen.c_maths import INLINE, definition
from minifuse.codegen.c_rows import ARG_REDUCTIONS, HELPERS
from minifuse.codegen.c_tables import (
    FIXED,
    HEADER,
    MEMORY,
    OPERATORS,
    REDUCTIONS,
    REGISTERS,
    Register,
)
from minifuse.codegen.c_tiles import TILES

# What is one text for every dtype.
TEMPLATES = MEMORY | HELPERS | TILES

# Element-wise functions of the C library with a vector counterpart, and how many arguments they take.
_ONE_ARGUMENT = (
    "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "tan", "asin", "acos", "atan",
    "sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "erf", "erfc",
)  # fmt: skip
MATHS = dict.fromkeys(_ONE_ARGUMENT, 1) | {"pow": 2, "atan2": 2, "hypot": 2}

# What the two vector libraries must not be used for, and why. Measured with glibc 2.36 and torch 2.13's Sleef on
# AVX-512; ns an element, one thread. Special values of every other function agree with torch's.
AVOID = {
    ("libmvec", "exp"): "7 ns where half of the inputs are -inf or -1e9 (a masked softmax), Sleef 0.4",
    ("libmvec", "exp2"): "7 ns where half of the inputs are -inf, Sleef 0.3",
    ("sleef", "sinh"): "gives inf from 88.73 on, where the result is finite to 89.41",
    ("sleef", "cosh"): "gives inf from 88.73 on, where the result is finite to 89.41",
    ("sleef", "asinh"): "gives inf beyond 1e19 (float) and 1e154 (double)",
    ("sleef", "acosh"): "gives inf beyond 1e19 (float) and 1e154 (double)",
}
_SLEEF_ULP = {"erfc": "u15", "hypot": "u05"}


@dataclass(frozen=True)
class VectorAbi:
    """How the vector libraries spell an instruction set, and its register width in bytes."""

    libmvec: str
    width: int
    attribute: str = ""


ABIS = {
    "avx512": VectorAbi("_ZGVeN", 64),
    "avx2": VectorAbi("_ZGVdN", 32),
    "baseline": VectorAbi("_ZGVbN", 16),
    "neon": VectorAbi("_ZGVnN", 16, "__attribute__((aarch64_vector_pcs)) "),
}


@dataclass(frozen=True)
class MathCall:
    """A function to call: its library ("libmvec", "sleef", "libm"), symbol and lanes (1 is scalar)."""

    library: str
    symbol: str
    lanes: int


@dataclass(frozen=True)
class MathLibrary:
    """The vector functions that a machine has.

    `isa` is a key of `ABIS`; `symbols` holds those of `candidates(isa)` that can be linked; `precise`
    asks for Sleef's or libm's 1 ulp (erfc 1.5) instead of libmvec's 4.
    """

    isa: str
    symbols: frozenset[str] = frozenset()
    precise: bool = False

    def call(self, op: str, dtype: str) -> MathCall:
        """The function for `op` on `dtype` ("f32" or "f64"): libmvec, else Sleef, else libm lane by lane."""
        calls = [c for c in _vector_calls(self.isa, op, dtype) if c.symbol in self.symbols]
        wanted = [c for c in calls if (c.library, op) not in AVOID and not (self.precise and c.library == "libmvec")]
        if not wanted and not self.precise:
            # A slow vector function is better than none; a wrong one (Sleef's rows) is not.
            wanted = [c for c in calls if c.library == "libmvec"]
        return wanted[0] if wanted else MathCall("libm", op + REGISTERS[dtype].suffix, 1)

    def inlines(self, op: str, dtype: str) -> bool:
        """Whether generated code computes `op` itself: 3 ulp off, on a machine with fused multiply-adds."""
        return op in INLINE and dtype == "f32" and not self.precise and self.isa in ("avx512", "avx2", "neon")


def _vector_calls(isa: str, op: str, dtype: str) -> list[MathCall]:
    abi, reg = ABIS.get(isa), REGISTERS[dtype]
    if abi is None:
        return []
    lanes = abi.width * 8 // reg.bits
    letter = "f" if dtype == "f32" else "d"
    return [
        MathCall("libmvec", f"{abi.libmvec}{lanes}{'v' * MATHS[op]}_{op}{reg.suffix}", lanes),
        MathCall("sleef", f"Sleef_{op}{letter}{lanes}_{_SLEEF_ULP.get(op, 'u10')}", lanes),
    ]


def candidates(isa: str) -> dict[str, tuple[str, ...]]:
    """Library -> the symbols that `MathLibrary` may call on an instruction set."""
    found: dict[str, list[str]] = {"libmvec": [], "sleef": []}
    for op in MATHS:
        for dtype in ("f32", "f64"):
            for call in _vector_calls(isa, op, dtype):
                found[call.library].append(call.symbol)
    return {library: tuple(symbols) for library, symbols in found.items()}


_NAME = re.compile(r"\b(?:mf_\w+|[uv]_\w+)\b")
_PARTS = re.compile(r"mf_([a-z0-9]+)_(" + "|".join(REGISTERS) + r")(_s)?")
_CAST = re.compile(r"mf_cast_({0})_({0})(_s)?".format("|".join(REGISTERS)))
_LIBRARY = re.compile(r"mf_library_([a-z0-9]+)")
_SCAN = re.compile(r"mf_scan([a-z]+)_(" + "|".join(REGISTERS) + r")")
_HREDUCE = re.compile(r"mf_(hreduce)_([a-z]+)_(" + "|".join(REGISTERS) + r")")


def prelude(body: str, maths: MathLibrary) -> str:
    """The C declarations that `body` needs: each `v_*` type and `mf_*` helper in it, and what these use.

    A name that `body` declares itself (no helper of that name exists) is left alone.
    """
    emitted: dict[str, str] = {}

    def need(text: str) -> None:
        for name in _NAME.findall(text):
            if name in emitted:
                continue
            found = helper(name, maths)
            if found is not None:
                emitted[name] = ""  # claims the name; the text goes behind what it needs itself
                need(found)
                del emitted[name]
                emitted[name] = found

    need(body)
    return HEADER + "\n".join(emitted.values()) + "\n"


@lru_cache(maxsize=8192)
def helper(name: str, maths: MathLibrary) -> str | None:
    """The definition of one helper or type, or None when there is none of that name."""
    if name in FIXED:
        return FIXED[name]
    if name.startswith("v_"):
        return _vector_type(name[2:])
    if name.startswith("u_"):
        return _unaligned_type(name[2:])
    if m := _LIBRARY.fullmatch(name):
        return _maths(name, m[1], REGISTERS["f32"], False, maths)
    if m := _CAST.fullmatch(name):
        return _cast(name, REGISTERS[m[1]], REGISTERS[m[2]], bool(m[3]))
    if m := _HREDUCE.fullmatch(name):
        return _hreduce(name, m[2], REGISTERS[m[3]])
    if m := _SCAN.fullmatch(name):
        return _scan(name, m[1], REGISTERS[m[2]])
    if not (m := _PARTS.fullmatch(name)):
        return None
    op, reg, scalar = m[1], REGISTERS[m[2]], bool(m[3])
    if op in MATHS:
        if reg.kind != "f" or reg.half:
            return None
        if maths.inlines(op, reg.name):
            return _from_vector(name, reg, "a") if scalar else definition(op)
        return _maths(name, op, reg, scalar, maths)
    if op in OPERATORS:
        return _operator(name, op, reg, scalar)
    key = op + ("_s" if scalar else "")
    if key in ARG_REDUCTIONS:
        # True is -1 in a register, so that the order of bools is turned round.
        better = ">" if op.endswith("max") != (reg.kind == "b") else "<"
        return _fill(ARG_REDUCTIONS[key], reg, better=better, op=op.removeprefix("h"))
    text = TEMPLATES.get(key)
    return None if text is None else _fill(text, reg)


def _fill(template: str, reg: Register, **more: str) -> str:
    return Template(template).substitute(reg.fields, **more).strip()


def _vector_type(name: str) -> str | None:
    scalar = {"u64": "uint64_t", "u32": "uint32_t", "u16": "uint16_t"}.get(name)
    if scalar is None:
        if name not in REGISTERS:
            return None
        scalar = REGISTERS[name].scalar
    return f"typedef {scalar} v_{name} __attribute__((vector_size(16 * sizeof({scalar}))));"


def _unaligned_type(name: str) -> str | None:
    """A vector type for memory of a register type at any address."""
    if name not in REGISTERS:
        return None
    scalar = REGISTERS[name].scalar
    attributes = f"vector_size(16 * sizeof({scalar})), aligned(sizeof({scalar})), may_alias"
    return f"typedef {scalar} u_{name} __attribute__(({attributes}));"


def _define(name: str, result: str, params: list[tuple[str, str]], expr: str, scalar: bool) -> str:
    """A helper from a lane expression: over 16 lanes, or the expression itself. `params`: (dtype, argument)."""
    if scalar:
        args = ", ".join(f"{REGISTERS[t].scalar} {a}" for t, a in params)
        text = re.sub(r"\{(\w)\}", r"\1", expr)
        return f"MF {REGISTERS[result].scalar} {name}({args}) {{ return {text}; }}"
    args = ", ".join(f"v_{t} {a}" for t, a in params)
    text = re.sub(r"\{(\w)\}", r"\1[l]", expr)
    return f"MF v_{result} {name}({args}) {{ v_{result} r; MF_LANES r[l] = {text}; return r; }}"


def _operator(name: str, op: str, reg: Register, scalar: bool) -> str | None:
    row = OPERATORS[op]
    expr = row.by_kind.get(reg.kind)
    if expr is None:
        return None
    params = [(reg.name, a) for a in "ab"[: row.arity]]
    if op == "where":
        params = [("bool", "m"), *params]
    return _define(name, "bool" if row.compares else reg.name, params, _fill(expr, reg), scalar)


def _cast(name: str, a: Register, b: Register, scalar: bool) -> str:
    """torch's CPU conversions: a float to a narrow integer goes through int32, to a half through float."""
    if b.half and a.name != b.name:
        if scalar:
            return f"MF float {name}({a.scalar} a) {{ return {name[:-2]}(mf_splat_{a.name}(a))[0]; }}"
        x = "a" if a.scalar == "float" else f"mf_cast_{a.name}_f32(a)"
        return f"MF v_{b.name} {name}(v_{a.name} a) {{ return mf_rounded_{b.name}({x}); }}"
    if b.kind == "b":
        expr = "{a}" if a.kind == "b" else "{a} != 0 ? -1 : 0"
    elif a.kind == "b":
        expr = f"({b.scalar})({{a}} & 1)"
    elif a.kind == "f" and b.kind == "i" and b.bits < 32:
        expr = f"({b.scalar})(int32_t){{a}}"
    else:
        expr = f"({b.scalar}){{a}}"
    return _define(name, b.name, [(a.name, "a")], expr, scalar)


def _hreduce(name: str, combine: str, reg: Register) -> str | None:
    """One scalar from 16 lanes by halves: lane p with p+8, then p+4, p+2, p+1."""
    expr = _combining(combine, reg)
    if expr is None:
        return None
    lines, source = [], "x"
    for half in (8, 4, 2):
        pair = expr.replace("{a}", f"{source}[l]").replace("{b}", f"{source}[l + {half}]")
        lines.append(f"{reg.scalar} h{half}[{half}]; MF_SIMD for (int l = 0; l < {half}; l++) h{half}[l] = {pair};")
        source = f"h{half}"
    last = expr.replace("{a}", "h2[0]").replace("{b}", "h2[1]")
    # Out of line: inlined twice into each of 48 norm-like kernels it is a fifth of their compile time.
    return f"MF_ONCE {reg.scalar} {name}(v_{reg.name} x) {{ {' '.join(lines)} return {last}; }}"


def _scan(name: str, combine: str, reg: Register) -> str | None:
    """Running results over 16 lanes and what came before them: lane p with p-1, p-2, p-4, p-8, then with `*before`,
    which is a double where `combine` begins with `wide`."""
    combine, wide = combine.removeprefix("wide"), combine.startswith("wide")
    expr = _combining(combine, reg)
    if expr is None:
        return None
    lines = []
    for step in (1, 2, 4, 8):
        moved = ", ".join(str(max(p - step, 0)) for p in range(16))
        pair = expr.replace("{a}", "y[l]").replace("{b}", "x[l]")
        lines.append(f"y = __builtin_shufflevector(x, x, {moved}); MF_LANES x[l] = l < {step} ? x[l] : {pair};")
    v, kept = f"v_{reg.name}", "double" if wide else reg.scalar
    after, last = (expr.replace("{a}", "was").replace("{b}", f"({kept})x[{at}]") for at in ("15", "l"))
    lines.append(f"const {kept} was = *before; *before = {after}; MF_LANES x[l] = {last}; return x;")
    return f"MF {v} {name}({v} x, {kept}* before) {{ {v} y; {' '.join(lines)} }}"


def _combining(combine: str, reg: Register) -> str | None:
    """The lane expression of `{a}` and `{b}` by which a reduction joins two results; None where there is none."""
    expr = REDUCTIONS.get(combine) or (OPERATORS[combine].by_kind.get(reg.kind) if combine in OPERATORS else None)
    return None if expr is None else _fill(expr, reg)


def _from_vector(name: str, reg: Register, names: str) -> str:
    """The scalar form as lane 0 of the vector form."""
    args = ", ".join(f"{reg.scalar} {a}" for a in names)
    splats = ", ".join(f"mf_splat_{reg.name}({a})" for a in names)
    return f"MF {reg.scalar} {name}({args}) {{ return {name[:-2]}({splats})[0]; }}"


def _maths(name: str, op: str, reg: Register, scalar: bool, maths: MathLibrary) -> str:
    call = maths.call(op, reg.name)
    names = "ab"[: MATHS[op]]
    if call.lanes == 1 and maths.precise and reg.name == "f32":
        # libm's float sinh and its like are off by up to 2 ulp; rounded from double they are not.
        tail = "_s" if scalar else ""
        args = ", ".join(f"mf_cast_f32_f64{tail}({a})" for a in names)
        declared = ", ".join(f"{reg.scalar if scalar else 'v_f32'} {a}" for a in names)
        result = reg.scalar if scalar else "v_f32"
        return f"MF {result} {name}({declared}) {{ return mf_cast_f64_f32{tail}(mf_{op}_f64{tail}({args})); }}"
    if call.lanes == 1:
        declared = f"{reg.scalar} {call.symbol}({', '.join([reg.scalar] * len(names))});\n"
        expr = f"{call.symbol}({', '.join('{%s}' % a for a in names)})"
        # The scalar form declares nothing twice: C allows a repeated declaration.
        return declared + _define(name, reg.name, [(reg.name, a) for a in names], expr, scalar)
    if scalar:
        return _from_vector(name, reg, names)
    part = f"part_{reg.name}"
    attribute = ABIS[maths.isa].attribute if call.library == "libmvec" else ""
    text = (
        f"typedef {reg.scalar} {part} __attribute__((vector_size({call.lanes * reg.bits // 8})));\n"
        f"{attribute}{part} {call.symbol}({', '.join([part] * len(names))});\n"
    )
    args = ", ".join(f"v_{reg.name} {a}" for a in names)
    if call.lanes == 16:
        return text + f"MF v_{reg.name} {name}({args}) {{ return {call.symbol}({', '.join(names)}); }}"
    count = 16 // call.lanes
    parts = [f"{part} p{a}[{count}]; __builtin_memcpy(p{a}, &{a}, sizeof p{a});" for a in names]
    calls = [f"pa[{k}] = {call.symbol}({', '.join(f'p{a}[{k}]' for a in names)});" for k in range(count)]
    out = f"v_{reg.name} r; __builtin_memcpy(&r, pa, sizeof r); return r;"
    return text + f"MF v_{reg.name} {name}({args}) {{ {' '.join([*parts, *calls, out])} }}"
