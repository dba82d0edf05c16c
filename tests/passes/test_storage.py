"""Formats of storage: floats of 8 bits, integers with a scale, two numbers a byte; read and written by kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.ao.quantization.fx._decomposed  # defines quantized_decomposed
from torch import Tensor

from tests.judge import check, compiled, externs, kernels

FLOATS = [torch.float8_e4m3fn, torch.float8_e5m2]
quantised = torch.ops.quantized_decomposed


def edges() -> Tensor:
    """Any bits of float32, ordinary numbers, and those where a format of 8 bits rounds, ends or becomes denormal."""
    bits = torch.randint(-(2**31), 2**31 - 1, (4000,)).to(torch.int32).view(torch.float32)
    inf, nan = torch.inf, torch.nan
    special = [0.0, inf, nan, 448, 464, 464.1, 479, 480, 481, 57344, 61439, 61440, 65535, 65536]
    small = [2**-9, 2**-10, 2**-10 * 1.0001, 3 * 2**-10, 2**-16, 2**-17, 3 * 2**-17, 2**-6, 2**-14]
    at = torch.tensor([*special, *small])
    return torch.cat([bits, at, -at, *(torch.randn(500) * s for s in (1e-4, 1e-2, 1, 300, 4e4))])


@pytest.mark.parametrize("target", ["c", "interpret"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_floats_of_8_bits_are_rounded_as_in_eager(dtype: torch.dtype, target: str) -> None:
    x = edges()
    for source in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        y = x.to(source)
        got = compiled(lambda y: (y * 1).to(dtype), {"target": target})(y)
        assert torch.equal(got.view(torch.uint8), (y * 1).to(dtype).view(torch.uint8))
        codes = torch.arange(256, dtype=torch.uint8).view(dtype)
        check(lambda q, s=source: (q.to(s) * 2, q.to(s).to(dtype).float()), codes, options={"target": target})
        assert not externs()


@pytest.mark.parametrize("dtype", FLOATS)
def test_floats_of_8_bits_are_stored_and_scaled_in_one_kernel(dtype: torch.dtype) -> None:
    def fn(q: Tensor, scale: Tensor) -> Tensor:
        return (q.float() * scale).abs().to(dtype)

    args = torch.randn(33, 50).to(dtype), torch.rand(50)
    assert torch.equal(compiled(fn)(*args).view(torch.uint8), fn(*args).view(torch.uint8))
    assert kernels() == 1 and not externs()


def int4(q: Tensor, scale: Tensor) -> Tensor:
    low, high = (q & 15).to(torch.int8) - 8, (q >> 4).to(torch.int8) - 8
    return torch.stack([low, high], -1).reshape(q.shape[0], -1).to(torch.bfloat16) * scale


X, BYTES = torch.randn(6, 8, requires_grad=True), torch.randint(0, 255, (6, 8), dtype=torch.uint8)
INTS, SCALES, ZEROS = BYTES.view(torch.int8), torch.rand(8) + 0.1, torch.randint(-3, 3, (8,))
QUANTISED: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "two a byte": (int4, (BYTES, torch.rand(16).bfloat16())),
    "int8": (lambda q, s, z: (q.float() - z) * s, (INTS, SCALES, ZEROS)),
    "there and back": (lambda x: quantised.dequantize_per_tensor(
        quantised.quantize_per_tensor(x, 0.07, 3, -128, 127, torch.int8), 0.07, 3, -128, 127, torch.int8),
        (X.detach(),)),
    "by channel": (lambda x, s, z: quantised.dequantize_per_channel(
        quantised.quantize_per_channel(x, s, z, 1, 0, 255, torch.uint8), s, z, 1, 0, 255, torch.uint8),
        (X.detach(), SCALES, ZEROS)),
    "for training": (lambda x: torch.fake_quantize_per_tensor_affine(x, 0.07, 3, -8, 7), (X,)),
    "for training by channel": (lambda x, s, z: torch.fake_quantize_per_channel_affine(x, s, z, 1, -8, 7),
                                (X, SCALES, ZEROS.int())),
}  # fmt: skip


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_numbers_are_kernels_and_eagers(name: str) -> None:
    fn, args = QUANTISED[name]
    check(fn, *args, exact=True)
    assert not externs() and kernels() <= 2
