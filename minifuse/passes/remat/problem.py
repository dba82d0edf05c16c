"""What a rematerialisation policy decides about: the joint graph as plain data, priced in seconds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import networkx as nx

from minifuse.errors import RematError
from minifuse.ir.decision import bytes_text
from minifuse.ir.device import DeviceModel

PHASES = ("input", "parameter", "forward", "either", "backward", "tangent")
KINDS = ("input", "constant", "view", "item", "kernel", "reduction", "extern", "symbol")
SAVE, RECOMPUTE, OFFLOAD = ACTIONS = ("save", "recompute", "offload")
ON_BUDGET = ("error", "best")
TAGS = ("must_save", "prefer_save", "prefer_recompute", "must_recompute")
SYMBOL_BYTES = 8


@dataclass(frozen=True)
class Value:
    """One value of the joint graph.

    `phase`: "forward" if the forward's outputs need it, "backward" if it depends on a tangent, "either" if it needs
    only inputs and only the backward reads it. `storage` is the value that owns its memory (itself, unless it is a
    view) and `nbytes` the bytes of that memory. `flops` counts matrix-product flops of an extern, instructions of a
    kernel, of the backward's values too. `traffic` is the bytes moved by recomputing it inside the kernels of the
    backward: none where a kernel that runs anyway computes it in registers, its own size where an extern reads it, its
    inputs where it reduces them.
    `group` is the fused kernel it landed in, None alone; `copies` the kernels of the backward that would each
    recompute it. `tag` is the user's wish (one of `TAGS`); `savable` is false of tuples, tokens and inputs that the
    forward overwrites; `binds` marks an operator that defines a data-dependent size. `stored` says that the forward
    writes it to memory whether it is saved or not: an extern made it or reads it, or it is an output. `op` is its
    operator (`aten.bmm`), `elements` how many it has (0: not known). `where` is the user's line, `module` the path
    of the module around it, where Dynamo captured one. `scratch` is the bytes that its operator takes while it runs.
    """

    name: str
    phase: str
    kind: str
    nbytes: int
    storage: str
    inputs: tuple[str, ...] = ()
    flops: float = 0.0
    traffic: float = 0.0
    group: int | None = None
    copies: int = 1
    is_random: bool = False
    has_effect: bool = False
    is_collective: bool = False
    binds: bool = False
    savable: bool = True
    stored: bool = False
    tag: str | None = None
    where: str = ""
    op: str = ""
    elements: int = 0
    module: str = ""
    scratch: int = 0

    def __post_init__(self) -> None:
        for field, valid in (("phase", PHASES), ("kind", KINDS), ("tag", (None, *TAGS))):
            found = getattr(self, field)
            if found not in valid:
                raise RematError(f"{self.name}: {field} is {found!r}, expected one of {', '.join(map(str, valid))}")

    @property
    def is_given(self) -> bool:
        """Whether it is there when the forward starts and stays: keeping it costs nothing."""
        return self.phase in ("input", "parameter")

    @property
    def pinned(self) -> str | None:
        """Why it may run only once, or None."""
        if self.is_random:
            return "random"
        if self.has_effect:
            return "effect"
        if self.is_collective:
            return "collective"
        return "data-dependent size" if self.binds else None

    @property
    def must_recompute(self) -> bool:
        """Whether the user forbids that it is kept, and it may run again; an item is kept or not as its operator is."""
        return self.tag == "must_recompute" and self.pinned is None and self.kind not in ("item", "input", "constant")

    @property
    def wants_recompute(self) -> bool:
        """Whether the user asked for it to be recomputed and it may be; a preference counts: checkpointing sets one."""
        return self.tag in ("must_recompute", "prefer_recompute") and self.pinned is None


@dataclass(frozen=True)
class Problem:
    """A joint graph to decide about. `values` are in topological order, those of the backward included.

    `required` are the values, inputs among them, that the backward reads and that need no tangent. `memory_budget` is
    the most that a step may hold at its peak: a share of eager's as predicted (0: the least), or above 1 bytes.
    `on_budget` says what becomes of a plan that holds more: "error" refuses it, "best" takes it.
    """

    values: tuple[Value, ...]
    forward_outputs: tuple[str, ...]
    backward_outputs: tuple[str, ...]
    required: tuple[str, ...]
    device: DeviceModel
    memory_budget: float = 1.0
    on_budget: str = "error"

    @cached_property
    def memo(self) -> dict[Any, Any]:
        """What was found out about it, by what asks: a problem does not change."""
        return {}

    @cached_property
    def by_name(self) -> Mapping[str, Value]:
        return {v.name: v for v in self.values}

    @cached_property
    def position(self) -> Mapping[str, int]:
        return {v.name: i for i, v in enumerate(self.values)}

    @cached_property
    def root(self) -> Mapping[str, str]:
        """The storage of each value."""
        return {v.name: v.storage for v in self.values}

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """The bytes of each storage; none of a tuple: its items are what has memory."""
        return {v.name: v.nbytes if v.savable or v.is_given else 0 for v in self.values}

    def __getitem__(self, name: str) -> Value:
        return self.by_name[name]

    def save_seconds(self, v: Value) -> float:
        """Seconds that saving costs: a read in the backward, and a write in the forward where nothing else asks for
        it; none for an input."""
        if v.is_given:
            return 0.0
        return (1 if v.stored else 2) * max(v.nbytes, SYMBOL_BYTES) / self.device.dram

    def recompute_seconds(self, v: Value) -> float:
        """Seconds that computing it in the backward adds, its inputs being there."""
        if v.is_given or v.phase == "either" or v.kind in ("view", "item", "symbol", "constant"):
            return 0.0
        device = self.device
        moving = v.traffic / device.dram
        if v.kind == "extern":
            return device.launch + max(v.flops / device.flops, moving)
        launch = device.launch if v.kind == "reduction" else 0.0
        return launch + v.copies * v.flops / device.vector + moving

    def offload_seconds(self, v: Value) -> float:
        """Seconds of a way to the host's memory and back; where the device is the host, of two copies."""
        return 2 * self.transfer_seconds(v)

    def transfer_seconds(self, v: Value) -> float:
        """Seconds of one way."""
        link = self.device.link or self.device.dram / 2
        return 0.0 if v.is_given else v.nbytes / link

    def saved_bytes(self, names: Iterable[str]) -> int:
        """Bytes that these values hold between the passes: each storage once, inputs and parameters not at all."""
        roots = {self[n].storage for n in names}
        return sum(self[r].nbytes for r in roots if not self[r].is_given)

    def to_networkx(self) -> nx.DiGraph:
        """The data dependencies, producer to reader; a node has its value's fields, and both costs in seconds."""
        graph = nx.DiGraph(forward_outputs=self.forward_outputs, required=self.required)
        for v in self.values:
            costs = {"save_seconds": self.save_seconds(v), "recompute_seconds": self.recompute_seconds(v)}
            graph.add_node(v.name, **asdict(v), **costs, required=v.name in self._required_set)
        graph.add_edges_from((i, v.name) for v in self.values for i in v.inputs)
        return graph

    @cached_property
    def _required_set(self) -> frozenset[str]:
        return frozenset(self.required)

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Problem:
        """The inverse of `to_json`. Raises RematError on a value that is not valid."""
        data: dict[str, Any] = json.loads(text)
        values = tuple(Value(**{**v, "inputs": tuple(v["inputs"])}) for v in data["values"])
        names = {k: tuple(data[k]) for k in ("forward_outputs", "backward_outputs", "required")}
        return cls(values, **names, device=DeviceModel.from_json(data["device"]), memory_budget=data["memory_budget"],
                   on_budget=data["on_budget"])  # fmt: skip

    def __str__(self) -> str:
        """A table: the values that the backward could get in more than one way, their costs in microseconds."""
        rows: list[tuple[str, ...]] = [("value", "phase", "kind", "bytes", "save us", "recompute us", "notes")]
        for v in self.values:
            if v.phase in ("backward", "tangent"):
                continue
            notes = [n for n in (v.pinned, v.tag, "required" if v.name in self._required_set else None) if n]
            if v.storage != v.name:
                notes.append(f"view of {v.storage}")
            seconds = (self.save_seconds(v), self.recompute_seconds(v))
            costs = (f"{1e6 * s:.3g}" for s in seconds)
            rows.append((v.name, v.phase, v.kind, bytes_text(v.nbytes), *costs, ", ".join(notes)))
        widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows)
