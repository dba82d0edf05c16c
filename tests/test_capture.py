"""`minifuse.capture` shows each stage and touches nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import minifuse
from minifuse.errors import OptionError
from minifuse.ir.verify import verify_plan
from minifuse.passes.remat.plan import assemble
from minifuse.remat import Problem, RematPlan


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(8), nn.Linear(8, 8)
        self.tied = self.linear

    def forward(self, x: Tensor, *, scale: float = 1.0, more: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        y = F.dropout(F.gelu(self.linear(self.norm(x))), 0.5) * scale
        return {"y": y + (more["z"] if more else 0)}


def test_a_module_that_trains_has_five_graphs_and_two_plans() -> None:
    graphs = minifuse.capture(Net(), torch.randn(4, 8))
    assert graphs.stages == ("captured", "joint", "forward", "backward", "plan forward", "plan backward")
    for stage in graphs.stages:
        assert len(graphs.text(stage)) > 50
    assert "aten.gelu.default" in graphs.text("captured")
    assert "minifuse.random" in graphs.text("joint")


def test_without_gradients_there_is_one_inference_graph() -> None:
    with torch.no_grad():
        assert minifuse.capture(Net(), torch.randn(4, 8)).stages == ("captured", "inference", "plan inference")
    assert minifuse.capture(lambda x: x.cos(), torch.randn(3)).stages == ("captured", "inference", "plan inference")


def test_an_argument_that_requires_a_gradient_makes_it_training() -> None:
    assert minifuse.capture(lambda x: x.cos(), torch.randn(3, requires_grad=True)).problem is not None


def test_parameters_and_buffers_are_inputs_by_name_and_shared_ones_once() -> None:
    graphs = minifuse.capture(Net(), torch.randn(4, 8))
    assert graphs.inputs[:4] == ("norm.weight", "norm.bias", "linear.weight", "linear.bias")
    assert graphs.inputs[-1] == "input 0"
    assert len(graphs.inputs) == len(set(graphs.inputs)) == 8


def test_nested_and_keyword_arguments_are_followed() -> None:
    graphs = minifuse.capture(Net(), torch.randn(4, 8), scale=3.5, more={"z": torch.randn(8)})
    assert graphs.inputs[-2:] == ("input 0", "input 1")
    assert "3.5" in graphs.text("captured")


def test_nothing_of_the_callers_is_run_or_changed() -> None:
    torch.manual_seed(0)
    net, x = Net(), torch.randn(4, 8)
    before, seed = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    count = len(minifuse.reports())
    minifuse.capture(net, x)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values()))
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(seed, torch.get_rng_state())
    assert len(minifuse.reports()) == count


def test_a_function_that_changes_its_argument_leaves_it_alone() -> None:
    def f(x: Tensor) -> Tensor:
        x.add_(1)
        return x * 2

    x = torch.zeros(4)
    plan = minifuse.capture(f, x).plans["inference"]
    assert torch.equal(x, torch.zeros(4))
    assert plan.mutated


def test_the_plans_are_valid_and_the_problem_is_what_the_policy_saw() -> None:
    graphs = minifuse.capture(Net(), torch.randn(4, 8))
    for plan in graphs.plans.values():
        verify_plan(plan)
    assert graphs.problem is not None
    assert graphs.remat is not None
    assert set(graphs.remat.choices) <= {v.name for v in graphs.problem.values}


class SaveNothing:
    name = "save_nothing"

    def plan(self, problem: Problem) -> RematPlan:
        return assemble(problem, [v.name for v in problem.values if v.pinned], self.name)


def test_options_apply_policies_among_them() -> None:
    given = {"remat": SaveNothing()}
    graphs = minifuse.capture(lambda x: x.cos().cos().sum(), torch.randn(9, requires_grad=True), compile_options=given)
    assert graphs.remat is not None
    assert graphs.remat.policy == "save_nothing"
    unfused = minifuse.capture(lambda x: x.cos().cos(), torch.randn(9), compile_options={"fusion_fuel": 0})
    assert len(unfused.plans["inference"].launches) == 2


def test_an_unknown_stage_or_option_is_named() -> None:
    graphs = minifuse.capture(lambda x: x.cos(), torch.randn(3))
    with pytest.raises(KeyError, match="stages: captured, inference"):
        graphs.text("joint")
    with pytest.raises(OptionError, match="fusion_fuel"):
        minifuse.capture(lambda x: x.cos(), torch.randn(3), compile_options={"fusion_full": 0})


def test_printed_it_lists_its_stages_with_their_sizes() -> None:
    text = str(minifuse.capture(Net(), torch.randn(4, 8)))
    assert text.splitlines()[0] == "Net: 8 inputs"
    assert "calls of ATen" in text


def test_lines_of_the_user_reach_the_plan() -> None:
    def f(x: Tensor) -> Tensor:
        return x.cos() * 7  # this very line

    assert "return x.cos() * 7" in str(minifuse.capture(f, torch.randn(3)).plans["inference"].origins)


def test_what_dynamo_captures_is_the_original_and_leaves_buffers_and_the_generator_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    x, state = torch.randn(4, 8), torch.get_rng_state()
    before = [b.clone() for b in model.buffers()]
    for fn in (model, torch.compile(model)):
        (found,) = minifuse.captures(fn, x)
        assert found.problem is not None and found.remat is not None and "backward" in found.plans
    assert all(map(torch.equal, model.buffers(), before)) and torch.equal(torch.get_rng_state(), state)

    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    (found,) = minifuse.captures(torch.compile(double), x)
    assert found.problem is None and "inference" in found.plans
