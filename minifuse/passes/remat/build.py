"""From the joint FX graph to a `Problem`: phases, storages, what may not run twice, and prices."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy
from torch.utils.flop_counter import flop_registry

from minifuse import compat
from minifuse.ir import device as devices
from minifuse.ir import dtypes, ops
from minifuse.passes.fuse import Landed
from minifuse.passes.lower.nodes import module_path, mutated_arguments, source_line
from minifuse.passes.scratch import Layout, scratch_bytes

from .problem import Problem, Value

_TAGS = {
    CheckpointPolicy.MUST_SAVE: "must_save",
    CheckpointPolicy.PREFER_SAVE: "prefer_save",
    CheckpointPolicy.PREFER_RECOMPUTE: "prefer_recompute",
    CheckpointPolicy.MUST_RECOMPUTE: "must_recompute",
}
_REDUCTION_TAG = getattr(torch.Tag, "reduction", None)
_REDUCTIONS = frozenset(
    """sum mean prod var std var_mean std_mean amax amin aminmax max min argmax argmin any all logsumexp norm nansum
    linalg_vector_norm cumsum cumprod logcumsumexp native_layer_norm native_group_norm _softmax _log_softmax
    avg_pool2d avg_pool3d max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool2d adaptive_max_pool3d
    _adaptive_avg_pool2d _adaptive_avg_pool3d softmax_statistics""".split()
)
_ASSERTIONS = frozenset(("_assert_scalar", "_assert_async", "_assert_tensor_metadata"))
_PLAIN_COST = 2.0


class JointGraph:
    """The joint graph with each node's side known.

    `after_tangents`: nodes that depend on a tangent or must run in the backward; `live_backward`: those of them that a
    gradient or a mutation needs; `forward`: nodes that the forward's outputs and effects need; `required`: what the
    live backward reads from outside itself.
    """

    def __init__(self, joint: fx.GraphModule, num_fwd_outputs: int) -> None:
        self.nodes = [n for n in joint.graph.nodes if n.op != "output"]
        outputs = compat.joint_outputs(joint)
        self.forward_outputs = [o for o in outputs[:num_fwd_outputs] if isinstance(o, fx.Node)]
        self.backward_outputs = [o for o in outputs[num_fwd_outputs:] if isinstance(o, fx.Node)]
        self.after_tangents: set[fx.Node] = set()
        for n in self.nodes:
            own = compat.is_tangent(n) or (is_effect(n) and _in_backward(n))
            if own or not self.after_tangents.isdisjoint(n.all_input_nodes):
                self.after_tangents.add(n)
        effects = [n for n in self.nodes if is_effect(n) and n not in self.after_tangents]
        self.forward = _needed((*self.forward_outputs, *effects), stop=self.after_tangents)
        for n in self.nodes:  # A draw that only the backward reads is the backward's own, as in eager.
            own_random = pin_of(n)[0] and n not in self.forward
            if own_random or not self.after_tangents.isdisjoint(n.all_input_nodes):
                self.after_tangents.add(n)
        effects = [n for n in self.nodes if n in self.after_tangents and is_effect(n)]
        roots = (*self.backward_outputs, *effects)
        live = _needed(roots, stop=())
        self.live_backward = live & self.after_tangents
        read = {i for n in self.live_backward for i in n.all_input_nodes} | set(self.backward_outputs)
        self.required = [n for n in self.nodes if n in read and n not in self.after_tangents]
        needed = _needed(self.required, stop=self.after_tangents)
        for n in self.nodes:  # A result that only the backward reads comes with those that the forward reads.
            if n in needed and n.target is operator.getitem and n.args[0] in self.forward:
                self.forward.add(n)
        self.either = needed - self.forward


def _needed(roots: Sequence[fx.Node], stop: Collection[fx.Node]) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    stack = [r for r in roots if r not in stop]
    while stack:
        n = stack.pop()
        if n not in seen:
            seen.add(n)
            stack.extend(i for i in n.all_input_nodes if i not in stop)
    return seen


def _in_backward(n: fx.Node) -> bool:
    return n.meta.get("partitioner_tag") in ("is_backward", "must_be_in_backward")


def schema_of(n: fx.Node) -> torch.FunctionSchema | None:
    return n.target._schema if isinstance(n.target, compat.OpOverload) else None


def op_name(n: fx.Node, whole: bool = False) -> str:
    """The operator's name without overload, and without namespace too but for the `whole` of it: `add`, `aten.add`."""
    schema = schema_of(n)
    if schema is None:
        return getattr(n.target, "__name__", str(n.target))
    return schema.name.replace("::", ".") if whole else schema.name.split("::")[-1]


def is_assertion(n: fx.Node) -> bool:
    return op_name(n) in _ASSERTIONS


def is_effect(n: fx.Node) -> bool:
    """Whether running it changes something: mutation, an ordered effect, an assertion."""
    if n.op != "call_function":
        return False
    schema = schema_of(n)
    return bool(schema and schema.is_mutable) or is_assertion(n) or compat.has_effect_token(n)


def pin_of(n: fx.Node) -> tuple[bool, bool, bool, bool]:
    """(random, effect, collective, binds a data-dependent size): any of them forbids running it twice."""
    if n.op != "call_function":
        return False, False, False, False
    tags = getattr(n.target, "tags", ())
    schema = schema_of(n)
    name = schema.name if schema else ""
    random = torch.Tag.nondeterministic_seeded in tags or name == "minifuse::seed" or compat.is_rng_wrapper(n)
    collective = name.startswith(("_c10d_functional", "c10d_functional", "_dtensor"))
    binds = torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags
    return random, is_effect(n), collective, binds or bool(n.meta.get("unbacked_bindings"))


def is_view(n: fx.Node) -> bool:
    """Whether its result is another name for its first argument's memory."""
    schema = schema_of(n)
    if schema is None:
        return n.target is operator.getitem and isinstance(n.args[0], fx.Node) and is_view(n.args[0])
    if schema.name == "aten::_unsafe_view":
        return True
    return any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)


def shape_of(t: torch.Tensor) -> tuple[int, ...]:
    """A fake tensor's shape with every symbol at its hint, 4096 where a size is known only at run time."""
    return tuple(compat.size_hint(s) for s in t.shape)


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [t for v in value for t in tensors(v)]
    return []


def nbytes_of(n: fx.Node) -> int:
    return sum(prod(shape_of(t)) * dtypes.itemsize(t.dtype) for t in tensors(n.meta.get("val")))


def elements_of(n: fx.Node) -> int:
    return sum(prod(shape_of(t)) for t in tensors(n.meta.get("val")))


def scratch_of(n: fx.Node) -> int:
    """The bytes of an operator's own copies: see `scratch_bytes`."""

    def layout(x: fx.Node | torch.Tensor) -> Layout:
        t = x.meta["val"] if isinstance(x, fx.Node) else x
        return Layout(shape_of(t), tuple(map(compat.size_hint, t.stride())), dtypes.itemsize(t.dtype))

    results = tensors(n.meta.get("val"))
    if not results or results[0].device.type != "cpu":
        return 0
    return scratch_bytes(n.target, n.args, results[0], layout)


def user_tags(graph: JointGraph) -> dict[fx.Node, str | None]:
    """What `torch.utils.checkpoint` asked for, by node, and what has to be saved beside that.

    Two checkpointed regions in a row keep what lies between them (`ac_graph_id` tells them apart); a region's output
    with a backward hook is kept, since the hook may be what makes recomputing possible; and so is the source of a
    mutation that the backward repeats, so that it is not applied twice. What the forward computes from an input that
    the backward overwrites is kept too: a backward that runs again would compute it from the new value.
    """
    nodes = graph.nodes
    tags = {n: _TAGS.get(n.meta["recompute"]) if "recompute" in n.meta else None for n in nodes}
    again = ("must_recompute", "prefer_recompute")
    for n in nodes:
        if tags[n] not in again:
            continue
        readers = [u for u in n.users if tags.get(u) in again]
        region = n.meta.get("ac_graph_id")
        between = region is not None and any(u.meta.get("ac_graph_id", region) > region for u in readers)
        if between or (n.meta.get("has_backward_hook") and not readers):
            tags[n] = "must_save"
    copies = [n for n in nodes if schema_of(n) is not None and op_name(n) == "copy_"]
    repeated = {n.args[0] for n in copies if _in_backward(n)}
    for n in copies:
        if not _in_backward(n) and n.args[0] in repeated and isinstance(n.args[1], fx.Node):
            tags[n.args[1]] = "must_save"
    written = {t for n in nodes if n in graph.after_tangents for t in mutated_arguments(n)}
    for n in nodes:
        if n in graph.forward and not written.isdisjoint(n.all_input_nodes):
            if is_view(n) or not isinstance(n.meta.get("val"), torch.Tensor):
                written.add(n)
            elif not is_effect(n):
                tags[n] = "must_save"
    return tags


def _is_copied_first(primal: fx.Node) -> bool:
    """Whether an input may be written when the forward has run: of one that is, AOT autograd reads a clone alone."""
    readers = [u for u in primal.users if tensors(u.meta.get("val"))]
    return len(readers) == 1 and op_name(readers[0]) == "clone"


def build_problem(
    joint: fx.GraphModule,
    num_fwd_outputs: int,
    kernels: Mapping[str, Landed] | None,
    is_kernel: Callable[[fx.Node], bool],
    *,
    device: devices.DeviceModel = devices.CPU,
    memory_budget: float = 1.0,
    on_budget: str = "error",
    static_inputs: Collection[int] = (),
) -> Problem:
    """Price a joint graph.

    Args:
        joint: forward and backward in one functional ATen graph, as AOT autograd traces it.
        num_fwd_outputs: how many of its outputs are the forward's.
        kernels: by FX node's name the fused kernel that it landed in when the whole graph was fused; None: each alone.
        is_kernel: whether a node becomes generated code; every other one is an extern.
        device: the rates that turn bytes and flops into seconds.
        memory_budget, on_budget: as `Problem` has them.
        static_inputs: indices of the primals that are parameters or buffers.
    """
    graph = JointGraph(joint, num_fwd_outputs)
    tags = user_tags(graph)
    kernels = kernels or {}
    groups = {name: k.kernel for name, k in kernels.items()}
    primals = [n for n in graph.nodes if n.op == "placeholder" and not compat.is_tangent(n)]
    parameters = {n for i, n in enumerate(primals) if i in static_inputs}
    overwritten = {t for n in graph.nodes if n not in graph.after_tangents for t in mutated_arguments(n)}
    overwritten |= {p for p in primals if _is_copied_first(p)}
    storage: dict[fx.Node, fx.Node] = {}
    stored: dict[fx.Node, bool] = {}
    values = []
    for n in graph.nodes:
        phase = _phase(n, graph, parameters)
        if phase is None:
            continue
        kind = _kind(n, is_kernel)
        base = n.all_input_nodes[0] if kind == "view" else n
        storage[n] = storage.get(base, base)
        stored[n] = stored.get(base, False) or kind in ("extern", "item") or _stored(n, graph, is_kernel, groups)
        random, effect, collective, binds = pin_of(n)
        tag = tags[n]
        priced = phase in ("forward", "either")
        if kind == "item" and any(pin_of(n.all_input_nodes[0])):
            tag = None if tag in ("must_recompute", "prefer_recompute") else tag
        values.append(
            Value(
                n.name,
                phase,
                kind,
                nbytes_of(storage[n]),
                storage[n].name,
                inputs=tuple(i.name for i in n.all_input_nodes),
                flops=kernels[n.name].instructions if n.name in kernels else _flops(n, kind),
                traffic=_traffic(n, kind, graph, is_kernel) if priced else 0.0,
                group=groups.get(n.name),
                copies=_copies(n, graph, groups) if kind == "kernel" else 1,
                is_random=random,
                has_effect=effect,
                is_collective=collective,
                binds=binds,
                savable=_savable(n, kind) and n not in overwritten,
                stored=stored[n],
                tag=tag,
                where=source_line(n, code=False),
                op=op_name(n, whole=True) if n.op == "call_function" else "",
                elements=elements_of(n),
                module=module_path(n),
                scratch=scratch_of(n) if kind == "extern" else 0,
            )
        )
    return Problem(
        tuple(values),
        tuple(dict.fromkeys(n.name for n in graph.forward_outputs)),
        tuple(dict.fromkeys(n.name for n in graph.backward_outputs)),
        tuple(n.name for n in graph.required),
        device,
        memory_budget,
        on_budget,
    )


def _phase(n: fx.Node, graph: JointGraph, parameters: Collection[fx.Node]) -> str | None:
    """The side that a node belongs to; None for one that nothing needs."""
    if compat.is_tangent(n):
        return "tangent"
    if n.op == "get_attr":
        return "parameter"
    if n.op == "placeholder":
        return "parameter" if n in parameters else "input"
    if n in graph.forward:
        return "forward"
    if n in graph.either:
        return "either"
    return "backward" if n in graph.live_backward else None


def _kind(n: fx.Node, is_kernel: Callable[[fx.Node], bool]) -> str:
    if n.op == "get_attr":
        return "constant"
    if isinstance(n.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return "symbol"
    if n.op == "placeholder":
        return "input"
    if is_view(n):
        return "view"
    if n.target is operator.getitem:
        return "item"
    if not is_kernel(n):
        return "extern"
    return "reduction" if is_reduction(n) else "kernel"


def is_reduction(n: fx.Node) -> bool:
    """Whether it reads more than its own elements: a sum, a norm, a softmax."""
    return _REDUCTION_TAG in getattr(n.target, "tags", ()) or op_name(n) in _REDUCTIONS


def _savable(n: fx.Node, kind: str) -> bool:
    val = n.meta.get("val")
    if kind == "symbol":
        return not isinstance(val, torch.SymBool)
    if kind in ("input", "constant"):
        return True
    return isinstance(val, torch.Tensor) and not is_effect(n)


def _flops(n: fx.Node, kind: str) -> float:
    if kind in ("kernel", "reduction"):
        row = ops.TABLE.get(op_name(n))
        widest = max([elements_of(n), *(elements_of(i) for i in n.all_input_nodes if kind == "reduction")])
        return widest * (row.cost if row else _PLAIN_COST)
    formula = flop_registry.get(getattr(n.target, "overloadpacket", None))
    if kind != "extern" or formula is None:
        return 0.0

    def plain(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return plain(value.meta.get("val"))
        if isinstance(value, torch.Tensor):
            return shape_of(value)  # The formulas take shapes, and leave what is no tensor as it is.
        if isinstance(value, torch.SymInt):
            return compat.size_hint(value)
        return type(value)(map(plain, value)) if isinstance(value, (tuple, list)) else value

    kwargs = {k: plain(v) for k, v in n.kwargs.items()}
    return float(formula(*map(plain, n.args), **kwargs, out_val=plain(n.meta.get("val"))))


def _traffic(n: fx.Node, kind: str, graph: JointGraph, is_kernel: Callable[[fx.Node], bool]) -> float:
    read = sum(nbytes_of(i) for i in dict.fromkeys(n.all_input_nodes))
    if kind == "extern":
        return read + nbytes_of(n)
    if kind == "reduction":
        return float(read)
    if kind == "kernel" and _read_by_extern(n, graph, is_kernel):
        return float(nbytes_of(n))
    return 0.0


def _read_by_extern(n: fx.Node, graph: JointGraph, is_kernel: Callable[[fx.Node], bool]) -> bool:
    """Whether an extern of the backward reads it, through views too: it must then be in memory."""
    stack = [n]
    while stack:
        for user in stack.pop().users:
            if is_view(user):
                stack.append(user)
            elif (user in graph.live_backward or user in graph.either) and _kind(user, is_kernel) == "extern":
                return True
    return False


def _stored(n: fx.Node, graph: JointGraph, is_kernel: Callable[[fx.Node], bool], groups: Mapping[str, int]) -> bool:
    """Whether the forward writes a kernel's value to memory anyway: for an extern or another kernel of its own, or
    for the caller."""
    stack = [n]
    while stack:
        here = stack.pop()
        if here in graph.forward_outputs:
            return True
        for user in here.users:
            if user in graph.forward and is_view(user):
                stack.append(user)
            elif user in graph.forward:
                if _kind(user, is_kernel) == "extern" or groups.get(user.name) != groups.get(n.name):
                    return True
    return False


def _copies(n: fx.Node, graph: JointGraph, groups: Mapping[str, int]) -> int:
    """Kernels of the backward that read it, each of which would compute it."""
    readers = {groups.get(u.name, u.name) for u in n.users if u in graph.live_backward or u in graph.either}
    return max(1, len(readers)) if groups else 1
