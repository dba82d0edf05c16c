"""Warm starts: what was made of a graph is kept on disk, and a later process takes it from there.

AOT autograd has a cache for its own results, the metadata of a captured graph and what compilers made of it, and takes
the results of any compiler that says how they are serialised (`compat.OutputCode`). With it a second process
traces no joint graph and runs no pass: it reads the plan, the host program and the source of its C unit, whose library
is an entry of its own. The files are this package's (`runtime.cache`): checked, private, dropped by age.

Kept is what a key can name: the target is C, the options are plain values, the tables of operators, passes and rules
are those that the package came with, and nothing is to be written or warned about while a graph compiles.
"""

from __future__ import annotations

import functools
import io
import json
import pickle
import re
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

from . import compat
from .ir import ops
from .ir.device import DeviceModel
from .ir.plan import content_hash
from .options import Options
from .passes import pipeline
from .passes.fuse import rules
from .passes.lower import pointwise, structural
from .passes.lower.nodes import source_line
from .passes.remat import policies
from .records import RECORDS, Record
from .runtime import toolchain
from .runtime.build import restore
from .runtime.loading import disk_cache
from .runtime.program import Program

# Results kept of one key: AOT autograd's has the sizes of a graph's inputs in it, what was guarded on them not.
VARIANTS = 8
# A place in a user's file, as `source_line` gives it.
_PLACE = re.compile(r"[^\s/()]+:\d+")
TORCHS_OPERATORS = ("aten", "prims", "prim", "inductor", "_c10d_functional")


class CompiledGraph(compat.OutputCode):
    """A program that AOT autograd can write to its cache: as its record, from which `runtime.build` makes it again.

    `loading` is the graph that is being compiled, `lines` the user's lines of its nodes: a record that comes from the
    disk has the name and the lines of this process.
    """

    loading = ""
    lines: tuple[str, ...] = ()

    def __init__(self, record: Record, build: Callable[[], Program]) -> None:
        super().__init__()
        self._boxed_call = True  # on the instance: wrappers copy its dictionary alone
        self.record: Record | None = record
        self.build: Callable[[], Program] | None = build
        self.call: Callable[[list[Any]], Any] | None = None
        self.saved = b""

    def __call__(self, args: Any) -> Any:
        return self.call(args)  # type: ignore[misc]

    def finish(self) -> None:
        """Wait for the program."""
        if self.build is not None:
            self.call, self.build = self.build().direct, None

    def prepare_for_serialization(self) -> None:
        """Raises what makes AOT autograd go on without its cache, where a record holds what cannot be written."""
        assert self.record is not None
        written = io.BytesIO()
        try:
            _Pickler(written, self.lines).dump(self.record)
        except Exception as why:
            raise compat.NotCachedError(f"{self.record.name}: {why}") from why
        # a seventh of the bytes for milliseconds: torch holds on to what it has written
        self.saved = zlib.compress(written.getvalue(), 1)
        self.record, self.build, self.call = None, None, None

    def post_compile(self, example_inputs: Any, constants: Any, graph_kwargs: Any) -> None:
        begin = time.perf_counter()
        record = _Unpickler(io.BytesIO(zlib.decompress(self.saved)), self.lines).load()
        self.saved = b""
        program = restore(record)
        seconds = {"warm start": time.perf_counter() - begin}
        self.record = replace(record, name=f"{self.loading}_{record.stage}", seconds=seconds, warm=True)
        self.call = program.direct
        RECORDS.append(self.record)

    def set_triton_bundle(self, triton_bundle: Any) -> None:
        """Kernels are C."""


class _Pickler(pickle.Pickler):
    """What pickle cannot name, operators, and what is another in another process: the user's `lines`, `file:line code`
    of each node. A text that names some is written as what stands around them and the number of the first node of each.
    """

    def __init__(self, file: io.BytesIO, lines: tuple[str, ...]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.lines = lines
        self.first = {line.partition(" ")[0]: k for k, line in reversed(tuple(enumerate(lines))) if line}

    def persistent_id(self, value: Any) -> str | None:
        if type(value) is not str or ":" not in value:
            return None
        parts: list[str | tuple[int, bool]] = []
        at = 0
        for found in _PLACE.finditer(value):
            k = self.first.get(found[0])
            if k is not None and found.start() >= at:
                whole = value.startswith(self.lines[k], found.start())
                parts += [value[at : found.start()], (k, whole)]
                at = found.start() + len(self.lines[k] if whole else found[0])
        return json.dumps([*parts, value[at:]]) if parts else None

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, compat.OpOverload):
            return _operator, (value.namespace, value._schema.name.partition("::")[2], value._overloadname)
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    """What `_Pickler` wrote, with the lines that the nodes have now."""

    def __init__(self, file: io.BytesIO, lines: tuple[str, ...]) -> None:
        super().__init__(file)
        self.lines = lines

    def persistent_load(self, pid: str) -> str:
        return "".join(part if isinstance(part, str) else self.line(*part) for part in json.loads(pid))

    def line(self, k: int, whole: bool) -> str:
        return self.lines[k] if whole else self.lines[k].partition(" ")[0]


def _operator(namespace: str, name: str, overload: str) -> Any:
    return getattr(getattr(getattr(torch.ops, namespace), name), overload)


def session(
    name: str, gm: fx.GraphModule, options: Options, device: DeviceModel, target: str
) -> AbstractContextManager[bool]:
    """Inside, where the captured graph `gm` of this name is compiled, AOT autograd keeps its results in the disk cache;
    gives whether it does."""
    if not plain(options, target) or tables() != SHIPPED or not compat.CACHES:
        return nullcontext(False)
    tools = toolchain.find(options.precise)
    if tools is None:
        return nullcontext(False)
    CompiledGraph.loading = name
    CompiledGraph.lines = tuple(source_line(node) for node in gm.graph.nodes)
    cache = disk_cache(options.cache_dir)
    machine = [repr(asdict(device)), tools.key, str(torch.get_num_threads())]
    key = content_hash("\n".join([sources(), repr(options), *machine]))

    def read(name: str) -> Iterator[bytes]:
        for path in cache.having(f"graph_{name}."):
            data = cache.read(path)
            if data is not None:
                yield data

    def write(name: str, data: bytes) -> None:
        with cache.lock("graphs"):  # of processes that started together the first one's is kept
            if guards_of(data) in map(guards_of, read(name)):
                return
            free = (k for k in range(VARIANTS) if not cache.having(f"graph_{name}.{k}-"))
            if (k := next(free, None)) is not None:
                cache.put(f"graph_{name}.{k}", data)

    return compat.caching(key, read, write, describe)


def describe(key: Any, gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """What a graph's key is made of: the graph, its inputs, and torch's settings that choose operators while it is
    traced. What names Inductor's own code is left out: to digest it takes half a second in each process.

    Raises NotCachedError for operators whose meaning, or whose gradient, the graph does not show.
    """
    parts = [part for part in gm.modules() if isinstance(part, fx.GraphModule)]
    for op in {node.target for part in parts for node in part.graph.nodes}:
        packet = isinstance(op, (compat.OpOverload, compat.OpOverloadPacket))
        custom = packet and str(op).partition(".")[0] not in TORCHS_OPERATORS
        if custom or isinstance(op, compat.HigherOrderOperator) and "triton" in op.name():
            raise compat.NotCachedError(f"what {op} does, and its gradient, are not in the graph")
    kernels = torch.backends.cuda
    key.gm, key.example_inputs, key.cache_key_tag = gm, list(inputs), torch.compiler.config.cache_key_tag
    key.settings = (
        torch.get_default_dtype(), torch.get_default_device(), torch.get_float32_matmul_precision(),
        torch.is_inference_mode_enabled(), torch.backends.mkldnn.enabled, kernels.flash_sdp_enabled(),
        kernels.mem_efficient_sdp_enabled(), kernels.math_sdp_enabled(),
    )  # fmt: skip


def guards_of(data: bytes) -> str | None:
    """What must hold of a graph's sizes for what AOT autograd kept of it."""
    return pickle.loads(data).guards_expr


def plain(options: Options, target: str) -> bool:
    """Whether a graph compiled with these may be taken from the disk: nothing in them is code, and nothing is to be
    written or warned about while it compiles."""
    values = (getattr(options, f.name) for f in fields(options))
    simple = all(isinstance(v, (str, int, float, bool, type(None), tuple)) for v in values)
    shipped = (
        isinstance(options.remat, str) and options.remat in policies.POLICIES
    )  # and not what an installed package or a file says
    asked = options.fusion_rules or options.fusion_log or options.debug_dir or options.fallback == "warn"
    return options.plan_cache and simple and shipped and not asked and target == "c"


def tables() -> tuple[Any, ...]:
    """What users extend the compiler by, by identity."""
    found = (ops.TABLE, pointwise.ROWS, structural.STRUCTURAL, policies.POLICIES)
    return (pipeline.PASSES, rules.RULES, *(tuple((k, id(v)) for k, v in table.items()) for table in found))


SHIPPED = tables()


@functools.cache
def sources() -> str:
    """A digest of this package's own text, and torch's version."""
    texts = [path.read_text() for path in sorted(Path(__file__).parent.rglob("*.py"))]
    return content_hash("".join((torch.__version__, str(torch.version.git_version), *texts)))
