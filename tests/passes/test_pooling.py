"""Pooling in kernels: eager's values and places, in every layout and dtype, whatever was fused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.judge import check, compiled, externs, kernels, records, same

NAN, LOW = float("nan"), float("-inf")


def image(*shape: int, layout: torch.memory_format = torch.channels_last) -> Tensor:
    return torch.randn(*shape).contiguous(memory_format=layout).requires_grad_()


def pools(x: Tensor) -> list[Tensor]:
    return [
        F.avg_pool2d(x, (3, 2), 2, 1),
        F.avg_pool2d(x, 3, (1, 2), 1, ceil_mode=True, count_include_pad=False),
        F.avg_pool2d(x, 3, 2, 1, True),
        F.avg_pool2d(x, 4, 3, divisor_override=-3),
        F.avg_pool2d(x, 9, 1, 4),
        F.max_pool2d(x, 3, 2, 1),
        F.max_pool2d(x, 2, ceil_mode=True),
        *F.max_pool2d(x, 3, 1, 1, (2, 1), return_indices=True),
        F.adaptive_avg_pool2d(x, (3, 11)),
        *F.adaptive_max_pool2d(x, (9, 2), return_indices=True),
    ]


def test_pools_of_channels_last_and_their_gradients_are_kernels() -> None:
    x = image(2, 4, 9, 22)
    check(pools, x)
    # sums of 81 elements overlap too much to be written out backwards
    assert externs() == ["aten.avg_pool2d_backward.default"]


def test_pools_of_planes_and_of_one_image_equal_eager() -> None:
    check(lambda x, y: [*pools(x), *pools(y)], image(2, 3, 9, 22, layout=torch.contiguous_format),
          torch.randn(3, 9, 22, requires_grad=True))  # fmt: skip
    assert {name.removesuffix(".default") for name in externs()} == {
        "aten.avg_pool2d_backward", "aten.max_pool2d_with_indices_backward", "aten.adaptive_max_pool2d_backward",
    }  # fmt: skip


def test_pools_of_lines_and_of_volumes_equal_eager() -> None:
    def f(line: Tensor, volume: Tensor) -> list[Tensor]:
        lines = F.avg_pool1d(line, 3, 2, 1), F.max_pool1d(line, 3, 2, 1), F.adaptive_avg_pool1d(line, 6)
        volumes = F.avg_pool3d(volume, 2, 1, 1), F.max_pool3d(volume, (1, 2, 3), 2), F.adaptive_avg_pool3d(volume, 2)
        return [*lines, *volumes]

    check(f, torch.randn(2, 3, 12, requires_grad=True), image(2, 3, 4, 6, 8, layout=torch.channels_last_3d))


def test_the_first_of_equals_and_the_last_nan_win() -> None:
    x = torch.randint(0, 3, (2, 3, 10, 12)).float()
    x[0, 0, 2:5, 3:7] = NAN
    x[0, 1] = LOW
    x[0, 2, ::2] = -0.0

    def f(x: Tensor) -> list[Tensor]:
        found = [F.max_pool2d(v, 3, 2, 1, 2, return_indices=True) for v in (x, x.double(), x.half(), x.bfloat16())]
        whole = [
            F.max_pool2d(v, 2, return_indices=True) for v in (x.nan_to_num().int(), x.nan_to_num().to(torch.uint8))
        ]
        return [t for pair in found + whole for t in pair]

    got = check(f, x, exact=True)
    assert torch.equal(got[0].signbit(), F.max_pool2d(x, 3, 2, 1, 2).signbit())
    assert externs() == []


@pytest.mark.parametrize("target", ["c", "interpret"])
def test_fusion_changes_no_bit_of_a_pool(target: str) -> None:
    x = image(2, 4, 8, 10)

    def f(x: Tensor) -> list[Tensor]:
        y = F.relu(x * 1.5)
        return [F.max_pool2d(y, 3, 2, 1).sin() + 1, F.avg_pool2d(y, 2) * F.adaptive_avg_pool2d(x, (4, 5))]

    def run(fuel: int | None) -> list[Tensor]:
        out = compiled(f, {"target": target, "fusion_fuel": fuel})(x)
        return [*out, *torch.autograd.grad(out, x, [o.detach() for o in out])]

    fused = run(None)
    few = kernels()
    same(fused, run(0), exact=True)
    assert few < kernels()


def test_a_pool_runs_with_what_stands_around_it() -> None:
    check(lambda x: F.avg_pool2d(x + 1, 2).relu() * 2, torch.randn(2, 4, 8, 8))
    assert kernels() == 1


def test_half_precision_pools_round_once() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        x = image(2, 4, 8, 10).detach().to(dtype).requires_grad_()
        check(lambda x: [F.avg_pool2d(x, 3, 1, 1), F.max_pool2d(x, 3, 1, 1), F.adaptive_avg_pool2d(x, 2)], x)


def test_one_compile_serves_pools_of_many_sizes() -> None:
    def f(x: Tensor) -> list[Tensor]:
        return [F.max_pool2d(x, 3, 2, 1), F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), F.avg_pool2d(x, 2)]

    run = compiled(f, dynamic=True)
    for shape in ((2, 3, 8, 10), (3, 5, 7, 9), (4, 2, 12, 6)):
        x = torch.randn(shape, requires_grad=True)
        got, want = run(x), f(x)
        same(got, want)
        mine, eager = (torch.autograd.grad(out, x, [o.detach() for o in want]) for out in (got, want))
        same(mine, eager)
    assert len(records("forward")) == 1


def test_what_pools_leave_to_aten_says_why() -> None:
    x = torch.randn(2, 4, 9, 10)
    check(lambda x: [F.adaptive_avg_pool2d(x, 4), F.max_pool2d(x, 9, 1, 4)], x)
    reasons = {str(e.reason) for r in records() for e in r.stages["memory"].externs}
    assert reasons == {
        "an adaptive pooling by windows of several lengths", "a maximum over windows of more than 64 elements",
    }  # fmt: skip


def test_borders_are_copied_by_aten_on_a_cpu() -> None:
    x = torch.randn(2, 3, 6, 7, requires_grad=True)
    check(lambda x: [F.pad(x, (2, 1, 1, 3), mode=mode) * 2 for mode in ("reflect", "replicate")], x)
    names = [f"aten.{kind}_pad2d" for kind in ("reflection", "replication")]
    assert sorted(externs()) == sorted(f"{name}{way}.default" for name in names for way in ("", "_backward"))
