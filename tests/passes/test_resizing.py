"""Resizing in kernels: enlargements by powers of two and their gradients, which gather; the rest is ATen's, whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.judge import check, compiled, externs, kernels, same


def image(*shape: int, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    return torch.randn(*shape).contiguous(memory_format=layout).requires_grad_()


def enlarged(x: Tensor) -> list[Tensor]:
    return [
        F.interpolate(x, scale_factor=2),
        F.interpolate(x, scale_factor=(4, 2), mode="nearest-exact"),
        F.interpolate(x, scale_factor=2, mode="bilinear"),
        F.interpolate(x, size=(x.shape[2] * 4, x.shape[3]), mode="bilinear"),
    ]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["planes", "channels last"])
def test_enlargements_and_their_gradients_are_kernels(layout: torch.memory_format) -> None:
    x = image(2, 3, 5, 6, layout=layout)
    got = check(enlarged, x)
    assert not externs()
    same(compiled(enlarged, {"fusion_fuel": 0})(x), got, exact=True)


def test_lines_and_volumes() -> None:
    def f(line: Tensor, volume: Tensor) -> list[Tensor]:
        lines = F.interpolate(line, scale_factor=2), F.interpolate(line, scale_factor=4, mode="linear")
        return [*lines, F.interpolate(volume, scale_factor=2), F.interpolate(volume, scale_factor=2, mode="trilinear")]

    check(f, image(2, 3, 5), image(1, 2, 3, 4, 5))
    assert not externs()


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_gradient_from_many_elements_is_a_loop_over_planes(dynamic: bool) -> None:
    def f(x: Tensor, line: Tensor, volume: Tensor) -> list[Tensor]:
        wide = F.interpolate(x, scale_factor=(16, 4), mode="bilinear")
        square = F.interpolate(x.sin(), scale_factor=8, mode="bilinear")
        lines = F.interpolate(line, scale_factor=64, mode="linear")
        return [square, wide, lines, F.interpolate(volume, scale_factor=4, mode="trilinear")]

    if dynamic:
        check(
            lambda x: F.interpolate(x, scale_factor=8, mode="bilinear"), image(2, 3, 5, 6), dynamic=True, tolerance=1e-4
        )
        return
    for height, width in ((5, 6), (1, 1)):
        x, line, volume = image(2, 3, height, width), image(2, 3, 5), image(1, 2, 2, 3, height)
        got = check(f, x, line, volume, tolerance=1e-4)
        assert not externs()
        same(compiled(f, {"fusion_fuel": 0})(x, line, volume), got, exact=True)
    apart = image(2, 3, 5, 6, layout=torch.channels_last)
    check(lambda x: F.interpolate(x, scale_factor=8, mode="bilinear"), apart, tolerance=1e-4)
    assert [name for name in externs() if "backward" in name]


def test_what_is_no_enlargement_by_a_power_of_two_is_atens_and_says_why() -> None:
    def f(x: Tensor) -> list[Tensor]:
        return [
            F.interpolate(x, size=(7, 9)),
            F.interpolate(x, scale_factor=3, mode="bilinear"),
            F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True),
            F.interpolate(x, scale_factor=2, mode="bicubic"),
            F.interpolate(x, scale_factor=1.5, mode="bilinear", antialias=True),
        ]

    check(f, image(2, 3, 5, 6))
    assert {name.split(".")[1].removesuffix("_backward") for name in externs()} == {
        "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa",
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.uint8])
def test_dtypes(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 4, 6).mul(9).abs().to(dtype)
    check(lambda x: [F.interpolate(x, scale_factor=2), F.interpolate(x, scale_factor=2, mode="bilinear")], x)


def test_sizes_that_change() -> None:
    def f(x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2) + F.interpolate(x, scale_factor=2, mode="bilinear")

    run = compiled(f, dynamic=True)
    for height, width in ((5, 6), (8, 3), (12, 16)):
        x = torch.randn(2, 3, height, width)
        same(run(x), f(x), tolerance=1e-5)


def test_an_enlargement_fuses_with_what_feeds_and_reads_it() -> None:
    check(lambda x, y: F.interpolate(F.silu(x), scale_factor=2) + y, torch.randn(2, 3, 5, 6), torch.randn(2, 3, 10, 12))
    assert kernels() == 1
