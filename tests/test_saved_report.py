"""What `saved_report` says of each activation agrees with the plan of the partition and with the kernels that run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import minifuse
from minifuse.explain import html, report
from minifuse.explain.report import Report
from minifuse.explain.saved import SHOWN, SavedTable, saved_table
from minifuse.explain.timeline import COLUMNS, draw
from minifuse.ir.decision import bytes_text
from minifuse.ir.device import DEVICES
from minifuse.passes.memory import peak
from minifuse.passes.remat.partition import decisions
from minifuse.records import RECORDS
from minifuse.remat import Timeline, assemble


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
        self.drop = nn.Dropout(0.1)

    def inner(self, x: Tensor) -> Tensor:
        return self.drop(self.down(nn.functional.gelu(self.up(self.norm(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Checkpointed(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + checkpoint(self.inner, x, use_reentrant=False)


def model(block: type[Block] = Block) -> nn.Module:
    return nn.Sequential(nn.Linear(32, 32), block(), block())


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    RECORDS.clear()
    yield
    RECORDS.clear()


def report_of(block: type[Block] = Block, **options: object) -> SavedTable:
    (found,) = minifuse.saved_report(model(block), torch.randn(8, 32), compile_options=options).tables
    return found


@pytest.mark.parametrize("policy", ["default", "save_all", "recompute_all"])
def test_the_bytes_of_what_is_saved_are_those_of_the_plan_the_largest_first(policy: str) -> None:
    found = report_of(remat=policy)
    assert sum(a.nbytes for a in found.saved) == found.plan.saved_bytes
    assert {a.name for a in found.saved} <= set(found.plan.saved)
    assert found.saved and found.plan.policy == policy
    for rows in (found.saved, found.recomputed):
        assert [a.nbytes for a in rows] == sorted((a.nbytes for a in rows), reverse=True)


def test_each_activation_has_its_module_its_line_and_the_plans_reason_and_costs() -> None:
    found = report_of(remat="recompute_all")
    rows = {a.name: a for a in found.activations}
    product = rows["addmm_1"]
    assert (product.module, product.nbytes, product.action) == ("1.up", 8 * 64 * 4, "recompute")
    lines = Path(__file__).read_text().splitlines()
    at = next(k for k, line in enumerate(lines, 1) if "return self.drop(" in line)
    assert product.where == f"test_saved_report.py:{at}"
    assert {a.module for a in found.activations} >= {"0", "1.norm", "2.norm", "2.up", "1.drop"}
    for a in found.activations:
        choice = found.plan.choices[a.name]
        assert (a.reason, a.save_seconds) == (choice.reason, choice.save_seconds)
        assert a.recompute_seconds == choice.recompute_seconds


def test_kernels_named_are_those_of_the_backward_that_compute_the_value() -> None:
    (graphs,) = minifuse.captures(model(Checkpointed), torch.randn(8, 32))
    backward = graphs.plans["backward"]
    found = saved_table("x", graphs.remat, graphs.decisions["backward"], None, backward)  # type: ignore[arg-type]
    launches = {s.name: s.kernel.origins for s in backward.launches}
    calls = {(str(e.target), e.origin) for e in backward.externs}
    assert any(a.kernels and a.kernels[0] in launches for a in found.recomputed)
    assert any("addmm" in k for a in found.recomputed for k in a.kernels)
    for a in found.recomputed:
        assert all((k, a.name) in calls or a.name in launches[k] for k in a.kernels)
    assert sum(bool(a.kernels) for a in found.recomputed) > len(found.recomputed) / 2


def test_what_the_host_keeps_has_its_bytes_and_its_way_there_and_back() -> None:
    (graphs,) = minifuse.captures(model(), torch.randn(8, 32), compile_options={"remat": "save_all"})
    assert graphs.problem is not None
    problem = replace(graphs.problem, device=DEVICES["H100"])
    host = "addmm_1"
    saved = [v.name for v in problem.values if v.phase == "forward" and v.savable and v.kind != "view"]
    plan = assemble(problem, [n for n in saved if n != host], "mine", offloaded=[host])
    found = saved_table("x", plan, decisions(problem, plan), None, None)
    (row,) = found.offloaded
    assert (row.name, row.nbytes, found.plan.offloaded_bytes) == (host, 2048, 2048)
    assert row.transfer_seconds == pytest.approx(problem.offload_seconds(problem[host]), rel=0.1)
    assert sum(a.nbytes for a in found.saved) == plan.saved_bytes
    assert "there and back" in str(found) and "offloads 1 (2.05 kB)" in str(found)


def test_memory_that_two_saved_values_share_counts_once_and_that_of_an_input_not_at_all() -> None:
    def gram(x: Tensor, w: Tensor) -> Tensor:
        h = torch.relu(x @ w.t())
        return h.t() @ h

    x, w = torch.randn(8, 16, requires_grad=True), torch.randn(32, 16, requires_grad=True)
    problem = minifuse.capture(gram, x, w).problem
    assert problem is not None
    saved = [v.name for v in problem.values if v.phase == "forward" and v.savable]
    plan = assemble(problem, saved, "mine")
    found = saved_table("x", plan, decisions(problem, plan), None, None)
    assert sum(a.nbytes for a in found.saved) == plan.saved_bytes
    rows = {a.name: a for a in found.saved}
    shared = [n for n in rows if problem[n].storage != n and not problem[problem[n].storage].is_given]
    assert shared and all(rows[n].shares and not rows[n].nbytes for n in shared)
    assert all(not a.nbytes for n, a in rows.items() if problem[problem[n].storage].is_given)
    assert f"shares the memory of {rows[shared[0]].shares}" in str(found)


def test_the_peaks_are_those_of_the_timeline_and_of_the_plans() -> None:
    (graphs,) = minifuse.captures(model(), torch.randn(8, 32))
    plans, plan = graphs.plans, graphs.remat
    assert plan is not None
    found = saved_table("x", plan, graphs.decisions["backward"], plans["forward"], plans["backward"])
    assert found.planned == {s: peak(plans[s])[0] for s in ("forward", "backward")}
    words = str(found).replace("\n", " ")
    line = plan.timeline
    assert f"predicted peak {bytes_text(plan.peak_bytes)} at {line.peak_step}" in words
    assert f"planned peak {bytes_text(max(found.planned.values()))}" in words
    assert f"boundary {bytes_text(line.boundary)}" in words and "by default, " in words


def test_as_json_it_has_every_row_and_survives_json() -> None:
    report = minifuse.saved_report(model(), torch.randn(8, 32))
    data = json.loads(json.dumps(report.to_json()))
    (graph,), (found,) = data["graphs"], report.tables
    assert [a["name"] for a in graph["saved"]] == [a.name for a in found.saved]
    assert sum(a["nbytes"] for a in graph["saved"]) == graph["saved_bytes"] == found.plan.saved_bytes
    assert graph["predicted_peak"]["bytes"] == found.plan.peak_bytes
    assert set(graph["planned_peak"]) == {"forward", "backward"}
    assert data["schema"] == 1


def test_what_needs_no_gradient_saves_nothing_and_long_tables_are_cut_short() -> None:
    nothing = minifuse.saved_report(torch.cos, torch.randn(4))
    assert nothing.tables == () and "no graph has a backward" in str(nothing)
    found = report_of(remat="recompute_all")
    many = replace(found, activations=found.activations * 3)
    assert f"{len(many.recomputed) - SHOWN} more" in str(many)
    whole = many.text()
    assert " more " not in whole.split("in kernels")[1].split("values more")[0]
    assert max(map(len, str(many).splitlines())) <= report.WIDTH


def trained(**options: object) -> tuple[Report, Report]:
    run = torch.compile(model(), backend="minifuse", options=options)
    run(torch.randn(8, 32)).sum().backward()
    forward, backward = minifuse.reports()
    return forward, backward


def test_a_report_has_the_table_and_both_peaks_of_a_step() -> None:
    forward, backward = trained(remat="recompute_all")
    assert backward.partner is not None and backward.partner.record is forward.record
    assert forward.saved_table().activations == backward.saved_table().activations  # type: ignore[union-attr]
    assert any(a.kernels for a in backward.saved_table().recomputed)  # type: ignore[union-attr]
    peaks = [peak(r.plan)[0] for r in (forward, backward)]
    assert backward.remat is not None
    assert f"predicted peak {bytes_text(backward.remat.peak_bytes)} (forward " in str(backward)
    assert f"planned peak {bytes_text(max(peaks))} (forward {bytes_text(peaks[0])}, " in str(backward)
    alone = f"predicted peak of the forward {bytes_text(backward.remat.timeline.forward_peak)}; planned peak of the "
    assert f"{alone}forward {bytes_text(peaks[0])}" in str(forward)
    RECORDS.remove(forward.record)
    assert f"planned peak of the backward {bytes_text(peaks[1])}" in str(Report(backward.record))


def test_a_forward_whose_backward_is_not_compiled_has_what_its_plan_says() -> None:
    torch.compile(model(), backend="minifuse", options={"plan_cache": False})(torch.randn(8, 32))
    (forward,) = minifuse.reports()
    found = forward.saved_table()
    assert found is not None and found.saved and not any(a.module or a.kernels for a in found.activations)
    torch.compile(torch.cos, backend="minifuse")(torch.randn(4))
    assert minifuse.reports()[-1].saved_table() is None


def test_a_dump_has_the_table_and_the_page_has_the_drawing(tmp_path: Path) -> None:
    _, backward = trained(debug_dir=str(tmp_path))
    (folder,) = tmp_path.glob("*_backward")
    written = (folder / "saved.txt").read_text()
    table = backward.saved_table()
    assert table is not None
    assert all(re.search(rf"^{a.name} ", written, re.MULTILINE) for a in table.activations)
    assert not [*tmp_path.glob("*_forward/saved.txt")]
    page = (folder / "report.html").read_text()
    assert page.count("<polygon") == 4 and "the backward begins" in page and "http" not in page
    assert table.drawing is not None and table.drawing.areas[3].points in page


def test_the_page_escapes_the_names_of_modules() -> None:
    forward, backward = trained()
    evil = "<script>alert(1)</script>"
    for d in backward.decisions:
        if d.rule == "rematerialise":
            d.facts["module"] = evil  # type: ignore[index]
    page = html.render(backward)
    assert "<script" not in page and "&lt;script&gt;" in page and forward.name != backward.name


def test_a_drawing_keeps_the_peak_of_a_long_timeline_and_there_is_none_of_nothing() -> None:
    assert draw(Timeline()) is None
    steps = 5 * COLUMNS + 3
    rows = tuple(tuple(100 if k == 7 and c == 0 else 1 for k in range(steps)) for c in range(4))
    drawn = draw(Timeline(tuple(map(str, range(steps))), steps // 2, rows))
    assert drawn is not None
    assert drawn.areas[0].most == 100 and len(drawn.areas[0].points.split()) == 4 * COLUMNS
    assert drawn.boundary == pytest.approx(drawn.width / 2, abs=3) and drawn.peak[0] < drawn.width / 100
    tops = [float(p.partition(",")[2]) for p in drawn.areas[3].points.split()]
    assert min(tops) == 0 and max(tops) <= drawn.height
