"""The options of a compile: `torch.compile(model, backend="minifuse", options={...}, mode=...)`."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

import torch

from .errors import OptionError
from .ir import device as devices

POLICIES = "minifuse.remat"
"""The group of entry points under which packages offer rematerialisation policies by name."""
MODES: Mapping[str, str] = {
    "default": "what the options say",
    "reduce-overhead": "on a GPU programs are recorded as CUDA graphs; on a CPU as default: calls are in C already",
    "max-autotune": "on a GPU schedules around the rules' are timed, what was found is kept on disk; CUDA graphs",
    "max-autotune-no-cudagraphs": "as max-autotune, without CUDA graphs",
}
RECORDED_MODES = ("reduce-overhead", "max-autotune")
TUNED_MODES = ("max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class Options:
    """What a user may choose, checked: an `Options` that exists holds only valid values.

    No option changes the meaning of a program; `remat`, `memory_budget`, `fusion_fuel`, `verify` and the mode leave
    every bit of a result as it is.
    """

    target: str = "auto"
    """What kernels are written in: `auto` (`triton` for CUDA and ROCm tensors, `c` for CPU ones), `c`, `triton`, or
    `interpret` (each kernel op by op with torch, slowly: the meaning that the others are tested against)."""

    remat: Any = "default"
    """How the backward gets an activation, loaded or recomputed: a policy's name (one of minifuse's or of an installed
    package's), the path of a plan (`.json`, from `RematPlan.to_json`), a function of the problem that returns a plan or
    the names of what to save, or an object with a `name` and `plan(problem) -> RematPlan`."""

    memory_budget: float = 1.0
    """The most that a training step may hold at its peak, inputs and parameters aside: a share (0 to 1) of what eager
    would, as predicted, or a whole number of bytes above 1. 1: no limit. 0: the least, with `on_budget="best"`."""

    on_budget: str = "error"
    """What becomes of a graph for which no plan within `memory_budget` was found: `error` names the least peak that
    was, `best` takes that plan."""

    debug_dir: str | None = None
    """Directory into which every graph is written: captured, joint, planned, kernels' source, decisions, report.
    None: `$MINIFUSE_DEBUG`, else nothing is written."""

    fusion: str = "greedy"
    """How kernels are grouped: `greedy`, or `exact`: the plan of least predicted time by integer programming, slowly,
    for graphs of at most 60 kernels; what is larger is fused greedily and the decisions say so."""

    fusion_fuel: int | None = None
    """Stop after this many fusions of a graph (0 or more), to bisect a wrong one; beyond as many as the graph has
    operators it counts launches that batches save. None: no limit."""

    fusion_rules: Any = ()
    """Rules of your own: a list of `Rule`, `forbid(...)` and `force(...)` of `minifuse.passes.fuse`, asked before the
    compiler's."""

    fusion_log: Any = None
    """Fuse as a log says, where that is legal, in the graphs that it names: a list of `Report.fusion_log` entries or
    the path of a JSON file of them."""

    device_model: str = "auto"
    """Whose rates price fusions and recomputation, and on a CPU choose the library of matrix products (a named model
    leaves them to ATen): `auto` (the GPU's by its name; the CPU's, measured once and kept in
    the cache directory), or by name: `cpu` (a server of two cores), `A100`, `H100`, `H200`, `B200`, `MI300X`.
    Unset: `$MINIFUSE_DEVICE_MODEL`, else `auto`."""

    verify: bool = False
    """Check the IR between passes; an error then names the pass. Unset: on when `$MINIFUSE_VERIFY` is 1."""

    deterministic: bool = False
    """Run PyTorch's operators under `torch.use_deterministic_algorithms(True)`: one that has no deterministic form
    raises. The setting holds for the whole process while a call runs. Generated kernels always are deterministic.
    Unset: torch's own setting."""

    rng: str = "fast"
    """Random numbers: `fast` draws them inside the fused kernels, from a seed of torch's generator; `eager` calls
    ATen's generators, numbers bit-equal to eager's."""

    precise: bool = False
    """Vector maths within 1 ulp in place of 4."""

    widen: bool = False
    """Keep half-precision intermediates of a fused kernel in float32, as other compilers do. Faster, and results then
    depend on what was fused."""

    cache_dir: str | None = None
    """Directory of the disk cache. None: `$MINIFUSE_CACHE_DIR`, else `minifuse` in the user's cache directory."""

    plan_cache: bool = True
    """Keep whole compiled graphs in the disk cache, for processes to come: for the C target, and as long as no option
    is an object or function of your own. A backward is then compiled with its forward. Unset: off when
    `$MINIFUSE_PLAN_CACHE` is 0."""

    fallback: str = "allow"
    """What becomes of an op that minifuse cannot compile: `allow` hands it to PyTorch and notes it in the report,
    `warn` also warns, `error` raises. The same of a kernel that the target's compiler refuses: it is interpreted."""

    mode: str = "default"
    """`torch.compile`'s mode, one of `MODES`; not a key of `options`."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            expected, accepts = _ACCEPTS[field.name]
            value = getattr(self, field.name)
            if not accepts(value):
                hint = _did_you_mean(value, _CHOICES.get(field.name, ()))
                raise OptionError(f"minifuse option {field.name!r}: got {value!r}, expected {expected}{hint}")

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None = None, mode: str | None = None) -> Options:
        """What `torch.compile` was given, with unset options from the environment.

        Raises:
            OptionError: an unknown option or mode, or a value of the wrong kind; names it and lists the valid ones.
        """
        given = dict(options or {})
        names = [f.name for f in dataclasses.fields(cls) if f.name != "mode"]
        for name in given:
            if name not in names:
                hint = _did_you_mean(name, names)
                raise OptionError(f"minifuse has no option {name!r}{hint}; options: {', '.join(names)}")
        mode = "default" if mode is None else mode
        if mode not in MODES:
            raise OptionError(f"minifuse has no mode {mode!r}{_did_you_mean(mode, MODES)}; modes: {', '.join(MODES)}")
        unset = {
            "debug_dir": os.environ.get("MINIFUSE_DEBUG") or None,
            "verify": os.environ.get("MINIFUSE_VERIFY", "").lower() in ("1", "true", "yes", "on"),
            "cache_dir": os.environ.get("MINIFUSE_CACHE_DIR") or None,
            "plan_cache": os.environ.get("MINIFUSE_PLAN_CACHE", "").lower() not in ("0", "false", "no", "off"),
            "device_model": os.environ.get("MINIFUSE_DEVICE_MODEL") or "auto",
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }
        return cls(**{**unset, **given}, mode=mode)


def _did_you_mean(given: object, valid: Iterable[str]) -> str:
    close = difflib.get_close_matches(given, list(valid), n=1) if isinstance(given, str) else []
    return f" (did you mean {close[0]!r}?)" if close else ""


_CHOICES: dict[str, tuple[str, ...]] = {
    "target": ("auto", "c", "triton", "interpret"),
    "remat": (
        "default",
        "priced_mincut",
        "save_all",
        "recompute_all",
        "chen_sqrt",
        "korthikanti_selective",
        "mincut",
        "knapsack_budget",
        "rotor_dp",
        "checkmate_milp",
    ),
    "on_budget": ("error", "best"),
    "fusion": ("greedy", "exact"),
    "device_model": ("auto", *devices.DEVICES),
    "rng": ("fast", "eager"),
    "fallback": ("allow", "warn", "error"),
    "mode": tuple(MODES),
}

_Check = tuple[str, Callable[[Any], bool]]


def _one_of(name: str) -> _Check:
    return "one of " + ", ".join(_CHOICES[name]), lambda value: value in _CHOICES[name]


def _is_installed(value: Any) -> bool:
    """Whether it names a plan's file, or a policy that a package offers."""
    named = isinstance(value, (str, os.PathLike))
    path = os.fspath(value) if named else ""
    return named and (path.endswith(".json") or bool(entry_points(group=POLICIES, name=path)))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_BOOL: _Check = ("True or False", lambda value: isinstance(value, bool))
_PATH: _Check = ("a directory's path or None", lambda value: value is None or (isinstance(value, str) and value != ""))

_ACCEPTS: dict[str, _Check] = {
    "target": _one_of("target"),
    "remat": (
        f"{_one_of('remat')[0]}, a plan's path (.json), a function of the problem, or an object with plan(problem)",
        lambda value: (
            value in _CHOICES["remat"]
            or _is_installed(value)
            or callable(value)
            or callable(getattr(value, "plan", None))
        ),
    ),
    "memory_budget": (
        "a share from 0 to 1, or a whole number of bytes",
        lambda value: (isinstance(value, float) and 0 <= value <= 1) or (_is_int(value) and value >= 0),
    ),
    "on_budget": _one_of("on_budget"),
    "debug_dir": _PATH,
    "fusion_fuel": ("an integer of 0 or more, or None", lambda value: value is None or (_is_int(value) and value >= 0)),
    "fusion": _one_of("fusion"),
    "fusion_rules": (
        "a list of Rule, forbid(...) and force(...)",
        lambda value: (
            isinstance(value, (list, tuple))
            and all(callable(getattr(r, "broken", None)) or callable(getattr(r, "matches", None)) for r in value)
        ),
    ),
    "fusion_log": (
        "a list of fusions or the path of a JSON file",
        lambda value: value is None or isinstance(value, (list, tuple, str, os.PathLike)),
    ),
    "device_model": _one_of("device_model"),
    "verify": _BOOL,
    "deterministic": _BOOL,
    "rng": _one_of("rng"),
    "precise": _BOOL,
    "widen": _BOOL,
    "cache_dir": _PATH,
    "plan_cache": _BOOL,
    "fallback": _one_of("fallback"),
    "mode": _one_of("mode"),
}
