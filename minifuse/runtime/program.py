"""A compiled graph: the boxed callable that AOT autograd runs."""

from __future__ import annotations

import ctypes
import math
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from minifuse import compat
from minifuse.codegen.program import HostProgram
from minifuse.ir import dtypes
from minifuse.ir.interpret import run_kernel
from minifuse.ir.kernel import Kernel
from minifuse.ir.plan import Plan, TensorRef
from minifuse.passes.memory import arena_intervals, pack

from .pool import Lease, Pool

POOL = Pool()
NO_ARENA = torch.empty(0, dtype=torch.uint8, device="cpu")


class _Threads:
    """How many threads a kernel may use: torch's setting; one in a forked child of a process that used more.

    An OpenMP runtime's threads do not survive a fork, and waiting for them would never end.
    """

    def __init__(self) -> None:
        self.forked = False
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._after_fork)

    def _after_fork(self) -> None:
        self.forked = True

    def __call__(self) -> int:
        return 1 if self.forked else torch.get_num_threads()


threads = _Threads()


class _Deterministic:
    """torch's deterministic algorithms while any thread is inside; the setting is the whole process', as in torch."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.before = (False, False)

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                self.before = (
                    torch.are_deterministic_algorithms_enabled(),
                    torch.is_deterministic_algorithms_warn_only_enabled(),
                )
                torch.use_deterministic_algorithms(True)
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                enabled, warn_only = self.before
                torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


deterministic = _Deterministic()


@dataclass(frozen=True)
class Layout:
    """A plan's arena at given sizes: bytes, offsets, the values of the unit's symbols, the views that operators take of
    it (dtype, size, stride, offset in elements), and, where there is no arena to keep them with, the frames that no
    call has."""

    nbytes: int
    offsets: dict[str, int]
    env: dict[str, int]
    views: list[tuple[torch.dtype, tuple[int, ...], tuple[int, ...], int]]
    idle: list[Frame] = field(default_factory=list)


@dataclass
class Frame:
    """What one call needs that does not change between calls over the same memory, which lives as long."""

    layout: Layout
    memory: torch.Tensor
    pointers: list[Any]
    views: list[torch.Tensor]
    sizes: Any
    lease: Lease | None = None


class Program:
    """Runs a plan. Safe to call from several threads at once: each call has a frame of its own."""

    def __init__(
        self,
        plan: Plan,
        host: HostProgram,
        functions: Sequence[Callable[..., int]],
        binding: tuple[tuple[str, ...], ...],
        unit_symbols: tuple[str, ...],
        messages: tuple[tuple[str, ...], ...],
        constants: dict[str, torch.Tensor],
        deterministic: bool = False,
    ) -> None:
        self._boxed_call = True  # on the instance: wrappers copy its dictionary alone
        self.plan = plan
        self.host = host
        self.binding = binding
        self.unit_symbols = unit_symbols
        self.messages = messages
        self.constants = constants
        self.deterministic = deterministic
        self.intervals = arena_intervals(plan)
        self.layouts: dict[tuple[int, ...], Layout] = {}
        self.frames: dict[tuple[tuple[int, ...], int], Frame] = {}
        namespace: dict[str, Any] = {
            "torch": torch, "math": math, "enter": self.enter, "leave": self.leave, "view": compat.reinterpret_tensor,
            "empty": compat.empty_strided_cpu, "new": new, "adopt": adopt, "lend": POOL.lend, "own": POOL.own,
            "expect": POOL.expect, "beside": POOL.beside, "fail": self.fail, "threads": threads,
            "interpret": self.interpret, **host.objects,
        }  # fmt: skip
        namespace.update({f"run{i}": f for i, f in enumerate(functions)})
        namespace.update({f"b_{name}": value for name, value in constants.items()})
        exec(compile(host.source, f"<minifuse {plan.name}>", "exec"), namespace)
        self.call: Callable[[list[Any]], Any] = namespace["call"]

    @property
    def direct(self) -> Callable[[list[Any]], Any]:
        """What a call comes to, without a step in between."""
        return self if self.deterministic else self.call

    def __call__(self, args: list[Any]) -> Any:
        if not self.deterministic:
            return self.call(args)
        with deterministic:
            return self.call(args)

    # -- memory ----------------------------------------------------------------------------------
    def layout(self, key: tuple[int, ...]) -> Layout:
        found = self.layouts.get(key)
        if found is None:
            env = dict(zip(self.host.key_symbols, key, strict=True))
            nbytes = {
                v.buffer: self.plan.buffers[v.buffer].extent.evaluate(env)
                * dtypes.itemsize(self.plan.buffers[v.buffer].dtype)
                for v in self.intervals
            }
            offsets, total = pack(self.intervals, nbytes)
            for b in self.plan.buffers.values():
                if b.inside is not None and b.inside[0] in offsets:
                    offsets[b.name] = offsets[b.inside[0]] + b.inside[1].evaluate(env) * dtypes.itemsize(b.dtype)
            views = [self.place(r, offsets, env) for r in self.host.views]
            found = self.layouts[key] = Layout(total, offsets, env, views)
        return found

    def place(
        self, r: TensorRef, offsets: dict[str, int], env: dict[str, int]
    ) -> tuple[torch.dtype, tuple[int, ...], tuple[int, ...], int]:
        """A view of an arena buffer, from the arena's begin: see `Layout`."""
        dtype = self.plan.buffers[r.buffer].dtype
        size, stride = (tuple(e.evaluate(env) for e in es) for es in (r.shape, r.stride))
        return dtype, size, stride, offsets[r.buffer] // dtypes.itemsize(dtype) + r.offset.evaluate(env)

    def enter(self, key: tuple[int, ...]) -> Frame:
        """Lease an arena for a call with these sizes."""
        layout = self.layouts.get(key) or self.layout(key)
        if not layout.nbytes:
            try:
                return layout.idle.pop()
            except IndexError:
                return self.make_frame(layout, NO_ARENA)
        lease = POOL.lease(layout.nbytes)
        kept = lease.memo.get(self)
        frame = kept if kept is not None and kept.layout is layout else self.make_frame(layout, lease.tensor)
        frame.lease = lease
        return frame

    def leave(self, frame: Frame) -> None:
        """Give the arena back; the frame stays with the memory for the next call over it."""
        lease, frame.lease = frame.lease, None
        if lease is None:
            frame.layout.idle.append(frame)
        else:
            lease.memo[self] = frame
            lease.release()

    def make_frame(self, layout: Layout, base: torch.Tensor) -> Frame:
        address = base.data_ptr()
        places = {name: x.data_ptr() for name, x in self.constants.items() if isinstance(x, torch.Tensor)}
        places |= {name: address + offset for name, offset in layout.offsets.items()}
        pointers = [self.array(ctypes.c_void_p, [places.get(name, 0) for name in names]) for names in self.binding]
        sizes = self.array(ctypes.c_int64, [layout.env.get(name, 0) for name in self.unit_symbols])
        whole = {dtype: base.view(dtype) for dtype in {dtype for dtype, *_ in layout.views}}
        views = [compat.reinterpret_tensor(whole[dtype], *where) for dtype, *where in layout.views]
        return Frame(layout, base, pointers, views, sizes)

    def array(self, kind: Any, items: list[int]) -> Any:
        """Addresses or sizes as a run takes them."""
        return (kind * max(len(items), 1))(*items)

    # -- what the text calls ---------------------------------------------------------------------
    def fail(self, run: int, code: int) -> None:
        message = self.messages[run][code - 1]
        if message == "ZeroDivisionError":
            raise RuntimeError("ZeroDivisionError")
        raise IndexError(message)

    def interpret(self, kernel: Kernel, tensors: list[torch.Tensor], sizes: dict[str, int]) -> None:
        run_kernel(kernel, {p.name: t for p, t in zip(kernel.params, tensors, strict=True)}, sizes)


def new(
    size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device | None = None
) -> torch.Tensor:
    """Uninitialised memory for the caller: pooled on CPU, from torch's allocator elsewhere."""
    if device is None:
        return POOL.tensor(size, stride, dtype)
    if device.type == "cuda" and device.index == torch.cuda.current_device():
        return compat.empty_strided_cuda(size, stride, dtype)
    return torch.empty_strided(size, stride, dtype=dtype, device=device)


def adopt(
    x: torch.Tensor | None, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, copy: bool = False
) -> torch.Tensor | None:
    """An operator's result with the strides and the dtype that the plan was made for; copied where it has others, or
    shares memory that is not its own (`copy`). A copy keeps the storage offset: a view of an input is found by it.

    Raises RuntimeError for another shape: kernels would read what is not there. What an operator leaves undefined
    (an attention in inference its statistics) stays None: nobody may read it.
    """
    if x is None:
        return x
    if x.shape != size:
        raise RuntimeError(f"an operator gave a tensor of {list(x.shape)}, expected {list(size)} by its shape function")
    if x.dtype is not dtype:  # as some shape functions of torch have it
        x = x.to(dtype)
    if not copy and x.stride() == stride:
        return x
    laid_out = all(n == 1 or a == b for n, a, b in zip(size, x.stride(), stride, strict=True))
    if not copy and laid_out:
        return x
    span = sum((n - 1) * d for n, d in zip(size, stride, strict=True)) + 1
    shared = span < x.numel() or any(d == 0 and n > 1 for n, d in zip(size, stride, strict=True))
    if laid_out and shared and x.numel():  # elements share memory: copy the memory, not them
        return x.as_strided((span,), (1,)).clone().as_strided(size, stride, 0)
    begin = x.storage_offset() if copy and x.numel() else 0
    memory = torch.empty((begin + span,) if x.numel() else (0,), dtype=x.dtype, device=x.device)
    return memory.as_strided(size, stride, begin).copy_(x)
