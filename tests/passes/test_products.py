"""Which library computes a matrix product: by shapes alone, the same bits for any number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from minifuse import compat
from minifuse.ir.device import CPU
from minifuse.ir.interpret import run_plan
from minifuse.ir.plan import Plan
from minifuse.ir.verify import verify_plan
from minifuse.options import Options
from minifuse.passes.context import CompileContext
from minifuse.passes.lower.graph import lower
from minifuse.records import RECORDS
from minifuse.runtime import measure
from minifuse.runtime.pool import SMALL
from minifuse.runtime.program import POOL
from tests.judge import compiled, externs, same

pytestmark = pytest.mark.skipif(compat.LINEAR is None, reason="this torch was built without oneDNN")
ONEDNN = str(compat.LINEAR)


def plan_of(function: Callable[..., Any], *args: Tensor, gain: float = 1.2) -> Plan:
    """The plan of a function for a machine whose oneDNN is so much faster than ATen."""
    ctx = CompileContext("f", "inference", Options(), device=replace(CPU, onednn=gain))
    plan = lower(make_fx(lambda *a: (function(*a),))(*args).graph, ctx)
    verify_plan(plan)
    return plan


def product(x: Tensor, w: Tensor) -> Tensor:
    return x @ w


def biased(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.addmm(b, x, w)


X, W = torch.randn(300, 512), torch.randn(512, 512)
FEW, WIDE = torch.randn(2, 512), torch.randn(512, 1024)
CASES: dict[str, tuple[bool, Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "many flops": (True, product, (X, W)),
    "a weight as a layer stores it": (True, lambda x, w: x @ w.t(), (X, W)),
    "a bias": (True, biased, (X, W, torch.randn(512))),
    "few rows by weights that no cache holds": (True, product, (FEW, WIDE)),
    "one row by weights as a layer stores them": (True, lambda x, w: x @ w.t(), (FEW[:1], WIDE.t().contiguous())),
    "one row by weights the other way": (False, product, (FEW[:1], WIDE)),
    "few flops by few weights": (False, product, (FEW, W)),
    "columns of a wider matrix": (False, lambda x, w: x[:, :256] @ w, (torch.randn(500, 512), torch.randn(256, 512))),
    "rows on their side": (False, lambda x, w: x.t() @ w, (torch.randn(512, 300), W)),
    "a part of the weights": (False, lambda x, w: x @ w[:, ::2], (X, torch.randn(512, 1024))),
    "a bias a row": (False, biased, (X, W, torch.randn(300, 1))),
    "a scaled bias": (False, lambda x, w, b: torch.addmm(b, x, w, beta=2), (X, W, torch.randn(512))),
    "float64": (False, product, (X.double(), W.double())),
    "a batch": (False, torch.bmm, (X.view(2, 150, 512), W.view(2, 512, 256))),
}


@pytest.mark.parametrize("name", CASES)
def test_a_product_goes_where_its_form_is_fast(name: str) -> None:
    faster, function, args = CASES[name]
    plan = plan_of(function, *args)
    assert [str(e.target) == ONEDNN for e in plan.externs] == [faster]
    (found,) = run_plan(plan, list(args), {})
    exact = function(*(a.double() for a in args))
    error, eager = ((r.double() - exact).abs().max().item() for r in (found, function(*args)))
    assert error <= 4 * eager + 1e-12 and found.stride() == function(*args).stride()
    assert all(str(e.target) != ONEDNN for e in plan_of(function, *args, gain=1.0).externs)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_a_switched_off_library_is_not_used() -> None:
    with torch.backends.mkldnn.flags(enabled=False):
        assert [str(e.target) for e in plan_of(product, X, W).externs] == ["aten.mm.default"]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", [name for name, (faster, *_) in CASES.items() if faster])
def test_threads_and_where_memory_begins_change_no_bit(name: str, threads: None) -> None:
    _, function, args = CASES[name]
    plan = plan_of(function, *args)
    odd = [torch.empty(a.numel() + 1)[1:].view_as(a).copy_(a) for a in args]
    results = []
    for n, given in ((1, args), (2, args), (3, args), (2, odd)):
        torch.set_num_threads(n)
        results += run_plan(plan, list(given), {})
    assert all(torch.equal(results[0], r) for r in results[1:])


def test_a_step_uses_it_both_ways_and_its_sizes_may_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minifuse.backend.cpu_model", lambda _: replace(CPU, onednn=1.2))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, 512))
    step = compiled(model, {"device_model": "auto"}, dynamic=True)
    for rows in (256, 300, 8, 1, 0):  # the last two are compiled apart, and one row's gradients are ATen's
        x = torch.randn(rows, 512, requires_grad=True)
        twin = x.detach().clone().requires_grad_()
        got, want = step(x), model(twin)
        same(got, want)
        gradients = [torch.autograd.grad(out.square().sum(), [given, *model.parameters()])
                     for out, given in ((got, x), (want, twin))]  # fmt: skip
        for g, w in zip(*gradients, strict=True):
            same(g, w)
    used = externs()
    assert used.count(ONEDNN) == 4 + 2 + 4 and used.count("aten.mm.default") == 2 + 4 + 2


def test_a_large_result_is_the_pools_and_a_small_one_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minifuse.backend.cpu_model", lambda _: replace(CPU, onednn=1.2))
    x, w = torch.randn(1024, 512), torch.randn(512, 512) / 512**0.5
    for rows, ours in ((1024, SMALL), (300, 0)):
        run = compiled(lambda x, w: (x @ w).relu() @ w, {"device_model": "auto"}, dynamic=False)
        given = x[:rows].contiguous()
        same(run(given, w), (given @ w).relu() @ w, tolerance=1e-4)
        text = RECORDS[-1].stages["program"].source
        assert ("lend(" in text) == ("own(" in text) == bool(ours) and externs().count(ONEDNN) == 2
        before = POOL.used_bytes
        out = run(given, w)
        assert POOL.used_bytes - before == (out.nbytes if ours else 0)
        del out


def test_a_machine_says_once_which_library_is_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: None
) -> None:
    monkeypatch.setattr(measure, "onednn", lambda: 1.2)
    measure.cpu_model.cache_clear()
    assert measure.cpu_model(str(tmp_path)).onednn == 1.2
    monkeypatch.setattr(measure, "onednn", lambda: 1.0)
    measure.cpu_model.cache_clear()
    torch.set_num_threads(torch.get_num_threads() + 1)  # other rates, the same library
    assert measure.cpu_model(str(tmp_path)).onednn == 1.2
    measure.cpu_model.cache_clear()
