"""What generated C computes in line: its error over all magnitudes, and its bits on two instruction sets."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from minifuse.codegen.c_maths import COEFFICIENTS, INLINE
from minifuse.codegen.c_prelude import prelude
from minifuse.runtime import toolchain

TOOLS = toolchain.find()


def _inputs() -> torch.Tensor:
    """Every 3,001st float: all exponents, infinities and NaN, with zeros of both signs."""
    bits = torch.arange(-(2**31), 2**31, 3001, dtype=torch.int64).to(torch.int32)
    x = torch.cat([bits.view(torch.float32), torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan])])
    return torch.nn.functional.pad(x, (0, -x.numel() % 16))


def _run(tools: toolchain.Toolchain, path: Path, x: torch.Tensor) -> dict[str, torch.Tensor]:
    body = "".join(
        f"""
__attribute__((visibility("default"))) void {op}(const float* x, float* y, int64_t n) {{
  for (int64_t i = 0; i < n; i += 16) mf_store_f32(y + i, mf_{op}_f32(mf_load_f32(x + i)));
}}"""
        for op in INLINE
    )
    path.write_bytes(toolchain.compile_shared(prelude(body, tools.maths) + body, tools))
    lib = toolchain.load(path)
    out = {op: torch.empty_like(x) for op in INLINE}
    for op, y in out.items():
        lib[op](ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), ctypes.c_int64(x.numel()))
    return out


@pytest.mark.skipif(TOOLS is None or TOOLS.isa not in ("avx512", "avx2", "neon"), reason="no fused multiply-adds")
def test_a_function_in_line_is_within_three_units_of_the_last_place_and_the_same_on_avx2(tmp_path: Path) -> None:
    assert TOOLS is not None
    x = _inputs()
    got = _run(TOOLS, tmp_path / "unit.so", x)
    for op, y in got.items():
        exact = getattr(torch, op)(x.double())
        rounded = exact.float()
        assert torch.equal(y.isnan(), rounded.isnan())
        assert torch.equal(y.signbit()[x == 0], rounded.signbit()[x == 0]), op
        finite = rounded.isfinite()
        assert torch.equal(y[~finite].nan_to_num(0.0), rounded[~finite].nan_to_num(0.0)), op
        exponent = torch.frexp(exact.abs().clamp_min(torch.finfo(torch.float32).tiny))[1]
        error = ((y.double() - exact).abs() * torch.exp2(24 - exponent.double()))[finite]
        assert error.max() <= 3, (op, error.max(), x[finite][error.argmax()])
    if TOOLS.isa != "avx512":
        pytest.skip("one instruction set only")
    macros = toolchain._macros(TOOLS.compiler, ("-march=haswell",))
    assert macros is not None
    other = _run(toolchain._toolchain(TOOLS.compiler, ("-march=haswell",), macros, False), tmp_path / "avx2.so", x)
    within = x.abs() <= 2**16  # beyond, a cosine is the vector library's
    for op, y in got.items():
        assert torch.equal(y[within].view(torch.int32), other[op][within].view(torch.int32)), op


def test_the_coefficients_are_those_that_the_script_fits() -> None:
    path = Path(__file__).parents[2] / "docs" / "fit_maths.py"
    spec = importlib.util.spec_from_file_location("fit_maths", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for name, fitted in script.table().items():
        # The last are the least certain: rounding in the fit reaches their fifth digit.
        np.testing.assert_allclose(COEFFICIENTS[name], fitted, rtol=1e-3)
