"""AOT autograd's cache by its private names: the rest of `compat`, with the versions it was seen in."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import fx
from torch._functorch import config as _functorch_config  # 2.11-2.13
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket  # 2.11-2.13

try:  # 2.13
    from torch._functorch._aot_autograd.autograd_cache import AOTAutogradCache as _Cache
    from torch._functorch._aot_autograd.autograd_cache import AOTAutogradCacheDetails as _Details
    from torch._functorch._aot_autograd.autograd_cache import BypassAOTAutogradCache as _NotCached
    from torch._functorch._aot_autograd.schemas import SerializableAOTDispatchCompiler as _Serializable
    from torch._inductor.codecache import FxGraphCache
    from torch._inductor.output_code import OutputCode as OutputCode
except ImportError:
    _Cache, _Details, _Serializable, OutputCode, _NotCached = None, None, None, object, RuntimeError  # type: ignore[assignment, misc]
_OWN_OPERATORS = ("aten", "prims", "prim", "inductor", "_c10d_functional")
NotCachedError: type[Exception] = _NotCached
"""Raised by what is to be written: it goes on without."""
CACHES = all(hasattr(_Cache, name) for name in ("iterate_over_candidates", "_write_to_local_cache")) and hasattr(
    _Details, "_init_fx_graph_hash_details"
)
"""Whether AOT autograd's cache is one that `caching` knows."""


def serializable(compiler: Callable[..., Any]) -> Any:
    """A compiler whose results AOT autograd's cache may write: it returns an `OutputCode`. 2.13."""
    return _Serializable(OutputCode, compiler)


@contextmanager
def caching(tag: str, read: Callable[[str], Iterable[bytes]], write: Callable[[str, bytes], None]) -> Iterator[bool]:
    """In this thread AOT autograd takes its results by `read` and keeps them by `write`, both by the key that it makes
    of a graph, its inputs, torch's settings and `tag`; a backward is compiled with its forward. Gives True. 2.13.

    Of the key, what names Inductor's own code is left out: to digest it takes half a second in each process.
    """
    me, cache, key_of = threading.get_ident(), cast(Any, _Cache), cast(Any, _Details)
    theirs, written = cache.iterate_over_candidates, cache._write_to_local_cache
    digested, settings = key_of._init_fx_graph_hash_details, cast(Any, torch.compiler.config)

    def candidates(local: bool, remote: Any, key: str) -> Iterator[tuple[Any, bytes, bool]]:
        mine = threading.get_ident() == me
        yield from ((pickle.loads(data), data, True) for data in read(key)) if mine else theirs(local, remote, key)

    def keep(key: str, content: bytes) -> None:
        (write if threading.get_ident() == me else written)(key, content)

    def details(self: Any, gm: fx.GraphModule, example_inputs: Sequence[Any], fx_config: Any) -> None:
        if threading.get_ident() != me:
            digested(self, gm, example_inputs, fx_config)
            return
        FxGraphCache._check_can_cache(gm, example_inputs, fx_config)
        for op in {
            node.target for part in gm.modules() if isinstance(part, fx.GraphModule) for node in part.graph.nodes
        }:
            custom = isinstance(op, (OpOverload, OpOverloadPacket)) and str(op).partition(".")[0] not in _OWN_OPERATORS
            if custom or isinstance(op, HigherOrderOperator) and "triton" in op.name():
                raise NotCachedError(f"what {op} does, and its gradient, are not in the graph")
        self.gm, self.example_inputs, self.cache_key_tag = gm, list(example_inputs), settings.cache_key_tag
        kernels = torch.backends.cuda
        self.defaults = (
            torch.get_default_dtype(), torch.get_default_device(), torch.get_float32_matmul_precision(),
            torch.is_inference_mode_enabled(), torch.backends.mkldnn.enabled, kernels.flash_sdp_enabled(),
            kernels.mem_efficient_sdp_enabled(), kernels.math_sdp_enabled(),
        )  # fmt: skip

    changes = (
        (cache, "iterate_over_candidates", staticmethod(candidates)),
        (cache, "_write_to_local_cache", staticmethod(keep)),
        (key_of, "_init_fx_graph_hash_details", details),
    )
    before = [vars(owner).get(name) for owner, name, _ in changes]
    both: dict[str, Any] = {"bundled_autograd_cache": True, "force_non_lazy_backward_lowering": True}
    try:
        for owner, name, own in changes:
            setattr(owner, name, own)
        with settings.patch(cache_key_tag=f"{settings.cache_key_tag}{tag}"), _functorch_config.patch(both):
            yield True
    finally:
        for (owner, name, _), old in zip(changes, before, strict=True):
            if old is None:
                delattr(owner, name)  # it was a base class'
            else:
                setattr(owner, name, old)


def guards_of(data: bytes) -> str | None:
    """What must hold of a graph's sizes for what AOT autograd kept of it."""
    return pickle.loads(data).guards_expr
