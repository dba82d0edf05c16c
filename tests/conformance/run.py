"""PyTorch's own operator database (OpInfo) as a judge: every operator with its samples, forward and backward.

All samples of an operator go through one compiled function, so that an operator costs one compile; only when that
differs from eager are its samples tried one by one. What fails is put to `aot_eager`, to tell what torch's own
tracing cannot do from what minifuse does wrong.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils import _pytree as pytree

from minifuse.records import RECORDS

Sample = tuple[Any, tuple[Any, ...], dict[str, Any]]
OPTIONS = {"verify": True, "rng": "eager", "fallback": "allow"}
SEED = 20
# What these give is whatever the memory held.
UNDEFINED = ("empty", "new_empty")


DTYPES = {str(t).removeprefix("torch."): t for t in (
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool,
    torch.complex64,
)}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One operator's samples of one dtype, at most `limit`, with static or dynamic shapes, compiled for a target.

    The target "triton" needs TRITON_INTERPRET=1 in the environment.
    """

    op: str
    dtype: str
    dynamic: bool
    limit: int = 8
    target: str = "auto"


@dataclass(frozen=True)
class Failure:
    """`op`: name and variant of the OpInfo. `kind`: "wrong" (ran and differs), "error" (raised), "refused" (right, but
    not by the target's kernels), "crash" (ended or held the process), "torch" (`aot_eager` fails as well), "harness"
    (no verdict)."""

    op: str
    dtype: str
    dynamic: bool
    sample: int
    kind: str
    message: str

    def __str__(self) -> str:
        shapes = "dynamic" if self.dynamic else "static"
        return f"{self.kind:6} {self.op} {self.dtype} {shapes} sample {self.sample}: {self.message}"


def title(info: Any) -> str:
    return f"{info.name}.{info.variant_test_name}" if info.variant_test_name else info.name


@functools.cache
def operators() -> dict[str, Any]:
    """Title -> OpInfo, in the database's order."""
    return {title(info): info for info in op_db}


def samples(info: Any, dtype: torch.dtype, limit: int) -> list[Sample]:
    """At most `limit` of the operator's samples, spread evenly; tensors need gradients where the operator has them."""
    torch.manual_seed(SEED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = list(info.sample_inputs("cpu", dtype, requires_grad=_differentiable(info, dtype)))
    found = [s for s in found if not _sparse((s.input, s.args, s.kwargs))]
    step = max(1, -(-len(found) // limit))
    return [(s.input, tuple(s.args), dict(s.kwargs)) for s in found[::step]]


def _differentiable(info: Any, dtype: torch.dtype) -> bool:
    continuous = dtype.is_floating_point or dtype.is_complex
    return continuous and info.supports_autograd and info.supports_dtype(dtype, "cpu") and dtype in info.backward_dtypes


def _sparse(args: Any) -> bool:
    return any(isinstance(x, Tensor) and x.layout is not torch.strided for x in pytree.tree_leaves(args))


def outcome(run: Callable[[list[Sample]], Any], given: list[Sample]) -> list[list[Tensor | None]]:
    """A group of tensors a sample: outputs, gradients of what needs them, and the arguments afterwards."""
    mine = copy.deepcopy(given)
    torch.manual_seed(SEED)
    outputs = run(mine)
    groups: list[list[Tensor | None]] = []
    roots: list[Tensor] = []
    for out in outputs:
        leaves = [x if isinstance(x, Tensor) else torch.tensor(x) for x in pytree.tree_leaves(out)
                  if isinstance(x, (Tensor, bool, int, float, complex))]  # fmt: skip
        groups.append(list(leaves))
        roots += [x for x in leaves if x.requires_grad]
    if roots:
        torch.manual_seed(SEED + 1)
        torch.autograd.backward(roots, [_direction(r) for r in roots])
    for group, sample in zip(groups, mine, strict=True):
        tensors = [x for x in pytree.tree_leaves(sample) if isinstance(x, Tensor)]
        group += [x.grad for x in tensors if x.is_leaf] + tensors
    return groups


def _direction(root: Tensor) -> Tensor:
    """A gradient that is neither all ones nor symmetric."""
    steps = torch.arange(root.numel(), dtype=torch.float64).remainder(7).add(1).div(4).to(root.dtype)
    return steps.reshape(root.shape)


def differs(got: list[Tensor | None], want: list[Tensor | None], values: bool = True) -> str:
    """What a caller could see differ between two groups of tensors; empty when nothing."""
    if len(got) != len(want):
        return f"{len(got)} tensors, expected {len(want)}"
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        if a is None or b is None:
            if a is not b:
                return f"tensor {k} is {a if a is None else 'there'}, expected {b if b is None else 'a tensor'}"
            continue
        what = [(x.shape, x.dtype, x.layout, x.requires_grad) for x in (a, b)]
        if what[0] != what[1]:
            return f"tensor {k}: found {what[0]}, expected {what[1]}"
        if b.layout is torch.strided and b.numel() > 1 and _strides(a) != _strides(b):
            return f"tensor {k}: strides {a.stride()}, expected {b.stride()} of shape {tuple(b.shape)}"
        problem = _values(a.detach(), b.detach()) if values else ""
        if problem:
            return f"tensor {k}: {problem}"
    return ""


def _strides(x: Tensor) -> list[int]:
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


def _values(a: Tensor, b: Tensor) -> str:
    try:
        torch.testing.assert_close(a, b, equal_nan=True, check_stride=False)
    except AssertionError as found:
        if not (b.is_floating_point() or b.is_complex()):
            return str(found).splitlines()[0]
        # The order of a sum may differ: by a few units of the largest magnitude of a tensor.
        a64, b64 = (x.to(torch.complex128 if x.is_complex() else torch.float64) for x in (a, b))
        same = (a64.isnan() == b64.isnan()).all() and (a64.isinf() == b64.isinf()).all()
        finite = b64.isfinite() & a64.isfinite()
        error, scale = (a64 - b64).abs()[finite], b64.abs()[finite]
        if same and error.numel() and error.max() <= 32 * torch.finfo(b.dtype).eps * scale.max():
            return ""
        return f"{b.dtype} values differ by up to {error.max().item() if error.numel() else 'NaN or infinity'}"
    return ""


def compiled(info: Any, job: Job, backend: str) -> Callable[[list[Sample]], Any]:
    op = info.op

    def batch(given: list[Sample]) -> list[Any]:
        return [op(s[0], *s[1], **s[2]) for s in given]

    options = {"options": {**OPTIONS, "target": job.target}} if backend == "minifuse" else {}
    return torch.compile(batch, backend=backend, dynamic=job.dynamic, **options)


def eager(info: Any) -> Callable[[list[Sample]], Any]:
    return lambda given: [info.op(s[0], *s[1], **s[2]) for s in given]


def attempt(info: Any, job: Job, backend: str, given: list[Sample], want: list[list[Tensor | None]]) -> list[str]:
    """For each sample what is wrong, what was raised (behind "raised: "), or which kernel the target refused."""
    torch._dynamo.reset()
    RECORDS.clear()
    try:
        got = outcome(compiled(info, job, backend), given)
    except Exception as why:
        return [f"raised: {type(why).__name__}: {str(why).strip().splitlines()[0] if str(why).strip() else ''}"] * len(
            given
        )
    defined = not info.name.startswith(UNDEFINED)
    refused = next((f"refused: {d}" for r in RECORDS for d in r.decisions if d.rule == "interpreted"), "")
    return [differs(g, w, defined) or refused for g, w in zip(got, want, strict=True)]


def check(job: Job) -> list[Failure]:
    """What of one operator differs from eager."""
    try:
        return list(_check(job))
    except Exception as why:
        return [Failure(job.op, job.dtype, job.dynamic, -1, "harness", f"{type(why).__name__}: {why}")]


def _check(job: Job) -> Iterator[Failure]:
    info = operators()[job.op]
    given = samples(info, DTYPES[job.dtype], job.limit)
    usable, want = [], []
    for s in given:
        try:
            want += outcome(eager(info), [s])
            usable.append(s)
        except Exception:
            continue
    if not usable or not any(attempt(info, job, "minifuse", usable, want)):
        return
    for k, (s, w) in enumerate(zip(usable, want, strict=True)):
        problem = attempt(info, job, "minifuse", [s], [w])[0]
        if not problem:
            continue
        kind = {"raised": "error", "refused": "refused"}.get(problem.partition(":")[0], "wrong")
        if kind != "refused" and attempt(info, job, "aot_eager", [s], [w])[0]:
            kind = "torch"
        yield Failure(job.op, job.dtype, job.dynamic, k, kind, problem)
