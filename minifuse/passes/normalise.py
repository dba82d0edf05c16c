"""Normalisation of captured graphs: random operators become a seed and a pure function of it, and gradients get their
parameters' strides."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import fx

from minifuse.ir import prims

aten = torch.ops.aten
_UNIFORM = {aten.rand.default, aten.rand_like.default}
_NORMAL = {aten.randn.default, aten.randn_like.default}
_INTEGER = {aten.randint.default: 1, aten.randint.low: 2, aten.randint_like.default: 1, aten.randint_like.low_dtype: 2}
_BERNOULLI = {aten.bernoulli.p, aten.bernoulli.default}
DRAWN = {*_UNIFORM, *_NORMAL, *_INTEGER, *_BERNOULLI}
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def replace_random(graph: fx.Graph) -> int:
    """Rewrite a graph in place so that its random numbers come from one seed a call and device.

    Operators with a generator of their own, or of a kind that kernels do not draw, stay as they
    are. Returns how many were replaced; each gets its own offset, so streams never overlap.
    """
    seeds: dict[torch.device, fx.Node] = {}
    offset = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or node.kwargs.get("generator") is not None:
            continue
        build = _builder(node)
        if build is None:
            continue
        val = node.meta["val"]
        with graph.inserting_before(node):
            seed = seeds.get(val.device)
            if seed is None:
                found = val.new_empty((), dtype=torch.int64)
                seed = seeds[val.device] = _call(graph, node, found, prims.seed, val.device)
            new = build(graph, node, seed, offset)
        offset += 1
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    return offset


def _builder(node: fx.Node) -> Callable[[fx.Graph, fx.Node, fx.Node, int], fx.Node] | None:
    target, val = node.target, node.meta.get("val")
    if not isinstance(val, torch.Tensor):
        return None
    if target in _UNIFORM and val.dtype in _FLOATS:
        return lambda g, n, s, o: _draw(g, n, s, o, "uniform", val.dtype)
    if target in _NORMAL and val.dtype in _FLOATS:
        return lambda g, n, s, o: _draw(g, n, s, o, "normal", val.dtype)
    if target in _INTEGER and not val.dtype.is_floating_point:
        return _integers
    if target in _BERNOULLI:
        return _bernoulli
    return None


def _draw(
    graph: fx.Graph,
    node: fx.Node,
    seed: fx.Node,
    offset: int,
    kind: str,
    dtype: torch.dtype,
    low: Any = 0,
    high: Any = 1,
) -> fx.Node:
    val = node.meta["val"]
    size = _size_argument(graph, node, val)
    # uniform numbers of half precision would round up to 1: they are drawn in float32
    drawn_dtype = torch.int64 if kind == "integer" else torch.float32
    drawn = val.new_empty(val.shape, dtype=drawn_dtype)
    new = _call(graph, node, drawn, prims.random, size, seed, offset, kind, low, high, drawn_dtype, val.device)
    if dtype is not drawn_dtype:
        return _to(graph, node, new, dtype, "uniform" if kind == "uniform" else "")
    return new


def _to(graph: fx.Graph, node: fx.Node, x: fx.Node, dtype: torch.dtype, kind: str = "") -> fx.Node:
    val = x.meta["val"]
    if kind == "uniform" and dtype in (torch.bfloat16, torch.float16):
        top = 1.0 - math.ldexp(1.0, -8 if dtype is torch.bfloat16 else -11)
        x = _call(graph, node, val, aten.clamp_max.default, x, top)
    return _call(graph, node, val.new_empty(val.shape, dtype=dtype), aten._to_copy.default, x, dtype=dtype)


def _size_argument(graph: fx.Graph, node: fx.Node, val: torch.Tensor) -> list[Any]:
    """The sizes of a result as graph arguments: numbers, or nodes that compute them."""
    first = node.args[0] if node.args else None
    if isinstance(first, (list, tuple)):
        return list(first)
    for arg in node.args:
        if isinstance(arg, (list, tuple)):
            return list(arg)
    extents: Sequence[Any] = val.shape
    return [s if isinstance(s, int) else _call(graph, node, s, aten.sym_size.int, first, d)
            for d, s in enumerate(extents)]  # fmt: skip


def _integers(graph: fx.Graph, node: fx.Node, seed: fx.Node, offset: int) -> fx.Node:
    target = node.target
    like = target in (aten.randint_like.default, aten.randint_like.low_dtype)
    args = node.args[1:] if like else node.args
    low, high = (args[0], args[1]) if _INTEGER[target] == 2 else (0, args[0])  # type: ignore[index]
    return _draw(graph, node, seed, offset, "integer", node.meta["val"].dtype, low, high)


def _bernoulli(graph: fx.Graph, node: fx.Node, seed: fx.Node, offset: int) -> fx.Node:
    x = node.args[0]
    p = node.args[1] if node.target is aten.bernoulli.p and len(node.args) > 1 else x
    drawn = _draw(graph, node, seed, offset, "uniform", torch.float32)
    compare = aten.lt.Tensor if isinstance(p, fx.Node) else aten.lt.Scalar
    below = _call(graph, node, drawn.meta["val"].to(torch.bool), compare, drawn, p)
    return _to(graph, node, below, node.meta["val"].dtype)


def _call(graph: fx.Graph, source: fx.Node, val: Any, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A new node that gives `val`, with the user's line, module and checkpoint tags of the one that it comes from."""
    new = graph.call_function(target, args, kwargs)
    new.meta["val"] = val
    for key in ("stack_trace", "nn_module_stack", "partitioner_tag", "recompute", "ac_graph_id", "seq_nr"):
        if key in source.meta and not (key == "recompute" and target is prims.seed):
            new.meta[key] = source.meta[key]
    return new


def lay_out_gradients(graph: fx.Graph, first: int, parameters: Collection[int]) -> None:
    """Rewrite a joint graph in place so that gradients have the strides of their parameters, where those are dense.

    Autograd would copy the others when the backward has ended and all of them are alive; here each is copied when it
    is made, by a kernel like any other. `first` is how many outputs are the forward's, `parameters` has the indices of
    primals.
    """
    primals = graph.find_nodes(op="placeholder")
    output: Any = graph.output_node()
    results = list(output.args[0])
    for k, gradient in enumerate(results[first:]):
        if k not in parameters or not isinstance(gradient, fx.Node):
            continue
        own, given = primals[k].meta.get("val"), gradient.meta.get("val")
        if isinstance(own, torch.Tensor) and isinstance(given, torch.Tensor) and _laid_out_otherwise(own, given):
            strides = own.stride()
            dims = sorted(range(own.dim()), key=lambda d: (-strides[d], own.shape[d] != 1))
            back = sorted(range(own.dim()), key=dims.__getitem__)
            with graph.inserting_before(gradient.next):
                turned = _call(graph, gradient, given.permute(dims), aten.permute.default, gradient, dims)
                laid = turned.meta["val"].contiguous()
                copy = _call(graph, gradient, laid, aten.clone.default, turned, memory_format=torch.contiguous_format)
                results[first + k] = _call(graph, gradient, laid.permute(back), aten.permute.default, copy, back)
    output.args = (type(output.args[0])(results),)


def _laid_out_otherwise(own: torch.Tensor, given: torch.Tensor) -> bool:
    """Whether a parameter is dense and its gradient, of the same sizes, lies in another order."""
    if own.layout is not torch.strided or given.layout is not torch.strided or own.shape != given.shape:
        return False
    if not all(isinstance(n, int) for n in (*own.shape, *own.stride())):
        return False
    if torch.empty_like(own, device="meta").stride() != own.stride():
        return False
    return any(n > 1 and a != b for n, a, b in zip(own.shape, own.stride(), given.stride(), strict=True))
