"""Products and convolutions: a compiled call beside eager's, and what other libraries and layouts would take.

    python -m benchmarks.products [--quick] [--json FILE] [--check]

Each row is one operator of a layer, float32, on all threads: `eager` and `minifuse` are a call of it as Dynamo captures
it, run as it is and compiled (by the library that this machine showed to be faster), `onednn` a call of oneDNN's by
weights as they lie, `packed` by weights that were laid out for it ahead, `channels last` a call with images and filters
in that order. Medians of interleaved rounds; a figure is missing where there is no such form.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from minifuse import compat

from . import harness, models
from .harness import Board, Column, Target

Calls = dict[str, Callable[[], Any]]
# Rows, terms and columns. `x @ w.t()` is a layer, `g @ w` its input's gradient, `g.t() @ x` its weight's.
PRODUCTS = {
    "layer 1 x 2048 x 2048": ("layer", 1, 2048, 2048),
    "layer 8 x 768 x 3072": ("layer", 8, 768, 3072),
    "layer 64 x 2048 x 2048": ("layer", 64, 2048, 2048),
    "layer 512 x 256 x 256": ("layer", 512, 256, 256),
    "layer 1024 x 256 x 1024": ("layer", 1024, 256, 1024),
    "layer 512 x 768 x 3072": ("layer", 512, 768, 3072),
    "layer 512 x 256 x 8192": ("layer", 512, 256, 8192),
    "input's gradient 512 x 3072 x 768": ("input", 512, 3072, 768),
    "input's gradient 1024 x 1024 x 256": ("input", 1024, 1024, 256),
    "weight's gradient 1024 x 512 x 768": ("weight", 1024, 512, 768),
}
# Images, channels, height and width, filters, their size, groups.
CONVOLUTIONS = {
    "convolution 1 x 1, 64 of 56 x 56": (4, 64, 56, 64, 1, 1),
    "convolution 3 x 3, 64 of 56 x 56": (4, 64, 56, 64, 3, 1),
    "convolution 3 x 3, 128 of 28 x 28": (4, 128, 28, 128, 3, 1),
    "convolution 3 x 3, 512 of 7 x 7": (4, 512, 7, 512, 3, 1),
    "convolution 7 x 7 a channel, 128 of 14 x 14": (4, 128, 14, 128, 7, 128),
}
QUICK = ("layer 8 x 768 x 3072", "layer 512 x 768 x 3072", "convolution 3 x 3, 64 of 56 x 56")


def board() -> Board:
    names = ("eager", "minifuse", "onednn", "packed", "channels last")
    return Board(
        "Matrix products and convolutions", [*map(Column, names), Column("vs eager", harness.ratio, Target(">=", 0.98))]
    )


def compiled(function: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """A function as Dynamo captures it, run as it is, and compiled: both pay for guards."""
    torch._dynamo.reset()
    eager, ours = (torch.compile(function, backend=models.resolve(b), dynamic=False) for b in ("dynamo", "minifuse"))
    return eager, ours


def product(kind: str, rows: int, terms: int, columns: int) -> Calls:
    """The forms of a product of `rows` x `terms` by `terms` x `columns`."""
    x, w = torch.randn(rows, terms), torch.randn(columns, terms)
    if kind == "weight":
        x = torch.randn(terms, rows).t()
    if kind != "layer":
        w = torch.randn(terms, columns).t()
    eager, ours = compiled(lambda x, w: x @ w.t())
    calls: Calls = {"eager": lambda: eager(x, w), "minifuse": lambda: ours(x, w)}
    if compat.LINEAR is not None:
        calls["onednn"] = lambda: compat.LINEAR(x, w, None, "none", [], "")
        if kind == "layer":
            packed = torch.ops.mkldnn._reorder_linear_weight(w, rows)
            calls["packed"] = lambda: compat.LINEAR(x, packed, None, "none", [], "")
    return calls


def convolution(images: int, channels: int, size: int, filters: int, window: int, groups: int) -> Calls:
    """The forms of a convolution that keeps an image's size."""
    x, w, b = (
        torch.randn(images, channels, size, size),
        torch.randn(filters, channels // groups, window, window),
        torch.randn(filters),
    )
    pad = window // 2
    last, turned = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
    eager, ours = compiled(lambda x, w, b: F.conv2d(x, w, b, 1, pad, 1, groups))
    calls: Calls = {
        "eager": lambda: eager(x, w, b),
        "minifuse": lambda: ours(x, w, b),
        "channels last": lambda: F.conv2d(last, turned, b, 1, pad, 1, groups),
    }
    if torch.backends.mkldnn.is_available():
        form: tuple[Any, ...] = ([pad, pad], [1, 1], [1, 1], groups)
        packed = torch.ops.mkldnn._reorder_convolution_weight(w, *form, list(x.shape))
        calls["packed"] = lambda: torch.ops.mkldnn._convolution_pointwise(x, packed, b, *form, "none", [], "")
    return calls


def main() -> int:
    options = harness.arguments(__doc__).parse_args()
    table, rounds = board(), 15 if options.quick else 41
    makers: dict[str, Callable[[], Calls]] = {n: lambda a=a: product(*a) for n, a in PRODUCTS.items()}  # type: ignore[misc]
    makers |= {n: lambda a=a: convolution(*a) for n, a in CONVOLUTIONS.items()}  # type: ignore[misc]
    for name, make in makers.items():
        if options.quick and name not in QUICK:
            continue
        torch.manual_seed(0)
        with torch.no_grad():
            samples = harness.interleaved(make(), rounds)
        table.add(name, **{k.replace(" ", "_"): sample for k, sample in samples.items()},
                  vs_eager=samples["eager"].median / samples["minifuse"].median)  # fmt: skip
    return harness.finish(table, options)


if __name__ == "__main__":
    sys.exit(main())
