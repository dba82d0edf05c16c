"""Offloading: when the ways to the host and back begin and end, and the graphs that go them."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from torch import fx

from minifuse import compat
from minifuse.ir import transfers

from .problem import Problem, Value


def seconds(problem: Problem, v: Value) -> float:
    """About what a value takes to compute, by itself: a link is busy beside so much work."""
    device = problem.device
    if v.kind == "extern":
        return device.launch + v.flops / device.flops
    return max(v.flops / device.vector, v.nbytes / device.dram) if v.kind in ("kernel", "reduction") else 0.0


def arrivals(problem: Problem, order: Sequence[Value], away: Sequence[Value]) -> dict[str, int]:
    """For each of `away`, which begin their way once they are made, the place in `order` after which they have arrived.

    One way after the other takes the link, beside the values of `order`; where the device is the host they take none.
    """
    if not away:
        return {}
    at = {v.name: i for i, v in enumerate(order)}
    clock = list(accumulate(seconds(problem, v) for v in order))
    free, found = 0.0, dict[str, int]()
    for v in sorted(away, key=lambda v: at[v.name]):
        free = max(free, clock[at[v.name]]) + (problem.transfer_seconds(v) if problem.device.link else 0.0)
        found[v.name] = max(at[v.name], min(bisect.bisect_left(clock, free), len(order) - 1))
    return found


def departures(problem: Problem, order: Sequence[Value], away: Sequence[Value]) -> dict[str, int]:
    """For each of `away`, which stand in `order` where they are first needed, the place before which their way back
    begins, so that it is behind them then: `arrivals`, from the end."""
    last = len(order) - 1
    return {name: last - i for name, i in arrivals(problem, order[::-1], away).items()}


def send(forward: fx.GraphModule, after: Mapping[str, str]) -> None:
    """Return copies on the host in place of saved values; each is waited for after the value that `after` names.

    What is saved stands behind the caller's own outputs, which a value may be among: those stay as they are.
    """
    graph, outputs = forward.graph, compat.joint_outputs(forward)
    nodes = {n.name: n for n in graph.nodes}
    for name, last in after.items():
        x = nodes[name]
        with graph.inserting_after(x):
            way = call(graph, transfers.offload, x)
        with graph.inserting_after(way if last == name else nodes.get(last, way)):
            host = call(graph, transfers.offloaded, way, x)
        outputs[len(outputs) - 1 - outputs[::-1].index(x)] = host
    graph.output_node().args = (tuple(outputs),)


def fetch(backward: fx.GraphModule, names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Take, in place of these values, their copies on the host; the names of the calls that begin and end each way,
    which stand at the graph's begin."""
    graph = backward.graph
    nodes = {n.name: n for n in graph.nodes}
    made: dict[str, tuple[str, str]] = {}
    for name in names:
        host = nodes[name]
        users = list(host.users)
        with graph.inserting_before(next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))):
            device = host.meta["val"].device
            host.meta["val"] = on_host(host)
            way = call(graph, transfers.reload, host, device)
            x = call(graph, transfers.reloaded, way, host)
        for user in users:
            user.replace_input_with(host, x)
        made[name] = way.name, x.name
    return made


def on_host(node: fx.Node) -> Any:
    val = node.meta["val"]
    with val.fake_mode:
        return transfers.offload(val)


def call(graph: fx.Graph, op: Any, *args: Any) -> fx.Node:
    """A call of an operator of one tensor, with what it gives."""
    node = graph.call_function(op, args)
    first = args[0].meta["val"]
    with first.fake_mode:
        node.meta["val"] = op(*(a.meta["val"] if isinstance(a, fx.Node) else a for a in args))
    return node
