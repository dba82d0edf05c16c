"""The C helpers against torch: one unit with every helper for every dtype, and one with precise maths."""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch

from minifuse.codegen.c_prelude import ABIS, MATHS, MathLibrary, candidates, helper, prelude
from minifuse.codegen.c_tables import REGISTERS
from minifuse.ir import dtypes, ops
from minifuse.runtime import toolchain

TOOLS = toolchain.find()
pytestmark = pytest.mark.skipif(TOOLS is None, reason="no C compiler")
LANES = 16
NAMES = [t for t in dtypes.BY_NAME if t not in dtypes.BYTE_FLOATS]  # which torch compares and counts nowhere
OPS = [(op, t) for op, row in ops.TABLE.items() if row.c.startswith("@") for t in NAMES
       if REGISTERS[t].kind in row.kinds and (row.rule != "same" or not REGISTERS[t].half)]  # fmt: skip
COMBINES = ("add", "mul", "maximum", "minimum", "or", "and")


def _op_functions(op: str, t: str) -> str:
    row, s = ops.row(op), REGISTERS[t].storage
    result = "bool" if row.rule == "bool" else t
    types = ["bool" if row.rule == "where" and k == 0 else t for k in range(row.arity)]
    params = ", ".join(f"const {REGISTERS[x].storage}* a{k}" for k, x in enumerate(types))
    out = "uint8_t" if result == "bool" else s
    vector = ", ".join(f"mf_loadn_{x}(a{k} + i, m)" for k, x in enumerate(types))
    scalar = ", ".join(f"mf_load_{x}_s(a{k} + i)" for k, x in enumerate(types))
    return f"""
EXPORT void v_op_{op}_{t}({params}, {out}* o, int64_t n) {{
  for (int64_t i = 0; i < n; i += 16) {{
    int64_t m = n - i < 16 ? n - i : 16;
    mf_storen_{result}(o + i, mf_{op}_{t}({vector}), m);
  }}
}}
EXPORT void s_op_{op}_{t}({params}, {out}* o, int64_t n) {{
  for (int64_t i = 0; i < n; i++) mf_store_{result}_s(o + i, mf_{op}_{t}_s({scalar}));
}}"""


def _cast_functions(a: str, b: str) -> str:
    sa, sb = REGISTERS[a].storage, REGISTERS[b].storage
    return f"""
EXPORT void v_cast_{a}_{b}(const {sa}* a, {sb}* o, int64_t n) {{
  for (int64_t i = 0; i < n; i += 16) mf_store_{b}(o + i, mf_cast_{a}_{b}(mf_load_{a}(a + i)));
}}
EXPORT void s_cast_{a}_{b}(const {sa}* a, {sb}* o, int64_t n) {{
  for (int64_t i = 0; i < n; i++) mf_store_{b}_s(o + i, mf_cast_{a}_{b}_s(mf_load_{a}_s(a + i)));
}}"""


def _memory_functions(t: str) -> str:
    s = REGISTERS[t].storage
    return f"""
EXPORT void copyn_{t}(const {s}* a, {s}* o, int64_t n) {{ mf_storen_{t}(o, mf_loadn_{t}(a, n), n); }}
EXPORT void rest_{t}(const {s}* a, {s}* o, int64_t n) {{ mf_store_{t}(o, mf_loadn_{t}(a, n)); }}
EXPORT void strided_{t}(const {s}* a, {s}* o, int64_t n) {{ mf_stores_{t}(o, mf_loads_{t}(a, 3, n), 2, n); }}
EXPORT void indexed_{t}(const {s}* a, {s}* o, const int64_t* at, int64_t n) {{
  v_i64 i = mf_loadn_i64(at, n); mf_scatter_{t}(o, i, mf_gather_{t}(a, i, n), n);
}}
EXPORT void masked_{t}(const {s}* a, {s}* o, const int64_t* at, const uint8_t* mask, int64_t n) {{
  v_i64 i = mf_loadn_i64(at, n);
  mf_storen_{t}(o, mf_gatherm_{t}(a, i, mf_loadn_bool(mask, n), mf_splat_{t}(mf_load_{t}_s(a)), n), n);
}}"""


def _arg_functions(t: str) -> str:
    s, r = REGISTERS[t].storage, REGISTERS[t].scalar
    return "".join(
        f"""
EXPORT void {op}_{t}(const {s}* a, int64_t n, {s}* o, int64_t* at) {{
  v_{t} v = mf_load_{t}(a); v_i64 i = mf_iota_i64(); {r} x;
  for (int64_t k = 16; k < n; k += 16) mf_{op}_{t}(&v, &i, mf_load_{t}(a + k), mf_iota_i64() + k);
  mf_h{op}_{t}(v, i, &x, at); mf_store_{t}_s(o, x);
}}"""
        for op in ("argmax", "argmin")
    )


def _hreduce_function(combine: str, t: str) -> str:
    s = REGISTERS[t].storage
    value = f"mf_hreduce_{combine}_{t}(mf_load_{t}(a))"
    return f"EXPORT void h_{combine}_{t}(const {s}* a, {s}* o) {{ mf_store_{t}_s(o, {value}); }}"


RANDOM = "".join(
    f"""
EXPORT void r_{kind}(int64_t seed, uint64_t offset, const int64_t* at, {c}* o, {c}* s, int64_t n) {{
  for (int64_t i = 0; i < n; i += 16) mf_store_{t}(o + i, mf_{kind}(seed, offset, mf_load_i64(at + i)));
  for (int64_t i = 0; i < n; i++) s[i] = mf_{kind}_s(seed, offset, at[i]);
}}
EXPORT void run_{kind}(int64_t seed, uint64_t offset, int64_t begin, {c}* o) {{
  mf_store_{t}(o, mf_{kind}_run(seed, offset, begin));
}}"""
    for kind, t, c in (("uniform", "f32", "float"), ("normal", "f32", "float"), ("bits", "i64", "int64_t"))
)
HREDUCES = [(c, t) for c in COMBINES for t in NAMES if not REGISTERS[t].half
            and REGISTERS[t].kind in (ops.row(c).kinds) and (c not in ("add", "mul") or t != "bool")]  # fmt: skip


def _load(body: str, tools: toolchain.Toolchain, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    source = prelude(body, tools.maths) + '#define EXPORT __attribute__((visibility("default")))\n' + body
    path = tmp_path_factory.mktemp("unit") / "unit.so"
    path.write_bytes(toolchain.compile_shared(source, tools))
    return toolchain.load(path)


@pytest.fixture(scope="module")
def lib(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    assert TOOLS is not None
    parts = [_op_functions(op, t) for op, t in OPS]
    parts += [_cast_functions(a, b) for a in NAMES for b in NAMES]
    parts += [_memory_functions(t) + _arg_functions(t) for t in NAMES]
    parts += [_hreduce_function(c, t) for c, t in HREDUCES]
    return _load("\n".join([*parts, RANDOM]), TOOLS, tmp_path_factory)


@pytest.fixture(scope="module")
def precise_lib(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    tools = toolchain.find(precise=True)
    assert tools is not None
    return _load("\n".join(_op_functions(op, t) for op in MATHS for t in ("f32", "f64")), tools, tmp_path_factory)


def _call(function: ctypes._CFuncPtr, *args: torch.Tensor | int) -> None:
    function.restype = None
    function(*(ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else ctypes.c_int64(a) for a in args))


SPECIAL = [
    0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1.5, 2.5, -2.5, 3.0, 10.1, 88.7, 89.2, -87.4, -103.5, 1e5, -1e5, 65504.0, 65519.9,
    65520.0, 1e30, -1e30, 5e-8, 6e-8, -3e-8, 6.1e-5, 1e-40, -1e-40, 1.17e-38, 3.0e9, -3.0e9, 1e19, -1e19, 709.7, 300.0,
    -129.0, math.inf, -math.inf, math.nan,
]  # fmt: skip


def _values(dtype: torch.dtype, seed: int, count: int = 480) -> torch.Tensor:
    """Special values, then random ones of several magnitudes."""
    g = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.rand(count, generator=g) < 0.5
    if dtypes.is_float(dtype):
        scale = torch.tensor([0.1, 1.0, 10.0, 300.0]).repeat(count // 4)
        spread = torch.randn(count, generator=g, dtype=torch.float64) * scale
        return torch.cat([torch.tensor(SPECIAL, dtype=torch.float64), spread]).to(dtype)
    info = torch.iinfo(dtype)
    wide = torch.randint(info.min, info.max, (count,), generator=g, dtype=dtype)
    edges = torch.tensor(
        [info.min, info.min + 1, -1 if info.min else 1, 0, 1, 2, 7, info.max - 1, info.max], dtype=dtype
    )
    return torch.cat([edges, wide, torch.randint(max(info.min, -70), 71, (count,), generator=g, dtype=dtype)])


def _crossed(dtype: torch.dtype, arity: int) -> list[torch.Tensor]:
    """Arguments that meet each special value with each, then random values with random."""
    a, b = _values(dtype, 1), _values(dtype, 2)
    head = len(SPECIAL) if dtypes.is_float(dtype) else 9
    if dtype is torch.bool or arity == 1:
        return [a, b]
    left, right = a[:head].repeat_interleave(head), b[:head].repeat(head)
    return [torch.cat([left, a]), torch.cat([right, b])]


def _bits_equal(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Equal bit for bit, any NaN for any NaN."""
    if not a.is_floating_point():
        return a == b
    return ((a == b) & (a.signbit() == b.signbit())) | (a.isnan() & b.isnan())


def _ulps(got: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """The error in units in the last place of the result's dtype; infinite where one is not finite and they differ."""
    info, digits = torch.finfo(got.dtype), 24 if got.dtype is torch.float32 else 53
    rounded = exact.to(got.dtype)
    exponent = torch.frexp(exact.abs().clamp_min(info.tiny).clamp_max(info.max))[1].double()
    error = (got.double() - exact.double()).abs() * torch.exp2((digits - exponent).double().clamp_max(1000))
    same = (got == rounded) | (got.isnan() & rounded.isnan())
    # Where the exact value lies within a few units of the overflow threshold either answer is near.
    near = (
        (rounded.isinf() ^ got.isinf()) & (exact.abs() >= info.max * (1 - 4 * info.eps)) & (exact.sign() == got.sign())
    )
    finite = torch.isfinite(got) & torch.isfinite(rounded)
    return torch.where(same | near, 0.0, torch.where(finite, error, math.inf))


def _run(lib: ctypes.CDLL, prefix: str, op: str, t: str, args: list[torch.Tensor]) -> torch.Tensor:
    out = torch.empty(args[-1].numel(), dtype=torch.bool if ops.row(op).rule == "bool" else args[-1].dtype)
    _call(lib[f"{prefix}_op_{op}_{t}"], *args, out, out.numel())
    return out


@pytest.mark.parametrize(("op", "t"), OPS)
def test_an_operator_equals_torch_on_random_and_special_values_and_its_scalar_form_has_the_same_bits(
    lib: ctypes.CDLL, op: str, t: str
) -> None:
    row, dtype = ops.row(op), dtypes.BY_NAME[t]
    args = _crossed(dtype, row.arity)[: 1 if row.arity == 1 else 2]
    if row.rule == "where":
        args = [_values(torch.bool, 3, args[0].numel()), *args]
    got, scalar = _run(lib, "v", op, t, args), _run(lib, "s", op, t, args)
    assert _bits_equal(got, scalar).all()
    if op in ("truncdiv", "floordiv", "mod", "rem"):
        by_zero = args[1] == 0
        assert (got[by_zero] == 0).all() or op == "floordiv"
        keep = ~by_zero & ~((args[1] == -1) & (args[0] == torch.iinfo(dtype).min))
        args, got = [a[keep] for a in args], got[keep]
    if op in MATHS:
        assert _ulps(got, _exact(op, args)).max() <= row.ulp
    elif op == "logaddexp":  # the larger argument and the logarithm may cancel
        expected = row.meaning(*(a.double() for a in args))
        unit = torch.maximum(args[0].abs(), args[1].abs()).clamp_min(1).double() * torch.finfo(dtype).eps
        near = torch.isclose(got.double(), expected, rtol=0, atol=0, equal_nan=True)
        assert (near | ((got - expected).abs() <= row.ulp * unit)).all()
    else:
        # torch hands sqrt to MKL, which is an ulp off at times, and its fmod gives NaN for denormal divisors.
        meaning = {"sqrt": _numpy(np.sqrt), "fmod": _numpy(np.fmod)}.get(op, row.meaning)
        expected = meaning(*args)
        wrong = ~_bits_equal(got, expected)
        if op in ("maximum", "minimum"):
            wrong &= ~((got == 0) & (expected == 0))  # of two zeros either
        assert not wrong.any(), [(*(a[wrong][0] for a in args), got[wrong][0], expected[wrong][0])]


def _numpy(function: Callable[..., np.ndarray]) -> Callable[..., torch.Tensor]:
    def meaning(*args: torch.Tensor) -> torch.Tensor:
        with np.errstate(all="ignore"):
            return torch.from_numpy(function(*(a.numpy() for a in args)))

    return meaning


def _exact(op: str, args: list[torch.Tensor]) -> torch.Tensor:
    """In double for float; for double torch itself, which is within an ulp or so."""
    return ops.row(op).meaning(*(a.double() for a in args))


@pytest.mark.parametrize("t", ["f32", "f64"])
@pytest.mark.parametrize("op", MATHS)
def test_precise_maths_is_within_one_ulp(precise_lib: ctypes.CDLL, op: str, t: str) -> None:
    args = _crossed(dtypes.BY_NAME[t], MATHS[op])[: MATHS[op]]
    error = _ulps(_run(precise_lib, "v", op, t, args), _exact(op, args)).max()
    # torch's own double results, the reference for f64, are off by up to one themselves.
    assert error <= (1.5 if op == "erfc" else 1.001) + (t == "f64")


@pytest.mark.parametrize("a", NAMES)
@pytest.mark.parametrize("b", NAMES)
def test_a_cast_equals_torch(lib: ctypes.CDLL, a: str, b: str) -> None:
    x = _values(dtypes.BY_NAME[a], 5)
    x = x[: x.numel() // LANES * LANES]
    expected = x.to(dtypes.BY_NAME[b])
    for prefix in "vs":
        got = torch.empty_like(expected)
        _call(lib[f"{prefix}_cast_{a}_{b}"], x, got, x.numel())
        wrong = ~_bits_equal(got, expected)
        assert not wrong.any(), (prefix, x[wrong][0], got[wrong][0], expected[wrong][0])


@pytest.mark.parametrize("t", ["bf16", "f16"])
def test_every_half_survives_a_load_and_a_store(lib: ctypes.CDLL, t: str) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtypes.BY_NAME[t])
    out, wide = torch.empty_like(x), torch.empty(x.numel())
    _call(lib[f"v_cast_{t}_{t}"], x, out, x.numel())
    _call(lib[f"v_cast_{t}_f32"], x, wide, x.numel())
    assert _bits_equal(out, x).all() and _bits_equal(wide, x.float()).all()


@pytest.mark.parametrize("t", NAMES)
def test_a_tail_reads_and_writes_its_lanes_only(lib: ctypes.CDLL, t: str) -> None:
    dtype = dtypes.BY_NAME[t]
    x = _values(dtype, 7)[-96:].clone()
    for n in range(1, LANES + 1):
        before = _values(dtype, 8)[-96:].clone()
        out = before.clone()
        _call(lib[f"copyn_{t}"], x, out, n)
        assert _bits_equal(out[:n], x[:n]).all() and _bits_equal(out[n:], before[n:]).all()
        _call(lib[f"rest_{t}"], x, out, n)
        assert _bits_equal(out[:n], x[:n]).all() and (out[n:LANES] == 0).all()
        out = before.clone()
        _call(lib[f"strided_{t}"], x, out, n)
        expected = before.clone()
        expected[: 2 * n : 2] = x[: 3 * n : 3]
        assert _bits_equal(out, expected).all()
        at = torch.randperm(64, generator=torch.Generator().manual_seed(n))[:n]
        out, expected = before.clone(), before.clone()
        _call(lib[f"indexed_{t}"], x, out, at, n)
        expected[at] = x[at]
        assert _bits_equal(out, expected).all()
        mask = torch.rand(n, generator=torch.Generator().manual_seed(n)) < 0.5
        out, expected = before.clone(), before.clone()
        _call(lib[f"masked_{t}"], x, out, torch.where(mask, at, 2**60), mask, n)
        expected[:n] = torch.where(mask, x[at], x[0])
        assert _bits_equal(out, expected).all()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mprotect"), reason="needs mprotect")
@pytest.mark.parametrize("t", NAMES)
def test_a_tail_before_an_unmapped_page_does_not_fault(lib: ctypes.CDLL, t: str) -> None:
    libc, page = ctypes.CDLL(None), 4096
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
    base = libc.mmap(None, 2 * page, 3, 0x22, -1, 0)
    assert libc.mprotect(ctypes.c_void_p(base + page), page, 0) == 0
    out, size = torch.zeros(64, dtype=dtypes.BY_NAME[t]), dtypes.itemsize(dtypes.BY_NAME[t])
    for n in range(1, LANES + 1):
        end = ctypes.c_void_p(base + page - n * size)
        lib[f"copyn_{t}"](end, ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(n))
        lib[f"copyn_{t}"](ctypes.c_void_p(out.data_ptr()), end, ctypes.c_int64(n))
    libc.munmap(ctypes.c_void_p(base), ctypes.c_size_t(2 * page))


@pytest.mark.parametrize(("combine", "t"), HREDUCES)
def test_a_horizontal_reduction_joins_halves(lib: ctypes.CDLL, combine: str, t: str) -> None:
    x = _values(dtypes.BY_NAME[t], 11)[-LANES:].clone()
    meaning, out = ops.row(combine).meaning, torch.empty(1, dtype=x.dtype)
    _call(lib[f"h_{combine}_{t}"], x, out)
    tree = x
    while tree.numel() > 1:
        half = tree.numel() // 2
        tree = meaning(tree[:half], tree[half:])
    assert _bits_equal(out, tree).all()


def test_a_horizontal_sum_has_the_bits_of_the_same_tree_in_numpy(lib: ctypes.CDLL) -> None:
    x = np.random.default_rng(0).standard_normal(16).astype(np.float32)
    tree, out = x, torch.empty(1)
    for half in (8, 4, 2, 1):
        tree = tree[:half] + tree[half:]
    _call(lib["h_add_f32"], torch.from_numpy(x), out)
    assert out.numpy()[0] == tree[0]


@pytest.mark.parametrize("t", NAMES)
@pytest.mark.parametrize("op", ["argmax", "argmin"])
def test_an_argument_reduction_takes_the_first_best_and_nan_before_all(lib: ctypes.CDLL, op: str, t: str) -> None:
    dtype = dtypes.BY_NAME[t]
    for seed in range(6):
        x = _values(dtype, seed)[-64:].clone()
        if dtypes.is_float(dtype):
            x = x.round() if seed % 2 else x
            x[[20, 33]] = math.nan if seed == 4 else x.amax() if op == "argmax" else x.amin()
        out, at = torch.empty(1, dtype=dtype), torch.empty(1, dtype=torch.int64)
        _call(lib[f"{op}_{t}"], x, 64, out, at)
        wide = x.float() if dtype is torch.bool else x
        best = wide.amax() if op == "argmax" else wide.amin()
        first = (wide.isnan() if best.isnan() else wide == best).nonzero()[0]
        assert at == first and _bits_equal(out, x[first]).all()


def _random(lib: ctypes.CDLL, kind: str, seed: int, offset: int, index: torch.Tensor) -> torch.Tensor:
    out = torch.empty(index.numel(), dtype=torch.int64 if kind == "bits" else torch.float32)
    scalar = torch.empty_like(out)
    _call(lib[f"r_{kind}"], seed, offset, index, out, scalar, index.numel())
    assert torch.equal(out, scalar)
    return out


def _philox(seed: int, offset: int, index: int) -> tuple[int, ...]:
    low = 0xFFFFFFFF
    c, k = [index & low, index >> 32 & low, offset & low, offset >> 32 & low], [seed & low, seed >> 32 & low]
    for _ in range(10):
        x, y = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(y >> 32) ^ c[1] ^ k[0], y & low, (x >> 32) ^ c[3] ^ k[1], x & low]
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    return tuple(c)


def test_random_bits_are_philox_4x32_10(lib: ctypes.CDLL) -> None:
    # The known answers of Random123.
    assert _philox(0, 0, 0) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert _philox(-1, -1, -1) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    index = torch.cat([torch.arange(12), torch.tensor([2**34 - 1, 2**32, 2**40 + 5, 2**61 - 1])])
    for seed, offset in ((0, 0), (-1, -1), (0x299F31D0A4093822, 0x0370734413198A2E), (7, 2**33)):

        def stream(n: int, seed: int = seed, offset: int = offset) -> int:
            return _philox(seed, offset, n >> 2)[n % 4]

        bits = _random(lib, "bits", seed, offset, index)
        numbers = index.tolist()
        assert [int(b) & (2**64 - 1) for b in bits] == [stream(2 * n) | stream(2 * n + 1) << 32 for n in numbers]
        uniform = _random(lib, "uniform", seed, offset, index)
        assert uniform.tolist() == [(stream(n) >> 8) * 2.0**-24 for n in numbers]


@pytest.mark.parametrize("kind", ["uniform", "normal", "bits"])
def test_neighbours_that_share_blocks_draw_what_each_draws_alone(lib: ctypes.CDLL, kind: str) -> None:
    for begin in (0, 1, 2, 3, 4, 7, 2**34 - 2, 2**40 + 4):
        alone = _random(lib, kind, 77, 3, torch.arange(begin, begin + 16))
        together = torch.empty_like(alone)
        _call(lib[f"run_{kind}"], 77, 3, begin, together)
        assert torch.equal(alone, together)


def test_normal_numbers_follow_box_and_muller(lib: ctypes.CDLL) -> None:
    normal = _random(lib, "normal", 3, 1, torch.arange(1 << 16)).double()
    assert abs(normal.mean()) < 0.02 and abs(normal.std() - 1) < 0.02
    assert abs((normal.abs() < 1).double().mean() - 0.6827) < 0.01
    w = _philox(3, 1, 2)
    u1, u2 = ((w[2] >> 8) + 1) * 2.0**-24, (w[3] >> 8) * 2.0**-24
    assert normal[5] == pytest.approx(math.sqrt(-2 * math.log(u1)) * math.cos(2 * math.pi * u2), rel=1e-5)


def test_only_what_the_body_uses_is_defined() -> None:
    text = prelude("mf_abs_f32(x); my_mf_thing(); mf_unheard_of(y);", MathLibrary("scalar"))
    assert set(re.findall(r"\b(?:mf|v)_\w+", text)) == {"v_f32", "mf_abs_f32"}
    assert "#include" not in text
    assert "mf_" not in prelude("int x;", MathLibrary("scalar"))


def test_a_definition_comes_behind_what_it_uses() -> None:
    text = prelude("mf_normal_s(1, 2, 3)", MathLibrary("avx512", frozenset(sum(candidates("avx512").values(), ()))))
    positions = [text.index(f" {name}(") for name in ("mf_sqrt_f32", "mf_normal", "mf_normal_s")]
    assert positions == sorted(positions)


@pytest.mark.parametrize("isa", ABIS)
def test_a_missing_function_falls_back_to_the_next_library(isa: str) -> None:
    libraries = {name: frozenset(symbols) for name, symbols in candidates(isa).items()}
    both = libraries["libmvec"] | libraries["sleef"]
    assert MathLibrary(isa, both).call("tanh", "f32").library == "libmvec"
    assert MathLibrary(isa, both, precise=True).call("tanh", "f32").library == "sleef"
    assert MathLibrary(isa, both).call("exp", "f32").library == "sleef"
    assert MathLibrary(isa, libraries["libmvec"]).call("exp", "f32").library == "libmvec"
    assert MathLibrary(isa, libraries["sleef"]).call("tanh", "f32").library == "sleef"
    assert MathLibrary(isa, libraries["sleef"]).call("asinh", "f32").library == "libm"
    assert MathLibrary(isa).call("tanh", "f64").symbol == "tanh"


def test_a_helper_that_does_not_exist_is_none() -> None:
    assert helper("mf_shl_f32", MathLibrary("scalar")) is None
    assert helper("mf_exp_bf16", MathLibrary("scalar")) is None
    assert helper("v_complex", MathLibrary("scalar")) is None
