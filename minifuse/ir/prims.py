"""Custom operators of captured graphs: two that stand for randomness, one for what a softmax needs of a row.

`minifuse::seed` draws a seed from torch's generator: an effect, run once, in its place.
`minifuse::random` is a pure function of a seed, an offset and a shape, so it may be fused and
recomputed: the recomputed mask is the same mask. Their eager meaning is the interpreter's.

`minifuse::softmax_statistics` gives the maxima of rows and the sums of exponentials of what lies below them, found in
one walk: what `passes.decompose.softmaxes` takes a softmax of long rows apart into.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import ops
from .interpret import philox

_library = torch.library.Library("minifuse", "DEF")
_library.define("seed(Device device) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))
_library.define(
    "random(SymInt[] size, Tensor seed, int offset, str kind, SymInt low, SymInt high, ScalarType dtype, Device device)"
    " -> Tensor"
)
_library.define("softmax_statistics(Tensor x, int dim) -> (Tensor, Tensor)")


def _seed(device: torch.device) -> torch.Tensor:
    return torch.empty((), dtype=torch.int64, device=device).random_()


def _random(
    size: Sequence[int],
    seed: torch.Tensor,
    offset: int,
    kind: str,
    low: int,
    high: int,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """Numbers of "uniform" [0, 1), "normal", or "integer" in [low, high), by logical linear index."""
    count = 1
    for s in size:
        count *= s
    index = torch.arange(count, dtype=torch.int64, device=device).reshape(tuple(size))
    drawn = philox("bits" if kind == "integer" else kind, seed, offset, index)  # type: ignore[arg-type]
    if kind == "integer":
        drawn = (drawn & ((1 << 63) - 1)) % (high - low) + low
    return drawn.to(dtype)


def _fake_seed(device: torch.device) -> torch.Tensor:
    return torch.empty((), dtype=torch.int64, device=device)


def _fake_random(size, seed, offset, kind, low, high, dtype, device):  # type: ignore[no-untyped-def]
    return torch.empty(size, dtype=dtype, device=device)


def _softmax_statistics(x: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    return ops.REDUCTIONS["softmax"].meaning(x, dim)


def _fake_softmax_statistics(x: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = list(x.shape)
    shape[dim] = 1
    return x.new_empty(shape), x.new_empty(shape)


_library.impl("seed", _seed, "BackendSelect")
_library.impl("random", _random, "CompositeExplicitAutograd")
_library.impl("softmax_statistics", _softmax_statistics, "CompositeExplicitAutograd")
torch.library.register_fake("minifuse::seed", _fake_seed, lib=_library)
torch.library.register_fake("minifuse::random", _fake_random, lib=_library)
torch.library.register_fake("minifuse::softmax_statistics", _fake_softmax_statistics, lib=_library)

seed = torch.ops.minifuse.seed.default
random = torch.ops.minifuse.random.default
softmax_statistics = torch.ops.minifuse.softmax_statistics.default
