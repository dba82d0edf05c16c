"""Programs small enough to count their traffic by hand: what both compilers' accounts are checked against.

Each is a callable without arguments that returns `(model, args)`, as the models of the benchmarks are, and holds what
one run moves when everything between two library calls is one kernel: each tensor that enters or leaves a kernel once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ROWS, WIDTH = 512, 1024
# Bytes of one input, of one of its rows, and of the product of two.
X, ROW, SQUARE = 4 * ROWS * WIDTH, 4 * WIDTH, 4 * ROWS * ROWS
FIGURES = ("kernels", "kernel_bytes", "extern_bytes")


class Program(nn.Module):
    """A function as a module, without parameters."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(*inputs)


@dataclass(frozen=True)
class Counted:
    """A function of so many inputs, float32 of ROWS x WIDTH, and what a run of it moves."""

    run: Callable[..., Any]
    inputs: int
    kernels: int
    kernel_bytes: int
    extern_bytes: int

    @property
    def path(self) -> str:
        return f"{__name__}:{self.run.__name__}"

    @property
    def name(self) -> str:
        return self.run.__name__.replace("_", " ")

    def __call__(self) -> tuple[nn.Module, tuple[Tensor, ...]]:
        return Program(self.run), tuple(torch.randn(ROWS, WIDTH) for _ in range(self.inputs))


COUNTED: list[Counted] = []


def moves(
    inputs: int, kernel_bytes: int, kernels: int = 1, extern_bytes: int = 0
) -> Callable[[Callable[..., Any]], Counted]:
    """The figures of the function below it."""

    def row(run: Callable[..., Any]) -> Counted:
        COUNTED.append(Counted(run, inputs, kernels, kernel_bytes, extern_bytes))
        return COUNTED[-1]

    return row


@moves(inputs=1, kernel_bytes=2 * X)
def two_cosines(x: Tensor) -> Tensor:
    return x.cos().cos()


@moves(inputs=1, kernel_bytes=2 * X)
def softmax(x: Tensor) -> Tensor:
    return torch.softmax(x, 1)


@moves(inputs=2, kernel_bytes=4 * X)
def two_results(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x + y, x * y


@moves(inputs=2, kernel_bytes=2 * X + 4 * ROWS)
def row_sum(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(1)


@moves(inputs=1, kernel_bytes=X + X // 2)
def gate_of_two_halves(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=1)
    return torch.nn.functional.silu(a) * b


@moves(inputs=1, kernel_bytes=X)
def every_other_column(x: Tensor) -> Tensor:
    return x[:, ::2] + 1.0


@moves(inputs=2, kernels=2, kernel_bytes=2 * X + 2 * SQUARE, extern_bytes=2 * X + SQUARE)
def around_a_product(x: Tensor, y: Tensor) -> Tensor:
    return torch.relu(torch.relu(x) @ y.t() + 1.0)
