"""What the programs of a batched launch look up: which tensor each is of, where its memory lies, how large it is."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from minifuse.codegen.triton import TritonKernel
from minifuse.codegen.triton_text import LIMIT
from minifuse.ir.plan import Launch

ALIGN = 16
KEPT = 64


@dataclass(frozen=True)
class Layout:
    """A batch at given sizes: how many programs it has, whether offsets need 64 bits, a row of own sizes a tensor, and
    for each program its tensor and its number among those of the tensor."""

    programs: int
    wide: bool
    lengths: torch.Tensor
    blocks: torch.Tensor


@dataclass(frozen=True)
class Addresses:
    """Where the memory of a batch's tensors begins, a row each; 16 divides all of it, or 1."""

    align: int
    table: torch.Tensor


class Tables:
    """The tables of one batched launch, on its device; the latest are kept, for calls over the same memory."""

    def __init__(self, step: Launch, kernel: TritonKernel, device: torch.device) -> None:
        self.step = step
        self.kernel = kernel
        self.device = device
        self.layouts: dict[tuple[int, ...], Layout] = {}
        self.known: dict[tuple[int, ...], Addresses] = {}

    def layout(self, values: tuple[int, ...], env: Mapping[str, int]) -> Layout:
        """The tables at sizes `values`, those of `env` by name."""
        if values not in self.layouts:
            if len(self.layouts) >= KEPT:
                self.layouts.clear()
            self.layouts[values] = self.lay_out(env)
        return self.layouts[values]

    def lay_out(self, env: Mapping[str, int]) -> Layout:
        rows = [{s.name: e.evaluate(env) for s, e in m.sizes.items()} for m in self.step.members]
        whole = [{**env, **row} for row in rows]
        wide = any(e.evaluate(sizes) >= LIMIT for sizes in whole for e in self.kernel.extents)
        kind = torch.int64 if wide else torch.int32
        with torch.device("cpu"):
            counts = torch.tensor([self.kernel.grid.evaluate(sizes) for sizes in whole])
            tensors = torch.repeat_interleave(torch.arange(len(rows)), counts)
            blocks = torch.stack([tensors, torch.arange(len(tensors)) - (counts.cumsum(0) - counts)[tensors]], 1)
            lengths = torch.tensor([[row[name] for name in self.kernel.own] for row in rows], dtype=kind)
        return Layout(len(tensors), wide, lengths.to(self.device), blocks.to(torch.int32).to(self.device))

    def addresses(self, pointers: Sequence[int], stream: int) -> Addresses:
        """The addresses as a table, made on the stream that reads it: its memory is that stream's to use again."""
        key = (stream, *(address or 0 for address in pointers))
        found = self.known.get(key)
        if found is None:
            if len(self.known) >= KEPT:
                self.known.clear()
            align = 1 if functools.reduce(operator.or_, key[1:], 0) % ALIGN else ALIGN
            found = self.known[key] = Addresses(align, torch.tensor(key[1:], dtype=torch.int64, device=self.device))
        return found
