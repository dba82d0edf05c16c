"""Eager as the judge: a compiled function must do what the plain one does, in everything that a caller can see."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from minifuse.records import RECORDS, Record


def compiled(fn: Any, options: dict[str, Any] | None = None, **kw: Any) -> Any:
    """`torch.compile` by minifuse with the verifier on, from a fresh start and with empty records."""
    torch._dynamo.reset()
    RECORDS.clear()
    return torch.compile(fn, backend="minifuse", options={"verify": True, **(options or {})}, **kw)


def in_tritons_interpreter(module: str, cache: Path, *args: str) -> str:
    """What a module prints in a process of its own in which Triton's kernels are interpreted: that is settled before
    triton is imported."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "MINIFUSE_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, "-m", module, *args], cwd=Path(__file__).parents[1], env=env,
                          capture_output=True, text=True, timeout=1200)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


def outcomes_in_triton(module: str, cache: Path) -> dict[str, str]:
    """By case, what a module that prints its cases as JSON found wrong in Triton's interpreter."""
    return json.loads(in_tritons_interpreter(module, cache))  # type: ignore[no-any-return]


def twin(x: Any) -> Any:
    """A copy that shares memory within itself where the original does, and needs gradients where it does."""
    return copy.deepcopy(x)


def same(got: Any, want: Any, exact: bool = False, tolerance: float | None = None) -> None:
    """Values, dtypes, shapes, strides, `requires_grad`, and which outputs are views of which."""
    flat_got, spec_got = pytree.tree_flatten(got)
    flat_want, spec_want = pytree.tree_flatten(want)
    assert spec_got == spec_want
    for a, b in zip(flat_got, flat_want, strict=True):
        if not isinstance(b, Tensor):
            assert a == b and type(a) is type(b)
            continue
        assert (a.shape, a.dtype, a.layout, a.requires_grad) == (b.shape, b.dtype, b.layout, b.requires_grad)
        if b.layout is torch.strided and b.numel():
            assert a.stride() == b.stride()
        close = {} if tolerance is None else {"rtol": tolerance, "atol": tolerance}
        if exact:
            close = {"rtol": 0, "atol": 0}
        torch.testing.assert_close(a.detach(), b.detach(), equal_nan=True, **close)
    strided = [(a, b) for a, b in zip(flat_got, flat_want) if isinstance(b, Tensor) and b.layout is torch.strided]
    for i, (a, b) in enumerate(strided):
        for c, d in strided[:i]:
            if b.numel() and d.numel():
                assert shares(a, c) == shares(b, d), "eager's outputs share memory where these do not, or the reverse"


def shares(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors lie in one storage."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def check(
    fn: Callable[..., Any],
    *args: Any,
    options: dict[str, Any] | None = None,
    exact: bool = False,
    tolerance: float | None = None,
    runs: int = 1,
    **kw: Any,
) -> Any:
    """Run `fn` plain and compiled on equal arguments: outputs, what became of the arguments, gradients.

    Returns what the compiled function gave. Gradients are those of the sum of its floating outputs that need them.
    """
    mine = twin((fn, args)) if isinstance(fn, nn.Module) else (fn, twin(args))
    run = compiled(mine[0], options, **kw)
    for _ in range(runs):
        want, got = fn(*args), run(*mine[1])
        same(got, want, exact, tolerance)
        same(_state(mine[1]), _state(args), exact, tolerance)
        roots_got, roots_want = _roots(got), _roots(want)
        if roots_want:
            torch.autograd.backward(roots_got, [torch.ones_like(r) for r in roots_got])
            torch.autograd.backward(roots_want, [torch.ones_like(r) for r in roots_want])
            same(_gradients(mine), _gradients((fn, args)), exact, tolerance)
        if isinstance(fn, nn.Module):
            same(dict(mine[0].named_buffers()), dict(fn.named_buffers()), exact, tolerance)
    return got


def _state(args: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(args) if isinstance(x, Tensor)]


def _roots(out: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor) and x.requires_grad]


def _gradients(pair: tuple[Any, Any]) -> list[Tensor | None]:
    fn, args = pair
    leaves = [x for x in _state(args) if x.is_leaf]
    leaves += list(fn.parameters()) if isinstance(fn, nn.Module) else []
    return [x.grad for x in leaves]


def records(stage: str | None = None) -> list[Record]:
    """What was compiled since `compiled`, of one stage or of all."""
    return [r for r in RECORDS if stage in (None, r.stage)]


def kernels() -> int:
    """Launches in everything that was compiled since `compiled`."""
    return sum(len(r.stages["memory"].launches) for r in RECORDS)


def externs() -> list[str]:
    """Operators that went to ATen in everything that was compiled since `compiled`."""
    return [str(e.target) for r in RECORDS for e in r.stages["memory"].externs]
