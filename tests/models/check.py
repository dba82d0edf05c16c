"""One training step of a family, compiled, beside eager and beside the same model in double precision."""

from __future__ import annotations

import copy
import math
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import minifuse
from minifuse.explain.report import is_fusible
from minifuse.passes.lower.externs import expected
from minifuse.records import RECORDS

from .families import FAMILIES
from .left import why

DRAWS = 4
# The share of pointwise and reduction operators that run in generated kernels: of each family, hence of them all.
COVERED = 0.97


@dataclass
class Found:
    """What one family showed.

    `ratios`: of each output, gradient and buffer, its error over the one allowed. `generated` of `operators`, which are
    those that are pointwise or reductions, run in generated kernels. `left`: calls of ATen that are not meant to be, by
    operator and reason.
    """

    ratios: dict[str, float]
    graphs: int = 0
    generated: int = 0
    operators: int = 0
    left: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def worst(self) -> float:
        return max(self.ratios.values())

    @property
    def wrong(self) -> dict[str, float]:
        return {name: ratio for name, ratio in self.ratios.items() if not ratio <= 1}

    @property
    def unknown(self) -> set[tuple[str, str]]:
        return {(op, reason) for op, reason in self.left if why(op, reason) is None}

    @property
    def coverage(self) -> float:
        return self.generated / self.operators


class Exactly(TorchFunctionMode):
    """Where a model asks for single precision, or for none in particular, it gets double."""

    def __enter__(self) -> Any:
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        torch.set_default_dtype(torch.float32)
        super().__exit__(*args)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args, kwargs = pytree.tree_map(lambda x: torch.float64 if x is torch.float32 else x, (args, kwargs or {}))
        return func(*args, **kwargs)


def step(model: nn.Module, run: Callable[..., Any], inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs that are tensors, buffers and gradients by parameter after one training step."""
    output = run(**inputs)
    output["loss"].backward()
    found = {name: value.detach() for name, value in output.items() if isinstance(value, Tensor)}
    found |= dict(model.named_buffers())
    return found | {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}


def doubled(inputs: dict[str, Any]) -> dict[str, Any]:
    return pytree.tree_map(lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, inputs)


def error(got: Tensor, exact: Tensor) -> float:
    """The largest difference of any element; infinite where one is not finite and the other differs."""
    if not got.numel():
        return 0.0
    got, exact = got.double(), exact.double()
    alike = (got == exact) | (got.isnan() & exact.isnan())
    return torch.where(alike, 0.0, (got - exact).abs().nan_to_num(math.inf)).max().item()


def allowance(value: Tensor, exact: Tensor) -> float:
    """4 times eager's own error, or 4 ulp of the largest magnitude; integers are exact."""
    if not value.is_floating_point() or not value.numel():
        return 0.0
    finite = exact[exact.isfinite()].abs()
    ulp = torch.finfo(value.dtype).eps * (finite.max().item() if finite.numel() else 0.0)
    return 4 * max(error(value, exact), ulp)


def check(family: str, draws: int = DRAWS, device: str = "cpu", **how: Any) -> Found:
    """Over several draws of weights and inputs: what is zero but for rounding differs by chance in any one of them.
    `how` goes to `torch.compile`."""
    torch.compiler.reset()
    RECORDS.clear()
    ours: dict[str, float] = {}
    allowed: dict[str, float] = {}
    model = None
    for draw in range(draws):
        torch.manual_seed(draw)
        plain, given = FAMILIES[family]()
        plain.to(device).train()
        inputs = pytree.tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, given)
        precise = copy.deepcopy(plain).double()
        if model is None:
            model = copy.deepcopy(plain)
            run = torch.compile(model, **{"backend": "minifuse", **how})
        model.load_state_dict(plain.state_dict())
        model.zero_grad()

        with Exactly():
            exact = step(precise, precise, doubled(inputs))
        eager = step(plain, plain, inputs)
        with torch._dynamo.config.patch(allow_rnn=True):
            compiled = step(model, run, inputs)

        for name in compiled.keys() - eager.keys():
            # What the loss does not depend on has no gradient in eager, and one of zeros where AOT autograd traced it.
            assert name.endswith(".grad") and not compiled[name].any(), name
        assert compiled.keys() >= eager.keys()
        assert math.isfinite(eager["loss"].item())
        for name, value in eager.items():
            got = compiled[name]
            assert (got.shape, got.dtype, got.stride()) == (value.shape, value.dtype, value.stride()), name
            ours[name] = max(ours.get(name, 0.0), error(got, exact[name]))
            allowed[name] = max(allowed.get(name, 0.0), allowance(value, exact[name]))
    found = Found({n: e / allowed[n] if allowed[n] else (math.inf if e else 0.0) for n, e in ours.items()})
    for report in minifuse.reports():
        fallbacks = [e for e, x in zip(report.externs, report.plan.externs, strict=True) if not expected(x.target)]
        generated, interpreted = report.operators
        found.graphs += 1
        found.generated += generated
        found.operators += generated + interpreted + sum(map(is_fusible, report.plan.externs))
        found.left.update((e.op, e.reason) for e in fallbacks)
    return found


def attempt(name: str) -> tuple[Found | str, float]:
    """What a family shows, or how it fails, and the seconds that it took."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    begin = time.perf_counter()
    try:
        return check(name), time.perf_counter() - begin
    except Exception:
        return traceback.format_exc(), time.perf_counter() - begin
