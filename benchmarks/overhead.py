"""What a call of a compiled graph costs beside its work: microseconds a call, of graphs with next to nothing in them.

    python -m benchmarks.overhead [--quick] [--json FILE] [--check]

Each case adds one to tensors of 16 elements: 1, 10 or 100 of them, with and without gradients (`training` runs forward
and backward), with sizes known and as symbols. Every figure is the median of interleaved rounds of many calls, on one
thread. `dynamo` is a compiled function that does nothing with as many inputs: guards, which all backends pay.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from . import harness, models
from .harness import Board, Column, ProbeError, Target

INPUTS = (1, 10, 100)
SECONDS_A_ROUND = 0.02


def micro(value: float) -> str:
    return f"{value:.3g} us"


def board() -> Board:
    names = ("eager", "dynamo", "aot_eager", "inductor", "minifuse")
    return Board(
        "Microseconds a call, one thread",
        [*(Column(name, micro) for name in names), Column("vs inductor", harness.ratio, Target("<=", 1.0))],
    )


def add_one(*xs: Tensor) -> tuple[Tensor, ...]:
    return tuple([x + 1 for x in xs])


def call_of(backend: str, inputs: int, training: bool, dynamic: bool) -> Callable[[], Any]:
    """One call of a fresh compiled function, or a training step of it."""
    xs = [torch.randn(16, requires_grad=training) for _ in range(inputs)]
    ones = [torch.ones(16) for _ in xs]

    # Dynamo keeps what it compiled by code: each backend has one of its own.
    fn = FunctionType(add_one.__code__.replace(co_name=f"add_one_{backend}"), add_one.__globals__)
    run: Callable[..., Any] = fn
    if backend == "dynamo":
        run = torch.compile(fn, backend=lambda gm, args: lambda *xs: xs[-inputs:], dynamic=dynamic)
    elif backend != "eager":
        run = torch.compile(fn, backend=models.resolve(backend), dynamic=dynamic)

    def infer() -> Any:
        with torch.no_grad():
            return run(*xs)

    def train() -> Any:
        for x in xs:
            x.grad = None
        torch.autograd.backward(run(*xs), ones)

    if training and backend == "dynamo":
        return lambda: run(*xs)
    return train if training else infer


def probe(inputs: int, training: bool, dynamic: bool, backends: Sequence[str], rounds: int) -> dict[str, float]:
    """Microseconds a call by backend. Run it through `fresh`."""
    torch.set_num_threads(1)
    cases: dict[str, Callable[[], Any]] = {}
    many = max(10, int(SECONDS_A_ROUND / (20e-6 * inputs)))
    for backend in backends:
        call = call_of(backend, inputs, training, dynamic)

        def repeat(call: Callable[[], Any] = call) -> None:
            for _ in range(many):
                call()

        cases[backend] = repeat
    return {name: 1e6 * s.median / many for name, s in harness.interleaved(cases, rounds).items()}


def main() -> int:
    parser = harness.arguments(__doc__)
    parser.add_argument("--backends", default="eager,dynamo,aot_eager,inductor,minifuse", type=lambda t: t.split(","))
    options = parser.parse_args()
    table = board()
    for inputs in INPUTS[:2] if options.quick else INPUTS:
        for training in (False, True):
            for dynamic in (False, True):
                row = f"{inputs} {'input' if inputs == 1 else 'inputs'}, {'training' if training else 'inference'}"
                row += ", dynamic" if dynamic else ""
                rounds = 11 if options.quick else 31
                try:
                    found = harness.fresh(probe, inputs, training, dynamic, options.backends, rounds)
                except ProbeError as error:
                    table.fail(row, error)
                    continue
                table.add(row, **found)
                if {"inductor", "minifuse"} <= found.keys():
                    table.add(row, vs_inductor=found["minifuse"] / found["inductor"])
    return harness.finish(table, options)


if __name__ == "__main__":
    sys.exit(main())
