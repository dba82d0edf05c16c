"""The fusions that models live by: as many kernels as the pattern needs, and the same bits as without fusion."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.judge import compiled, records, same


def modulated(x: Tensor, scale: Tensor, shift: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """AdaLN: a norm that is scaled, shifted and gated by a condition, behind a residual."""
    return x + gate.unsqueeze(1) * (F.layer_norm(y, (256,)) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1))


def residual(x: Tensor, y: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    sum_ = x + F.dropout(y, 0.1)
    return F.layer_norm(sum_, (768,), w, b), sum_


def entropy(x: Tensor) -> Tensor:
    return F.cross_entropy(x, torch.arange(x.shape[0]) % x.shape[1])


ROWS, WIDTH = (1024, 768), (768,)
# The kernels of the forward and of the backward. A sum of columns that rides along with work on rows is taken by
# chunks of rows, and a second kernel joins the chunks'.
PATTERNS: dict[str, tuple[Callable[..., object], list[tuple[int, ...]], int, int]] = {
    "layer norm": (lambda x, w, b: F.layer_norm(x, WIDTH, w, b), [ROWS, WIDTH, WIDTH], 1, 2),
    "rms norm": (lambda x, w: F.rms_norm(x, WIDTH, w), [ROWS, WIDTH], 1, 2),
    "group norm and silu": (lambda x, w, b: F.silu(F.group_norm(x, 8, w, b)), [(8, 64, 32, 32), (64,), (64,)], 1, 3),
    "adaptive layer norm": (modulated, [(8, 128, 256), (8, 256), (8, 256), (8, 256), (8, 128, 256)], 1, 2),
    "swiglu": (lambda a, b: F.silu(a) * b, [(1024, 2048), (1024, 2048)], 1, 1),
    "dropout, residual, layer norm": (residual, [ROWS, ROWS, WIDTH, WIDTH], 1, 2),
    "softmax": (lambda x: (x * 0.125).softmax(-1), [(64, 128, 128)], 1, 1),
    "cross entropy": (entropy, [(256, 32_768)], 2, 1),
    "bias and gelu": (lambda x, b: F.gelu(x + b), [ROWS, WIDTH], 1, 2),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_is_as_many_kernels_as_it_needs(name: str) -> None:
    fn, shapes, forward, backward = PATTERNS[name]
    torch.manual_seed(0)
    args = [torch.randn(s, requires_grad=True) for s in shapes]
    found = []
    for options in ({}, {"fusion_fuel": 0}):
        torch.manual_seed(1)
        out = compiled(fn, options)(*args)
        first = out[0] if isinstance(out, tuple) else out
        found.append([out, *torch.autograd.grad(first, args, torch.ones_like(first), allow_unused=True)])
        if not options:
            counts = {stage: len(records(stage)[0].stages["memory"].launches) for stage in ("forward", "backward")}
            assert counts == {"forward": forward, "backward": backward}
    same(*found, exact=True)
