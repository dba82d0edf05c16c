"""Random graphs of pointwise operators, reductions and views over a few shapes: what fusion is asked most.

They are `generate`'s programs with fewer operators, one dtype and one palette of sizes, so that the kernels of unfused
plans are the same few over and over, and a thousand programs compile in a minute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .generate import Maker, Recipe
from .inputs import Input, make

SIZES = (16, 33)


class Fusible(Maker):
    """A program whose operators all are, or could be, part of a fused kernel."""

    float_unary = (
        ("torch.relu({0})", "same"), ("-{0}", "same"), ("{0} + 0.5", "same"), ("torch.sigmoid({0})", "loose"),
        ("torch.exp(-{0}.abs())", "loose"), ("torch.tanh({0})", "loose"),
    )  # fmt: skip
    float_binary = (
        ("{0} + {1}", "same"), ("{0} - {1}", "same"), ("{0} * {1}", "same"), ("torch.maximum({0}, {1})", "same"),
        ("{0} / ({1}.abs() + 1)", "same"),
    )  # fmt: skip
    reduce_floats = (
        ("torch.sum({0}, $dims, keepdim=$keep)", "loose", 1), ("torch.mean({0}, $dims, keepdim=$keep)", "loose", 1),
        ("torch.amax({0}, $dims, keepdim=$keep)", "same", 1), ("torch.softmax({0}, $dim)", "loose", 1),
        ("torch.var({0}, $dims, correction=0, keepdim=$keep)", "loose", 1),
    )  # fmt: skip

    lengths = (3, 4, 6, 8)

    def __init__(self, seed: int) -> None:
        super().__init__(seed, dynamic=False)
        self.special, self.most, self.palette = False, 20_000, list(SIZES)

    def new_input(self, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None, values: str = "") -> str:
        """Contiguous float32 of the palette's sizes."""
        if shape is None:
            shape = [self.rng.choice(SIZES) for _ in range(self.rng.choice((1, 2, 2, 2)))]
        name = f"x{len(self.inputs)}"
        self.inputs.append(Input(tuple(shape), torch.float32, values="normal"))
        self.values[name] = make(self.inputs[-1], self.seed * 1000 + len(self.inputs) - 1, None)
        self.exact.add(name)
        return name

    def kinds(self) -> list[tuple[Callable[[], None], int]]:
        return [(self.unary, 20), (self.binary, 30), (self.view, 14), (self.join, 6), (self.reduce, 20)]


def fusible(seed: int) -> Recipe:
    """The graph of a seed."""
    return Fusible(seed).recipe()
