"""What a user reads about a compile agrees with what was compiled."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import minifuse
from minifuse import Report
from minifuse.explain import html, report
from minifuse.ir.plan import launch_traffic
from minifuse.records import RECORDS


class Block(nn.Module):
    """A residual block with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.drop = nn.LayerNorm(32), nn.Linear(32, 32), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(nn.functional.gelu(self.linear(self.norm(x))))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    RECORDS.clear()
    yield
    RECORDS.clear()


def trained(**options: object) -> list[Report]:
    compiled = torch.compile(Block(), backend="minifuse", options=options)
    compiled(torch.randn(16, 32, requires_grad=True)).sum().backward()
    return minifuse.reports()


def test_a_training_step_leaves_a_report_for_each_pass() -> None:
    assert [r.stage for r in trained()] == ["forward", "backward"]


def test_two_cosines_are_one_kernel_of_two_accesses() -> None:
    torch.compile(lambda x: x.cos().cos(), backend="minifuse")(torch.randn(1000))
    (r,) = minifuse.reports()
    assert (r.stage, r.kernels_unfused, r.kernels) == ("inference", 2, 1)
    assert (r.bytes_unfused, r.kernel_bytes, r.extern_bytes) == (16_000, 8_000, 0)
    assert (r.coverage, r.externs, r.interpreted) == (1.0, (), ())
    (launch,) = r.launches
    assert (launch.read, launch.written, launch.ops) == (4_000, 4_000, ("cos", "cos_1"))
    assert any("x.cos().cos()" in line for line in launch.lines)


def test_the_figures_are_those_of_the_plan_that_runs() -> None:
    for r in trained():
        plan = r.record.stages["memory"]
        assert r.kernels == len(plan.launches) == len(r.launches)
        assert r.kernel_bytes == sum(launch_traffic(plan, s).total for s in plan.launches)
        assert r.kernel_bytes < r.bytes_unfused
        assert r.extern_bytes == sum(launch_traffic(plan, s).total for s in plan.externs)


def test_an_extern_has_its_operator_its_reason_and_the_line() -> None:
    forward, _ = trained()
    (product,) = [e for e in forward.externs if "addmm" in e.op]
    assert product.reason
    assert "test_report.py" in product.where or "self.linear" in product.where


def test_a_kernel_takes_at_least_what_its_bytes_or_its_instructions_take() -> None:
    torch.compile(lambda x: x * 2, backend="minifuse")(torch.randn(1 << 20))
    (r,) = minifuse.reports()
    assert r.launches[0].bound == "memory"
    torch._dynamo.reset()
    torch.compile(lambda x: x.cos().sin().tan().atan().tan(), backend="minifuse")(torch.randn(1 << 20))
    assert minifuse.reports()[-1].launches[0].bound == "compute"


def test_what_the_backward_loads_and_recomputes_is_listed() -> None:
    forward, backward = trained(remat="save_all")
    assert {c.action for c in forward.saved} == {"save"}
    assert sum(c.nbytes for c in forward.saved) >= backward.remat.saved_bytes > 0  # type: ignore[union-attr]
    torch._dynamo.reset()
    assert len(trained(remat="recompute_all")[-1].recomputed) > len(backward.recomputed)


def test_interpreted_kernels_are_named_and_do_not_count_as_generated() -> None:
    options = {"target": "interpret"}
    torch.compile(lambda x: x.cos().cos(), backend="minifuse", options=options)(torch.randn(10))
    (r,) = minifuse.reports()
    assert (r.interpreted, r.coverage) == ((r.launches[0].name,), 0.0)
    assert "interpreted, slowly" in str(r)


def test_an_operator_that_falls_back_lowers_the_coverage() -> None:
    torch.compile(lambda x: torch.lgamma(x).cos(), backend="minifuse")(torch.rand(10))
    (r,) = minifuse.reports()
    assert (len(r.externs), r.coverage) == (1, 0.5)


def test_a_printed_report_is_a_screen_and_names_what_counts() -> None:
    for r in trained():
        lines = str(r).splitlines()
        assert len(lines) <= 30
        assert max(map(len, lines)) <= report.WIDTH
        assert r.name in lines[0]
        assert all(launch.name in str(r) for launch in r.launches)


def test_kernels_are_printed_the_heaviest_first() -> None:
    def f(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x.cos() + 1, (y @ y).sin()

    torch.compile(f, backend="minifuse")(torch.randn(4), torch.randn(64, 64))
    (r,) = minifuse.reports()
    heavy, light = sorted(r.launches, key=lambda launch: -launch.nbytes)
    assert str(r).index(f"\n{heavy.name}") < str(r).index(f"\n{light.name}")


def test_a_refusal_within_one_kernel_is_not_shown() -> None:
    for r in trained():
        kernel_of = {op: launch.name for launch in r.launches for op in launch.ops}
        for d in r.costliest_refusals(100):
            assert len({kernel_of.get(op, op) for op in d.subject}) > 1


def test_a_report_as_json_has_a_schema_and_survives_json() -> None:
    for r in trained():
        data = json.loads(json.dumps(r.to_json()))
        assert data["schema"] == report.SCHEMA
        assert (data["kernels"], data["kernel_bytes"]) == (r.kernels, r.kernel_bytes)
        assert len(data["decisions"]) == len(r.decisions)


def test_a_report_cannot_be_changed() -> None:
    (r, *_) = trained()
    with pytest.raises(dataclasses.FrozenInstanceError):
        r.record = r.record  # type: ignore[misc]


def test_nothing_is_rendered_while_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> str:
        raise AssertionError("rendered while compiling")

    monkeypatch.delenv("MINIFUSE_DEBUG", raising=False)
    for owner, name in ((Report, "__str__"), (Report, "launches"), (minifuse.ir.decision.Decision, "words")):
        monkeypatch.setattr(owner, name, property(fail) if name != "__str__" else fail)
    trained()


def test_the_page_is_one_file_and_escapes_what_the_user_wrote() -> None:
    torch.compile(lambda x: (x < 1).float() + len("<script>alert(1)</script>"), backend="minifuse")(torch.randn(10))
    (r,) = minifuse.reports()
    page = html.render(r)
    assert "&lt;script&gt;" in page
    assert "<script" not in page
    assert "http" not in page
    assert r.launches[0].name in page


def test_the_sizes_that_are_free_and_those_that_a_line_fixed_are_named() -> None:
    def rows(x: Tensor, w: Tensor) -> Tensor:
        if x.shape[0] == 16:
            x = x + 1
        return x.reshape(-1, 8) * w

    torch.compile(rows, backend="minifuse", dynamic=True)(torch.randn(16, 24), torch.randn(8))
    (report,) = minifuse.reports()
    sizes = {d.subject[0]: d for d in report.decisions if d.rule == "size"}
    assert {name: d.taken for name, d in sizes.items()} == {"x.size(0)": False, "x.size(1)": True, "w.size(0)": False}
    assert sizes["x.size(0)"].facts["became"] == "16"
    assert sizes["x.size(0)"].where == "test_report.py: if x.shape[0] == 16:"
    assert re.fullmatch(r"test_report.py:\d+ return x.reshape\(-1, 8\) \* w", sizes["w.size(0)"].where)
    assert "x.size(1): one kernel for 2 and more, planned for 24" in str(report)


def test_a_graph_whose_sizes_are_all_fixed_lists_none() -> None:
    torch.compile(lambda x: x.cos(), backend="minifuse", dynamic=False)(torch.randn(16))
    (report,) = minifuse.reports()
    assert not [d for d in report.decisions if d.rule == "size"]
