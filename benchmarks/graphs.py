"""ATen graphs of any length, without a model: what the planner's growth is measured on.

Each maker takes a number of nodes and returns a functional graph of about as many, every node with `meta["val"]`, as a
capture gives them. A trace of 20,000 operators takes minutes; these are written node by node, and each operator's
result is computed once a combination of shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

aten = torch.ops.aten
ROWS, WIDTH = 512, 256


class Writer:
    """An FX graph that grows by calls; what each gives is known from fake tensors."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.mode = FakeTensorMode()
        self.known: dict[Any, Any] = {}
        self.values: list[fx.Node] = []

    def input(self, *shape: int) -> fx.Node:
        node = self.graph.placeholder(f"x{len(self.values)}")
        with self.mode:
            node.meta["val"] = torch.empty(shape)
        self.values.append(node)
        return node

    def call(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(op, args, kwargs)
        like = tuple(tuple(a.meta["val"].shape) if isinstance(a, fx.Node) else str(a) for a in args)
        key = (op, like, str(kwargs))
        if key not in self.known:
            given = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
            with self.mode:
                self.known[key] = op(*given[0], **given[1])
        node.meta["val"] = self.known[key]
        return node

    def done(self, *outputs: fx.Node) -> fx.Graph:
        self.graph.output(tuple(outputs))
        return self.graph

    # -- what models are made of -------------------------------------------------------------------
    def layer_norm(self, x: fx.Node, weight: fx.Node, bias: fx.Node) -> fx.Node:
        mean = self.call(aten.mean.dim, x, [-1], True)
        centred = self.call(aten.sub.Tensor, x, mean)
        squares = self.call(aten.mul.Tensor, centred, centred)
        variance = self.call(aten.mean.dim, squares, [-1], True)
        scale = self.call(aten.rsqrt.default, self.call(aten.add.Tensor, variance, 1e-5))
        normal = self.call(aten.mul.Tensor, centred, scale)
        return self.call(aten.add.Tensor, self.call(aten.mul.Tensor, normal, weight), bias)

    def softmax(self, x: fx.Node) -> fx.Node:
        largest = self.call(aten.amax.default, x, [-1], True)
        e = self.call(aten.exp.default, self.call(aten.sub.Tensor, x, largest))
        return self.call(aten.div.Tensor, e, self.call(aten.sum.dim_IntList, e, [-1], True))


def chain(nodes: int) -> fx.Graph:
    """One operator after the other over one tensor."""
    w = Writer()
    x = w.input(ROWS, WIDTH)
    steps = (
        lambda x: w.call(aten.relu.default, x),
        lambda x: w.call(aten.mul.Tensor, x, 0.5),
        lambda x: w.call(aten.add.Tensor, x, 1.0),
        lambda x: w.call(aten.sub.Tensor, x, 0.25),
    )
    for k in range(nodes):
        x = steps[k % 4](x)
    return w.done(x)


def mlp(nodes: int) -> fx.Graph:
    """Matrix product, bias, activation, again."""
    w = Writer()
    x, weight, bias = w.input(ROWS, WIDTH), w.input(WIDTH, WIDTH), w.input(WIDTH)
    for _ in range(nodes // 3):
        x = w.call(aten.mm.default, x, weight)
        x = w.call(aten.relu.default, w.call(aten.add.Tensor, x, bias))
    return w.done(x)


def transformer(nodes: int) -> fx.Graph:
    """Blocks of norms, attention with its softmax spelt out, and a gated MLP, each with a residual."""
    w = Writer()
    x, weight, bias = w.input(ROWS, WIDTH), w.input(WIDTH), w.input(WIDTH)
    square = w.input(WIDTH, WIDTH)
    for _ in range(max(nodes // 32, 1)):
        h = w.layer_norm(x, weight, bias)
        q, k, v = (w.call(aten.mm.default, h, square) for _ in range(3))
        scores = w.call(aten.mm.default, q, w.call(aten.permute.default, k, [1, 0]))
        weights = w.softmax(w.call(aten.mul.Tensor, scores, 0.0625))
        x = w.call(aten.add.Tensor, x, w.call(aten.mm.default, weights, v))
        h = w.layer_norm(x, weight, bias)
        gate = w.call(aten.mm.default, h, square)
        gate = w.call(aten.mul.Tensor, gate, w.call(aten.sigmoid.default, gate))
        h = w.call(aten.mul.Tensor, gate, w.call(aten.mm.default, h, square))
        x = w.call(aten.add.Tensor, x, w.call(aten.mm.default, h, square))
    return w.done(x)


def fan_out(nodes: int) -> fx.Graph:
    """One tensor that thousands of short branches read."""
    w = Writer()
    x = w.call(aten.relu.default, w.input(ROWS, WIDTH))
    row = w.input(WIDTH)
    out = []
    for k in range(nodes // 3):
        y = w.call(aten.add.Tensor, w.call(aten.mul.Tensor, x, float(k + 1)), row)
        out.append(w.call(aten.sum.dim_IntList, y, [-1]))
    return w.done(*out)


def skips(nodes: int) -> fx.Graph:
    """Convolutions, norms of channels and residuals over one and over many blocks."""
    w = Writer()
    x, kernel = w.input(4, 16, 16, 16), w.input(16, 16, 3, 3)
    scale, shift = w.input(16, 1, 1), w.input(16, 1, 1)
    old = [x]
    for k in range(max(nodes // 7, 1)):
        y = w.call(aten.convolution.default, x, kernel, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
        y = w.call(aten.add.Tensor, w.call(aten.mul.Tensor, y, scale), shift)
        y = w.call(aten.relu.default, y)
        x = w.call(aten.add.Tensor, y, x)
        x = w.call(aten.add.Tensor, x, old[k // 2])
        x = w.call(aten.relu.default, x)
        old.append(x)
    return w.done(x)


def optimiser(nodes: int) -> fx.Graph:
    """Adam over many tensors of a few shapes: ten operators a tensor, nothing shared but the step's numbers."""
    w = Writer()
    shapes = ((64, 64), (256,), (64, 256), (1000,), (256, 64))
    rate = w.input()
    out = []
    for k in range(max(nodes // 10, 1)):
        shape = shapes[k % len(shapes)]
        p, g, m, v = (w.input(*shape) for _ in range(4))
        m = w.call(aten.add.Tensor, w.call(aten.mul.Tensor, m, 0.9), w.call(aten.mul.Tensor, g, 0.1))
        square = w.call(aten.mul.Tensor, g, g)
        v = w.call(aten.add.Tensor, w.call(aten.mul.Tensor, v, 0.999), square)
        root = w.call(aten.add.Tensor, w.call(aten.sqrt.default, v), 1e-8)
        step = w.call(aten.mul.Tensor, w.call(aten.div.Tensor, m, root), rate)
        out += [w.call(aten.sub.Tensor, p, step), m, v]
    return w.done(*out)


GRAPHS: dict[str, Callable[[int], fx.Graph]] = {
    "chain": chain,
    "mlp": mlp,
    "transformer": transformer,
    "fan-out": fan_out,
    "skips": skips,
    "optimiser": optimiser,
}
