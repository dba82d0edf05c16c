from __future__ import annotations

import ctypes
import dataclasses
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from minifuse.codegen.c_prelude import prelude
from minifuse.errors import CompileError, MinifuseError
from minifuse.runtime import toolchain

TOOLS = toolchain.find()
needs_compiler = pytest.mark.skipif(TOOLS is None, reason="no C compiler")
PARALLEL = """
extern void GOMP_parallel(void (*fn)(void*), void* data, unsigned threads, unsigned flags);
extern int omp_get_thread_num(void);
struct work { float* x; int64_t n; };
static void part(void* data) {
  struct work* w = data;
  int64_t half = w->n / 2, at = omp_get_thread_num() ? half : 0;
  for (int64_t i = at; i < at + half; i += 16) mf_store_f32(w->x + i, mf_tanh_f32(mf_exp_f32(mf_load_f32(w->x + i))));
}
__attribute__((visibility("default"))) void run(float* x, int64_t n) {
  struct work w = {x, n};
  GOMP_parallel(part, &w, 2, 0);
}
"""


def test_the_toolchain_is_found_once() -> None:
    assert toolchain.find() is toolchain.find()


def test_an_empty_name_means_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIFUSE_CC", "")
    assert toolchain.find() is None


@pytest.fixture
def unasked() -> Iterator[None]:
    """No compiler was looked for, and nothing said, by an earlier test."""
    for cached in (toolchain._find, toolchain._warn_unusable):
        cached.cache_clear()
    yield
    toolchain._find.cache_clear()


@pytest.mark.usefixtures("unasked")
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("/nonexistent/cc", "no program"),
        ("false", "does not preprocess"),
        ("true", "does not preprocess"),
        ("'gcc", "No closing quotation"),
    ],
)
def test_a_compiler_that_does_not_work_is_none_and_one_warning(
    monkeypatch: pytest.MonkeyPatch, name: str, why: str
) -> None:
    monkeypatch.setenv("MINIFUSE_CC", name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert toolchain.find() is toolchain.find(precise=True) is None
    (said,) = [str(w.message) for w in caught]
    assert f"$MINIFUSE_CC is {name!r}" in said and why in said and "expected" in said


@needs_compiler
@pytest.mark.usefixtures("unasked")
@pytest.mark.parametrize("name", ["false", "true", "/nonexistent/cc", "'gcc"])
def test_a_broken_cc_is_said_and_falls_back_to_the_next(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delenv("MINIFUSE_CC", raising=False)
    monkeypatch.setenv("CC", name)
    with pytest.warns(UserWarning, match=r"tries cc, gcc and clang: \$CC is"):
        assert toolchain.find() is not None


@needs_compiler
def test_a_compiler_that_writes_no_library_is_an_error() -> None:
    assert TOOLS is not None
    idle = dataclasses.replace(TOOLS, compiler=("true",))
    with pytest.raises(CompileError, match="exited with 0 and wrote no library"):
        toolchain.compile_shared("int x;", idle)


@needs_compiler
def test_an_error_of_the_compiler_carries_command_words_and_source() -> None:
    assert TOOLS is not None
    with pytest.raises(CompileError, match="nonsense") as caught:
        toolchain.compile_shared("int f(void) { return nonsense; }", TOOLS)
    assert isinstance(caught.value, MinifuseError)
    assert TOOLS.compiler[0] in caught.value.command and "nonsense" in caught.value.source


@needs_compiler
def test_a_compile_that_takes_too_long_is_an_error_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert TOOLS is not None
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    slow = dataclasses.replace(TOOLS, compiler=(sys.executable, "-c", "import time; time.sleep(60)"))
    with pytest.raises(CompileError, match="no result"):
        toolchain.compile_shared("int x;", slow, timeout=0.2)
    assert os.listdir(tmp_path) == []


@needs_compiler
def test_a_parallel_kernel_runs_on_torch_s_openmp_runtime_alone(tmp_path: Path) -> None:
    assert TOOLS is not None and TOOLS.openmp
    before = toolchain.mapped_openmp()
    path = tmp_path / "unit.so"
    path.write_bytes(toolchain.compile_shared(prelude(PARALLEL, TOOLS.maths) + PARALLEL, TOOLS))
    x = torch.randn(64)
    y = x.clone()
    toolchain.load(path).run(ctypes.c_void_p(y.data_ptr()), ctypes.c_int64(64))
    torch.testing.assert_close(y, x.exp().tanh())
    if sys.platform == "linux":
        assert toolchain.mapped_openmp() == before and len(before) == 1


@needs_compiler
def test_a_cached_library_loads_in_a_new_process(tmp_path: Path) -> None:
    assert TOOLS is not None
    path = tmp_path / "unit.so"
    path.write_bytes(toolchain.compile_shared(prelude(PARALLEL, TOOLS.maths) + PARALLEL, TOOLS))
    script = f"from minifuse.runtime import toolchain as t; t.load({str(path)!r}).run; print(len(t.mapped_openmp()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=os.getcwd())
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1" or sys.platform != "linux"


@needs_compiler
@pytest.mark.parametrize("target", ["haswell", "x86-64"])
def test_units_for_lesser_machines_compile_and_agree(tmp_path: Path, target: str) -> None:
    assert TOOLS is not None
    if TOOLS.isa not in ("avx512", "avx2"):
        pytest.skip("not an x86-64 machine with AVX2")
    macros = toolchain._macros(TOOLS.compiler, (f"-march={target}",))
    assert macros is not None
    tools = toolchain._toolchain(TOOLS.compiler, (f"-march={target}",), macros, False)
    assert tools.isa == {"haswell": "avx2", "x86-64": "baseline"}[target]
    body = """
__attribute__((visibility("default"))) void run(
    const float* x, float* y, _Float16* h, uint16_t* b, float* u, int64_t* d, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    v_f32 v = mf_load_f32(x + i);
    mf_store_f32(y + i, mf_where_f32(mf_lt_f32(v, mf_splat_f32(0.5f)), mf_tanh_f32(v), mf_floor_f32(v)));
    mf_store_f16(h + i, mf_cast_f32_f16(mf_cast_f16_f32(mf_cast_f32_f16(v))));
    mf_store_bf16(b + i, mf_cast_f32_bf16(v));
    mf_store_f32(u + i, mf_uniform(5, 1, mf_iota_i64() + i));
    mf_store_i64(d + i, mf_cast_f32_i64(v));
  }
}
__attribute__((visibility("default"))) void back(const _Float16* h, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) mf_store_f32(y + i, mf_cast_f16_f32(mf_load_f16(h + i)));
}
"""
    path = tmp_path / "unit.so"
    path.write_bytes(toolchain.compile_shared(prelude(body, tools.maths) + body, tools))
    lib = toolchain.load(path)
    bits = torch.randint(-(2**31), 2**31 - 1, (1 << 14,), dtype=torch.int32).view(torch.float32)
    halves = torch.arange(1 << 16, dtype=torch.int32).sub(1 << 15).to(torch.int16).view(torch.float16)
    x = torch.cat([bits, torch.randn(1 << 14), torch.randn(1 << 14) * 1e-6, halves.float() * (1 + 2**-12)])
    y, u, n = torch.empty_like(x), torch.empty_like(x), x.numel()
    h, b = torch.empty(n, dtype=torch.float16), torch.empty(n, dtype=torch.bfloat16)
    d = torch.empty(n, dtype=torch.int64)
    lib.run(*(ctypes.c_void_p(t.data_ptr()) for t in (x, y, h, b, u, d)), ctypes.c_int64(n))
    torch.testing.assert_close(y, torch.where(x < 0.5, x.tanh(), x.floor()), equal_nan=True)
    for got, dtype in ((h, torch.float16), (b, torch.bfloat16)):
        expected = x.to(dtype)
        assert ((got.view(torch.int16) == expected.view(torch.int16)) | (got.isnan() & expected.isnan())).all()
    assert torch.equal(d, x.to(torch.int64))
    assert u.min() >= 0 and u.max() < 1 and abs(u.mean() - 0.5) < 0.01
    wide = torch.empty(halves.numel())
    lib.back(ctypes.c_void_p(halves.data_ptr()), ctypes.c_void_p(wide.data_ptr()), ctypes.c_int64(halves.numel()))
    assert ((wide == halves.float()) | (wide.isnan() & halves.isnan())).all()
