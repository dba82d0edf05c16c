"""Custom operators that keep a tensor in the host's memory between the passes, and the streams that they use.

`minifuse::offload` begins a copy to the host, `minifuse::offloaded` waits for its end: until then its source is read.
`minifuse::reload` begins the way back, `minifuse::reloaded` waits for its end: before it nothing may read the result.
On a GPU the copies run on a stream of their own beside the kernels, to and from pinned memory, and a wait is one of
the kernels' stream, not of the host. Where the device is the host both are plain copies, and there is nothing to wait
for: that simulates what a GPU would do.
"""

from __future__ import annotations

import functools

import torch

_library = torch.library.Library("minifuse", "FRAGMENT")
_library.define("offload(Tensor x) -> Tensor")
_library.define("offloaded(Tensor(a) host, Tensor x) -> Tensor(a)")
_library.define("reload(Tensor host, Device device) -> Tensor")
_library.define("reloaded(Tensor(a) x, Tensor host) -> Tensor(a)")

# What the kernels' stream waits for, by the address of the copy's target.
_ends: dict[int, torch.cuda.Event] = {}


@functools.cache
def _beside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _like(x: torch.Tensor, device: torch.device, pinned: bool = False) -> torch.Tensor:
    return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=device, pin_memory=pinned)


def _copy(target: torch.Tensor, source: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`target`, which holds `source` once what it waits for in `_ends` has ended."""
    beside = _beside(device)
    beside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(beside):
        target.copy_(source, non_blocking=True)
        _ends[target.data_ptr()] = beside.record_event()
    return target


def _offload(x: torch.Tensor) -> torch.Tensor:
    host = _like(x, torch.device("cpu"), pinned=x.is_cuda)
    return _copy(host, x, x.device) if x.is_cuda else host.copy_(x)


def _reload(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    x = _like(host, device)
    return _copy(x, host, device) if x.is_cuda else x.copy_(host)


def _arrived(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    end = _ends.pop(target.data_ptr(), None)
    if end is not None:
        device = source.device if source.is_cuda else target.device
        torch.cuda.current_stream(device).wait_event(end)
    return torch.ops.aten.alias.default(target)


_library.impl("offload", _offload, "CompositeExplicitAutograd")
_library.impl("reload", _reload, "CompositeExplicitAutograd")
_library.impl("offloaded", _arrived, "CompositeExplicitAutograd")
_library.impl("reloaded", _arrived, "CompositeExplicitAutograd")
torch.library.register_fake("minifuse::offload", lambda x: _like(x, torch.device("cpu")), lib=_library)
torch.library.register_fake("minifuse::reload", lambda host, device: _like(host, device), lib=_library)
for _name in ("offloaded", "reloaded"):
    torch.library.register_fake(
        f"minifuse::{_name}", lambda target, source: torch.ops.aten.alias.default(target), lib=_library
    )

offload = torch.ops.minifuse.offload.default
offloaded = torch.ops.minifuse.offloaded.default
reload = torch.ops.minifuse.reload.default
reloaded = torch.ops.minifuse.reloaded.default
