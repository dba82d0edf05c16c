"""What a step holds is what its plan says: scratch of operators, gradients that are not copied, and a pool that makes
room for what is beside it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import harness, models, remat
from minifuse.passes.memory import needs, peak
from minifuse.records import RECORDS
from minifuse.remat import Problem, resolve


def counts_pages() -> bool:
    """Whether the kernel lets a process begin its high-water mark anew."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


LINUX = pytest.mark.skipif(not counts_pages(), reason="needs a writable /proc/self/clear_refs")


def problem_of(module: nn.Module, x: Tensor) -> Problem:
    found: list[Problem] = []

    def keep(problem: Problem) -> Any:
        found.append(problem)
        return resolve("save_all").plan(problem)

    torch._dynamo.reset()
    torch.compile(module, backend="minifuse", options={"remat": keep})(x).sum().backward()
    return found[0]


def convolution(dtype: torch.dtype = torch.float32, layout: torch.memory_format = torch.contiguous_format) -> Problem:
    module = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 16, 3, padding=1))
    x = torch.randn(2, 16, 64, 64, dtype=dtype).to(memory_format=layout).requires_grad_()
    return problem_of(module.to(dtype).to(memory_format=layout), x)


def test_a_convolution_takes_scratch_as_onednn_does() -> None:
    problem = convolution()
    by_op = {op: [v.scratch for v in problem.values if v.op == f"aten.{op}"] for op in
             ("convolution", "convolution_backward")}  # fmt: skip
    small, large, weight = 2 * 16 * 64 * 64 * 4, 2 * 32 * 64 * 64 * 4, 32 * 16 * 9 * 4
    assert by_op == {"convolution": [large + weight] * 2, "convolution_backward": [small + large] * 2}
    last = convolution(layout=torch.channels_last)
    assert {v.scratch for v in last.values if v.kind == "extern"} == {2 * weight, 3 * weight}
    assert not any(v.scratch for v in convolution(torch.float64).values)


def test_scratch_is_held_while_the_operator_runs_and_no_longer() -> None:
    problem = convolution()
    without = replace(problem, values=tuple(replace(v, scratch=0) for v in problem.values))
    one, two = (resolve("save_all").plan(p).timeline for p in (problem, without))
    more = one.total - two.total
    assert sorted(more[more > 0]) == sorted(v.scratch for v in problem.values if v.scratch)
    assert one.steps == two.steps and one.peak > two.peak
    assert Problem.from_json(problem.to_json()) == problem


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 32, 64))
        self.down = nn.Parameter(torch.randn(4, 32, 64))  # of which einsum's gradient is transposed

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ebh,edh->ebd", torch.einsum("ebd,edh->ebh", x, self.up).relu(), self.down)


@pytest.mark.parametrize("accumulate", [False, True])
def test_gradients_have_the_layout_of_their_parameters_and_are_not_copied(accumulate: bool) -> None:
    torch.manual_seed(0)
    module = Experts()
    given: dict[str, int] = {}
    for name, p in module.named_parameters():
        p.register_hook(lambda g, name=name: given.__setitem__(name, g.data_ptr()))
    x = torch.randn(4, 16, 32)
    module(x).square().sum().backward()
    want = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    if not accumulate:
        module.zero_grad()
    torch._dynamo.reset()
    torch.compile(module, backend="minifuse")(x).square().sum().backward()
    for name, p in module.named_parameters():
        assert p.grad is not None and p.grad.stride() == p.stride()
        torch.testing.assert_close(p.grad, want[name] * (2 if accumulate else 1))
        assert accumulate or p.grad.data_ptr() == given[name]


def test_the_copy_of_a_gradient_is_an_operator_like_any_other() -> None:
    problem = problem_of(Experts(), torch.randn(4, 16, 32))
    (copy,) = (v for v in problem.values if v.phase == "backward" and v.op == "aten.clone")
    assert copy.name in {problem[n].storage for n in problem.backward_outputs}
    steps = resolve("save_all").plan(problem).timeline.steps
    assert steps.index(copy.name) < len(steps) - 1  # not at the end, where all gradients are alive


def test_a_call_says_what_it_holds_beside_the_pool() -> None:
    torch._dynamo.reset()
    x = torch.randn(512, 2048, requires_grad=True)
    torch.compile(lambda x: (x.sin(), x.cos().sum()), backend="minifuse")(x)[1].backward()
    forward = [*RECORDS][-2].stages["memory"]
    first, second = (re.findall(r"beside\((\d+)\)", r.stages["program"].source) for r in [*RECORDS][-2:])
    assert first == [str(4 << 20)]  # the tangent, allocated when the forward has returned
    assert second[0] == str(4 << 20)
    assert needs(forward).peak == peak(forward)[0] and not needs(forward).beside
    torch.compile(torch.sin, backend="minifuse")(torch.ones(1000))
    assert "beside" not in [*RECORDS][-1].stages["program"].source


@pytest.mark.parametrize("budget", [1.0, 0.5])
def test_what_may_lie_idle_depends_on_the_budget(budget: float) -> None:
    torch._dynamo.reset()
    options = {"memory_budget": budget, "on_budget": "best"}
    x = torch.randn(512, 2048, requires_grad=True)
    torch.compile(lambda x: (x.sin() * x.cos()).exp(), backend="minifuse", options=options)(x).sum().backward()
    sources = [r.stages["program"].source for r in [*RECORDS][-2:]]
    assert all(re.search(rf"expect\(\d+, \d+, {budget < 1}\)", s) for s in sources)


@LINUX
@pytest.mark.parametrize(("policy", "budgeted"), [("default", False), ("mincut", True)])
def test_a_step_holds_what_its_plan_needs(policy: str, budgeted: bool) -> None:
    path = "benchmarks.models:bert"
    model, args, kwargs = models.load(path)
    torch._dynamo.reset()
    run = torch.compile(models.Loss(model.train()), backend="minifuse", options={"remat": policy})
    run(*args, **kwargs).backward()
    planned = max(peak(r.stages["memory"])[0] for r in [*RECORDS][-2:])
    (measured,) = harness.fresh(remat.probe_peaks, path, [(policy, budgeted)], env=harness.COUNTED)
    assert 0.9 * planned <= measured <= (1.06 if budgeted else 1.15) * planned
