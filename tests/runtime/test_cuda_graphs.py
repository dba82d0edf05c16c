"""Which programs are recorded as CUDA graphs, what PyTorch's trees are told, and the reasons. Nothing is recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

import minifuse
from minifuse import compat
from minifuse.capturing import Capture
from minifuse.ir.plan import Plan
from minifuse.options import Options
from minifuse.passes.context import CompileContext
from minifuse.records import RECORDS
from minifuse.runtime import cuda_graphs
from minifuse.runtime.cuda_graphs import Recorded, recorded
from minifuse.runtime.triton_launch import TritonProgram

GPU = torch.device("cuda", 0)
OPTIONS = {"target": "triton", "device_model": "H100"}


def captured(function: Callable[..., Any], *args: Any) -> Capture:
    return minifuse.capture(function, *args, compile_options=OPTIONS)


def program_of(plan: Plan, device: torch.device = GPU) -> TritonProgram:
    """A program of a GPU that is not there, as far as it is looked at."""
    program = object.__new__(TritonProgram)
    program.plan = replace(plan, buffers={n: replace(b, device=device) for n, b in plan.buffers.items()})
    program.device, program.on_gpu, program.flags = GPU, True, None
    return program


def context(stage: str, mode: str = "reduce-overhead") -> CompileContext:
    return CompileContext("f", stage, replace(Options.parse(OPTIONS), mode=mode))


@pytest.fixture
def trees(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What PyTorch's trees are asked to record."""
    asked: list[dict[str, Any]] = []

    def cuda_graphs(run: Any, gm: fx.GraphModule, stage: str, **more: Any) -> Any:
        keys = {"device_index": "device", "static_input_idxs": "fixed", "mutated_input_idxs": "mutated"}
        asked.append({"stage": stage, **{keys[k]: v for k, v in more.items()}})
        return lambda args: ("replayed", args)

    monkeypatch.setattr(compat, "cuda_graphs", cuda_graphs)
    return asked


def test_a_program_of_a_gpu_is_recorded_with_what_stays_in_place(trees: list[dict[str, Any]]) -> None:
    graphs = captured(lambda x, w: (x * w).relu().sum(), torch.randn(8, 16), torch.randn(16, requires_grad=True))
    ctx = context("backward")
    found = recorded(program_of(graphs.plans["backward"]), graphs.graphs["backward"], ctx)
    assert isinstance(found, Recorded) and found([1, 2]) == ("replayed", [1, 2])
    (asked,) = trees
    names = [n.name for n in graphs.graphs["backward"].graph.find_nodes(op="placeholder")]
    assert [names[k] for k in asked["fixed"]] == [n for n in names if "tangent" not in n]
    assert len(asked["fixed"]) < len(names)
    assert asked["device"] == 0
    assert [(d.rule, d.taken) for d in ctx.decisions] == [("cuda-graph", True)]


def test_inputs_that_are_written_are_named(trees: list[dict[str, Any]]) -> None:
    def step(p: Tensor, g: Tensor) -> None:
        p.sub_(g * 0.1)

    torch._dynamo.reset()
    (graph,) = minifuse.captures(step, torch.randn(8), torch.randn(8), compile_options=OPTIONS)
    plan = graph.plans["inference"]
    recorded(program_of(plan), graph.graphs["inference"], context("inference"))
    (asked,) = trees
    assert [plan.inputs[k] for k in asked["mutated"]] == sorted(plan.mutated) != []


def test_a_check_of_an_earlier_call_is_raised_before_a_replay(trees: list[dict[str, Any]]) -> None:
    graphs = captured(lambda x: x * 2, torch.randn(8))
    program = program_of(graphs.plans["inference"])
    found = recorded(program, graphs.graphs["inference"], context("inference"))
    raised: list[int] = []
    program.flags = torch.zeros(1)
    program.raise_late = lambda: raised.append(1)  # type: ignore[method-assign]
    found([])
    assert raised == [1]


def _nonzero(x: Tensor) -> Tensor:
    return torch.nonzero(x) + 1


REASONS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], str]] = {
    "batch": (
        lambda xs: torch._foreach_mul(xs, 2.0), ([torch.ones(8), torch.ones(9), torch.ones(10)],), "looked up"
    ),
    "sizes": (_nonzero, (torch.ones(8),), "nonzero"),
}  # fmt: skip


@pytest.mark.parametrize("name", REASONS)
def test_what_cannot_be_recorded_says_why(name: str, trees: list[dict[str, Any]]) -> None:
    function, args, words = REASONS[name]
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        (graph,) = minifuse.captures(function, *args, compile_options=OPTIONS)
    program, ctx = program_of(graph.plans["inference"]), context("inference")
    assert recorded(program, graph.graphs["inference"], ctx) is program
    (decision,) = ctx.decisions
    assert not decision.taken and words in decision.words, decision.words
    assert not trees


def test_tensors_of_the_host_and_of_another_device_are_not_recorded(trees: list[dict[str, Any]]) -> None:
    graphs = captured(lambda x: x * 2, torch.randn(8))
    for device, words in ((torch.device("cpu"), "is on the CPU"), (torch.device("cuda", 1), "is on another device")):
        ctx = context("inference")
        recorded(program_of(graphs.plans["inference"], device), graphs.graphs["inference"], ctx)
        assert words in ctx.decisions[0].words
    assert not trees


def test_a_backward_goes_with_its_forward(trees: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = captured(lambda x: x.sin().sum(), torch.randn(8, requires_grad=True))
    program, ctx = program_of(graphs.plans["backward"]), context("backward")
    assert recorded(program, graphs.graphs["backward"], ctx, forward=False) is program
    assert "its forward is not recorded" in ctx.decisions[0].words
    # behind a recorded forward one that cannot be is run as it is, and the trees are told
    beside: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(compat, "say_backward_runs", beside.append)
    monkeypatch.setattr(TritonProgram, "__call__", lambda self, args: ("ran", args))
    monkeypatch.setattr(cuda_graphs, "why_not", lambda *args: "a test says so")
    assert recorded(program, graphs.graphs["backward"], context("backward"))([3]) == ("ran", [3])
    assert beside == [0]


def test_what_is_recorded_writes_over_none_of_its_inputs() -> None:
    def plans(mode: str) -> Plan:
        torch._dynamo.reset()
        RECORDS.clear()
        x = torch.randn(64, 64, requires_grad=True)
        torch.compile(lambda x: (x.sin() * x.cos()).sum(), backend="minifuse", mode=mode)(x).backward()
        return RECORDS[-1].stages["memory"]

    assert plans("default").donated
    assert not plans("reduce-overhead").donated


def test_on_a_cpu_the_report_says_that_nothing_is_recorded() -> None:
    torch._dynamo.reset()
    RECORDS.clear()
    x = torch.randn(8)
    torch.testing.assert_close(torch.compile(F.silu, backend="minifuse", mode="reduce-overhead")(x), F.silu(x))
    (decision,) = [d for d in RECORDS[-1].decisions if d.rule == "cuda-graph"]
    assert "it runs on the CPU" in decision.words
    torch.compiler.reset()  # with no recordings there is nothing to forget


def test_pytorchs_trees_take_what_they_are_given() -> None:
    """As far as that goes without a GPU: they record at the first call."""
    graphs = captured(lambda x: x * 2, torch.randn(8))
    gm = graphs.graphs["inference"]
    assert callable(compat.cuda_graphs(lambda args: args, gm, "inference", device_index=0, static_input_idxs=(0,)))
    assert compat.unrecordable(gm) == ""
    compat.forget_cuda_graphs()
