"""Private names of torch, each with the versions it was seen in; triton's are in `compat_triton`, and nowhere else.

torch 2.11 to 2.13 is supported.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pickle
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx
from torch._C._dynamo import guards as _guards  # 2.11-2.13
from torch._decomp import _core_aten_decompositions_post_autograd, decomposition_table  # 2.11-2.13
from torch._dynamo.backends.common import aot_autograd as _aot_autograd  # 2.11-2.13
from torch._dynamo.utils import get_metrics_context  # 2.11-2.13
from torch._functorch import config as _functorch_config  # 2.11-2.13
from torch._functorch import partitioners  # 2.11-2.13
from torch._guards import TracingContext, tracing  # 2.11-2.13
from torch._ops import HigherOrderOperator as HigherOrderOperator  # 2.11-2.13
from torch._ops import OpOverload as OpOverload  # 2.11-2.13
from torch._ops import OpOverloadPacket as OpOverloadPacket  # 2.11-2.13
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily  # 2.11-2.13
from torch.fx.experimental.proxy_tensor import is_sym_node, make_fx  # 2.11-2.13
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true  # 2.11-2.13
from torch.utils import _pytree as pytree  # 2.11-2.13
from torch.utils._sympy.functions import FloorDiv as SympyFloorDiv  # 2.11-2.13
from torch.utils._sympy.functions import Max as SympyMax
from torch.utils._sympy.functions import Mod as SympyMod
from torch.utils._sympy.functions import PythonMod as SympyPythonMod
from torch.utils._sympy.printers import PythonPrinter  # 2.11-2.13

from minifuse.ir.index import Expr, Sym, as_expr
from minifuse.ir.plan import Symbol
from minifuse.ir.shape import product

try:  # 2.13
    from torch._functorch._aot_autograd.autograd_cache import AOTAutogradCache, AOTAutogradCacheDetails
    from torch._functorch._aot_autograd.autograd_cache import BypassAOTAutogradCache as _NotCached
    from torch._functorch._aot_autograd.schemas import SerializableAOTDispatchCompiler as _Serializable
    from torch._inductor.codecache import FxGraphCache
    from torch._inductor.output_code import OutputCode as OutputCode

    _HOOKS: tuple[tuple[Any, str], ...] = (
        *((AOTAutogradCache, name) for name in ("iterate_over_candidates", "_write_to_local_cache")),
        (AOTAutogradCacheDetails, "_init_fx_graph_hash_details"),
    )
    CACHES = all(hasattr(owner, name) for owner, name in _HOOKS)  # what `caching` knows
except ImportError:
    CACHES, _NotCached, OutputCode = False, RuntimeError, object  # type: ignore[assignment, misc]

NotCachedError: type[Exception] = _NotCached

try:  # 2.13
    from torch._functorch._aot_autograd.graph_compile import is_opaque_node as _is_opaque_node
except ImportError:  # 2.11
    _is_opaque_node = None  # type: ignore[assignment]

LINEAR: Any = torch.ops.mkldnn._linear_pointwise.default if torch.backends.mkldnn.is_available() else None  # 2.11-2.13
"""oneDNN's `x @ w.t() + bias` of float32 (x, w, bias or None, "none", [], ""); None where torch came without it."""


# -- sizes ------------------------------------------------------------------------------------------
def expr_of_symint(s: Any, symbols: MutableMapping[str, Symbol], bind: str | None = None) -> Expr:
    """A torch.SymInt as our expression; symbols met on the way are entered with hint and range.

    A size that a guard has made one is one: a dimension of it broadcasts.
    `bind` names the input that carries this size, when the size is a symbol of its own.
    Parts that are neither sums, products, floor divisions nor remainders become symbols whose
    `source` is a Python expression of the others.
    """
    if isinstance(s, int):
        return as_expr(s)
    node = s.node
    expr = _convert(node.expr, node.shape_env, symbols)
    atom = expr.atom
    if bind is not None and isinstance(atom, Sym) and not symbols[atom.name].source:
        known = symbols[atom.name]
        symbols[atom.name] = Symbol(known.name, known.hint, bind)
    if (
        not isinstance(atom, Sym)
        and expr.evaluate({n: k.hint for n, k in symbols.items()}) == 1
        and statically_known_true(s == 1)
    ):
        return as_expr(1)
    return expr


def expr_of_stride(s: Any, symbols: MutableMapping[str, Symbol]) -> Expr:
    """A stride as our expression. torch writes `max(1, n)` for the length of a dimension that may be empty;
    where it is, no element has an address and `n` will do."""
    if isinstance(s, int):
        return as_expr(s)
    plain = s.node.expr.replace(_is_at_least_one, lambda e: sympy.Mul(*(a for a in e.args if a != 1)))
    return _convert(plain, s.node.shape_env, symbols)


def _is_at_least_one(e: sympy.Expr) -> bool:
    return isinstance(e, (SympyMax, sympy.Max)) and len(e.args) == 2 and 1 in e.args


def _convert(e: sympy.Expr, env: Any, symbols: MutableMapping[str, Symbol]) -> Expr:
    def part(k: int) -> Expr:
        return _convert(e.args[k], env, symbols)

    if isinstance(e, sympy.Integer):
        return as_expr(int(e))
    if isinstance(e, sympy.Symbol):
        name = str(e)
        if name not in symbols:
            symbols[name] = Symbol(name, _hint(e, env))
        low, high = _range(e, env)
        return Sym(name, low, high).expr
    if isinstance(e, sympy.Add):
        return sum(map(part, range(len(e.args))), as_expr(0))
    if isinstance(e, sympy.Mul) and all(a.is_integer for a in e.args):
        return product(map(part, range(len(e.args))))
    if isinstance(e, sympy.Pow) and e.exp.is_Integer and int(e.exp) > 0:
        return product([part(0)] * int(e.exp))
    if isinstance(e, SympyFloorDiv):
        return part(0) // part(1)
    if isinstance(e, (SympyMod, SympyPythonMod)):
        return part(0) % part(1)
    for inner in sorted(e.free_symbols, key=str):
        _convert(inner, env, symbols)
    text = PythonPrinter().doprint(e)
    low, high = _bounds(env.bound_sympy(e))
    for name, known in symbols.items():
        if known.source == text:
            return Sym(name, low, high).expr
    name = f"z{len(symbols)}"
    symbols[name] = Symbol(name, _hint(e, env), text)
    return Sym(name, low, high).expr


def _hint(e: sympy.Expr, env: Any) -> int:
    """A value to plan with: torch's own hint, else a round size for what is known only at run time."""
    values = env.backed_var_to_val if hasattr(env, "backed_var_to_val") else env.var_to_val  # renamed in 2.11
    found = e.xreplace(dict(values))
    return int(found) if found.is_Integer else 4096


def _range(e: sympy.Symbol, env: Any) -> tuple[int, int | None]:
    bounds = env.var_to_range.get(e)
    return (0, None) if bounds is None else _bounds(bounds)


def _bounds(found: Any) -> tuple[int, int | None]:
    """A range of torch's as integers; what is unbounded below has a low end that no size reaches."""
    low = int(found.lower) if found.lower.is_Integer else -(2**62)
    high = int(found.upper) if found.upper.is_Integer and int(found.upper) < 2**40 else None
    return low, high


class TracedSize(NamedTuple):
    """A size that a graph was captured with as a symbol: where a call finds it, the value that it was traced with, its
    range (`high` None: unbounded), the number or the other size that a guard made of it, and the line that did."""

    source: str
    hint: int
    low: int
    high: int | None
    fixed: str
    where: str


def traced_sizes() -> list[TracedSize]:
    """Those of the graph that is being compiled."""
    context = TracingContext.try_get()
    env = None if context is None or context.fake_mode is None else context.fake_mode.shape_env
    if env is None:
        return []
    names = {symbol: sympy.Symbol(_source(given[0].name)) for symbol, given in env.var_to_sources.items() if given}
    found = []
    for symbol, name in names.items():
        fixed = env.replacements.get(symbol)
        line = getattr(env.replacements_slocs.get(symbol), "maybe_user_loc", None)
        place = re.fullmatch(r"(.*?)\s*# (?:.*/)?([^/]+:\d+) in .*", line or "")
        where = "" if place is None else f"{place[2]} {place[1]}"
        became = "" if fixed is None else str(fixed.xreplace(names))
        found.append(TracedSize(str(name), _hint(symbol, env), *_range(symbol, env), became, where))
    return found


def _source(name: str) -> str:
    """Dynamo's name of a source as users write it: `x.size(0)` for `L['x'].size()[0]`."""
    return re.sub(r"(size|stride)\(\)\[(\d+)\]", r"\1(\2)", re.sub(r"\b[LG]\['(\w+)'\]", r"\1", name))


def symbol_names(s: Any) -> set[str]:
    """The names of the symbols of a torch.SymInt."""
    return {str(x) for x in s.node.expr.free_symbols}


def is_unbacked(s: Any) -> bool:
    """Whether a size depends on data and so is known only when the call has got there."""
    return bool(free_unbacked_symbols(s))


def size_hint(s: Any) -> int:
    """A size as a number to plan with."""
    return s if isinstance(s, int) else _hint(s.node.expr, s.node.shape_env)


def is_subclass_like(t: torch.Tensor) -> bool:
    """Whether a traced tensor stands for something that is no plain strided tensor."""
    return t.layout is not torch.strided


# -- capture ----------------------------------------------------------------------------------------
def core_decompositions() -> dict[Any, Callable[..., Any]]:
    """torch's own decompositions into core ATen, less those that autograd does itself: to find these takes 0.3 s."""
    return dict(_core_aten_decompositions_post_autograd())


def all_decompositions() -> Mapping[Any, Callable[..., Any]]:
    """Every decomposition that torch knows."""
    return decomposition_table


def registered_prim(name: str) -> Any:
    """The overload `prims::name`, or None while no module defines it: Dynamo loads some when it needs them."""
    packet = getattr(torch.ops.prims, name, None)
    return None if packet is None else packet.default


real_tensors = unset_fake_temporarily
"""A context in which tensors are what they are, while a graph of fake ones is compiled. 2.11-2.13."""


@contextmanager
def faked(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """These tensors without their data, for tracing inside: sizes are fixed, `requires_grad` is kept."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with tracing(TracingContext(mode)):
        yield [mode.from_tensor(t) for t in tensors]


@contextmanager
def resizing_whole(names: Sequence[str]) -> Iterator[None]:
    """Of these ATen operators those by known sizes stay in one piece while autograd traces inside.

    torch's Python kernels take them apart before autograd sees them, so that their gradients are scatters of the parts.
    ATen's own, and the gradients' shapes, do not take symbolic sizes. 2.11-2.13.
    """
    packets = [getattr(torch.ops.aten, name) for name in names]
    before = {op: dict(op.py_kernels) for packet in packets for op in (packet.default, packet.vec)}
    try:
        for packet in packets:
            for key in (torch._C.DispatchKey.Autograd, torch._C.DispatchKey.CompositeImplicitAutograd):
                packet.default.py_kernels.pop(key, None)
                packet.vec.py_kernels[key] = functools.partial(_resize, packet.default, packet.vec.py_kernels[key])
        for op in before:
            op._dispatch_cache.clear()
        yield
    finally:
        for op, kernels in before.items():
            op.py_kernels.clear()
            op.py_kernels.update(kernels)
            op._dispatch_cache.clear()


def _resize(whole: OpOverload, apart: Callable[..., Any], x: torch.Tensor, size: Any, *options: Any) -> Any:
    """A `vec` overload by the other one; what stands last are the factors of each dimension, or None."""
    if any(isinstance(s, torch.SymInt) for s in (*x.shape, *(size or ()))):
        return apart(x, size, *options)
    *rest, factors = options
    if size is None:
        size = [int(s * f) for s, f in zip(x.shape[2:], factors, strict=True)]
    return whole(x, size, *rest, *(factors or [None] * len(size)))


def trace(fn: Callable[..., Any], inputs: Sequence[torch.Tensor], user: Callable[..., Any]) -> fx.GraphModule:
    """`fn(*inputs)` as a graph of ATen operators, before autograd and decompositions.

    Nodes carry the lines of `user`, a function that `fn` calls; torch keeps those of methods called `forward` by
    itself, and others' since 2.13.
    """
    keep_lines = getattr(fx.proxy, "_register_stack_trace_anchor", None)
    if keep_lines is not None:
        keep_lines(user)
    return make_fx(fn, pre_dispatch=True, record_module_stack=True, record_stack_traces=True)(*inputs)


tree_flatten, tree_unflatten = pytree.tree_flatten, pytree.tree_unflatten


def aot_autograd(**kwargs: Any) -> Callable[..., Any]:
    """A Dynamo backend that hands joint, forward and backward ATen graphs to these compilers."""
    return _aot_autograd(**kwargs)


def keep_saved() -> None:
    """What the forward that is being compiled saves stays its owner's: a backward that buffers are donated to may not
    run twice. 2.11-2.13."""
    if (meta := forward_metadata()) is not None:
        meta.bw_donated_idxs = []


def dynamo_seconds() -> float:
    """Seconds since Dynamo began with what is being compiled; 0 outside of it. 2.11-2.13."""
    context = get_metrics_context()
    begin = context._start_time_ns if context._level else 0
    return (time.time_ns() - begin) / 1e9 if begin else 0.0


def forward_metadata() -> Any:
    """AOT autograd's metadata of the graph that is being compiled, or None outside of it."""
    context = TracingContext.try_get()
    return None if context is None else context.fw_metadata


# -- AOT autograd's cache ------------------------------------------------------------------------------
def serializable(compiler: Callable[..., Any]) -> Any:
    """A compiler whose results AOT autograd's cache may write: it returns an `OutputCode`. 2.13."""
    return _Serializable(OutputCode, compiler)


@contextmanager
def caching(tag: str, read: Callable[[str], Iterable[bytes]], write: Callable[[str, bytes], None],
            describe: Callable[[Any, fx.GraphModule, Sequence[Any]], None]) -> Iterator[bool]:  # fmt: skip
    """In this thread AOT autograd takes its results by `read` and keeps them by `write`, both by a key: a digest of
    `tag`, of what it knows of a graph, and of what `describe` adds as attributes of its first argument (or raises
    NotCachedError). A backward is compiled with its forward. Gives True. 2.13."""
    me, before = threading.get_ident(), [vars(owner).get(name) for owner, name in _HOOKS]
    theirs, written, described = (getattr(owner, name) for owner, name in _HOOKS)

    def candidates(local: bool, remote: Any, key: str) -> Iterator[tuple[Any, bytes, bool]]:
        mine = threading.get_ident() == me
        yield from ((pickle.loads(data), data, True) for data in read(key)) if mine else theirs(local, remote, key)

    def keep(key: str, content: bytes) -> None:
        (write if threading.get_ident() == me else written)(key, content)

    def details(self: Any, gm: fx.GraphModule, inputs: Sequence[Any], fx_config: Any) -> None:
        if threading.get_ident() != me:
            described(self, gm, inputs, fx_config)
            return
        FxGraphCache._check_can_cache(gm, inputs, fx_config)
        describe(self, gm, inputs)

    both: dict[str, Any] = {"bundled_autograd_cache": True, "force_non_lazy_backward_lowering": True}
    settings: Any = torch.compiler.config
    try:
        for (owner, name), own in zip(_HOOKS, (staticmethod(candidates), staticmethod(keep), details), strict=True):
            setattr(owner, name, own)
        with settings.patch(cache_key_tag=f"{settings.cache_key_tag}{tag}"), _functorch_config.patch(both), \
             torch.compiler._cache.CacheArtifactManager.with_fresh_cache():  # it would keep the bytes  # fmt: skip
            yield True
    finally:
        for (owner, name), old in zip(_HOOKS, before, strict=True):
            delattr(owner, name)
            if old is not None:  # none of its own: it is a base class' again
                setattr(owner, name, old)


# -- AOT autograd's joint graph and its partitioner ------------------------------------------------------------------
_EXTRACT_PARAMETERS = frozenset(inspect.signature(partitioners._extract_fwd_bwd_modules).parameters)


def storage_id(val: Any) -> int | None:
    """What is equal of two traced tensors that share memory, while both live; None where there is no memory to share.
    `StorageWeakRef` is made from the same. 2.11-2.13."""
    try:
        return val.untyped_storage()._cdata if isinstance(val, torch.Tensor) else None
    except NotImplementedError:
        return None


empty_strided_cpu = _guards._empty_strided_cpu  # type: ignore[attr-defined]
empty_strided_cuda: Any = getattr(_guards, "_empty_strided_cuda", None)
"""`torch.empty_strided` for the CPU or the current GPU as (size, stride, dtype), in half the time. 2.11-2.13."""

reinterpret_tensor = _guards._reinterpret_tensor  # type: ignore[attr-defined]
"""A view as (tensor, size, stride, offset from the tensor's own first element), in half the time of `as_strided`.
2.11-2.13."""


def joint_outputs(joint: fx.GraphModule) -> list[Any]:
    """What a joint graph returns, flat: the forward's outputs, then the gradients."""
    return pytree.arg_tree_leaves(*joint.graph.output_node().args)


def is_primal(node: fx.Node) -> bool:
    """Whether a placeholder of a joint, forward or backward graph is an input of the captured graph."""
    return node.op == "placeholder" and node.name.startswith("primals_")


def is_tangent(node: fx.Node) -> bool:
    """Whether a placeholder is a gradient that arrives from outside. AOT names them so: torch 2.11 to 2.13."""
    return node.op == "placeholder" and is_tangent_name(str(node.target))


def is_tangent_name(name: str) -> bool:
    """Whether an input of a backward by its name is a gradient that arrives from outside."""
    return "tangents" in name


def has_effect_token(node: fx.Node) -> bool:
    """Whether a node is an operator with an ordered effect, threaded by tokens. torch 2.11 to 2.13."""
    return node.target is torch.ops.higher_order.with_effects


def is_rng_wrapper(node: fx.Node) -> bool:
    """Whether a node draws from, or replays, a generator's state. torch 2.11 to 2.13."""
    name = getattr(node.target, "__name__", "") if isinstance(node.target, HigherOrderOperator) else ""
    return name in ("run_and_save_rng_state", "run_with_rng_state", "graphsafe_run_with_rng_state")


def is_opaque(node: fx.Node) -> bool:
    """Whether a node's value is neither a tensor nor a number (a process group, a script object).

    torch 2.13 keeps them apart from tensors; 2.11 has no such notion, and there nothing is opaque.
    """
    return _is_opaque_node is not None and bool(_is_opaque_node(node))


def extract_forward_backward(
    joint: fx.GraphModule, saved: Sequence[fx.Node], *, num_fwd_outputs: int
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Cut a joint graph: the forward returns `saved` (tensors and sizes) as well, the backward takes them as inputs.

    What the backward does not read is dropped from `saved`, sizes that its inputs' shapes mention are added.
    `_extract_fwd_bwd_modules` has taken opaque values apart from tensors since torch 2.13.
    """
    sizes = [n for n in saved if is_sym_node(n)]
    opaque = [n for n in saved if is_opaque(n)] if "saved_opaque_nodes" in _EXTRACT_PARAMETERS else []
    apart = {*sizes, *opaque}
    values = [n for n in saved if n not in apart]
    extra: dict[str, Any] = {"saved_opaque_nodes": opaque} if "saved_opaque_nodes" in _EXTRACT_PARAMETERS else {}
    return partitioners._extract_fwd_bwd_modules(
        joint, values, saved_sym_nodes=sizes, num_fwd_outputs=num_fwd_outputs, **extra
    )


def count_mutated_inputs(meta: Any) -> int:
    """How many outputs of a forward graph are new values of inputs, before the user's own outputs."""
    return int(meta.num_mutated_inp_runtime_indices)  # 2.11-2.13


# -- CUDA graphs: all of Inductor comes with these names, so that they are imported when they are used. 2.11-2.13
def unrecordable(gm: fx.GraphModule) -> str:
    """The first operator of a graph that a CUDA graph may not hold, by its target; empty where none is."""
    node = importlib.import_module("torch._inductor.utils").get_first_incompatible_cudagraph_node(gm)
    return "" if node is None else str(node.target)


def cuda_graphs(run: Callable[[list[Any]], Any], gm: fx.GraphModule, stage: str, **more: Any) -> Any:
    """A boxed callable behind PyTorch's trees of CUDA graphs."""
    described = importlib.import_module("torch._inductor.cudagraph_utils").get_placeholder_info(gm.graph)
    traces = [getattr(n, "stack_trace", None) for n in gm.graph.output_node().args[0]]  # type: ignore[union-attr]
    return importlib.import_module("torch._inductor.compile_fx").cudagraphify(
        run, stack_traces=traces, is_backward=stage == "backward", is_inference=stage == "inference",
        placeholders=described, **more,
    )  # fmt: skip


def say_backward_runs(device: int) -> None:
    """Tell the trees of a device that a backward runs which is none of theirs."""
    manager = importlib.import_module("torch._inductor.cudagraph_trees").get_manager(device, False)
    if manager is not None:
        manager.set_to_running_backward()


def forget_cuda_graphs() -> None:
    """Drop all recordings and their memory, if there are any."""
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is not None and torch.cuda.is_available():
        trees.reset_cudagraph_trees()


def current_raw_stream(device: int) -> int:
    """The current CUDA stream of a device as the driver's handle. torch 2.11-2.13."""
    return int(torch._C._cuda_getCurrentRawStream(device))


@contextmanager
def errors_of_backends() -> Iterator[None]:
    """What a backend raises, as it raised it, without Dynamo's wrapping. torch 2.11-2.13."""
    try:
        yield
    except torch._dynamo.exc.BackendCompilerFailed as error:
        raise error.inner_exception from None


def original(fn: Any) -> Any:
    """The function or module that `torch.compile` was given, of one that it gave back. torch 2.11-2.13."""
    return getattr(fn, "_orig_mod", getattr(fn, "_torchdynamo_orig_callable", fn))
