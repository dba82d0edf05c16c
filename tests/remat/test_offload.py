"""Values that the host keeps between the passes: planned, simulated, run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from minifuse.errors import RematError
from minifuse.ir.device import DEVICES
from minifuse.passes.memory import peak
from minifuse.passes.remat.transfers import arrivals, departures
from minifuse.remat import OFFLOAD, SAVE, Problem, RematPlan, assemble, resolve, verify_plan
from tests.judge import records
from tests.remat.harness import Seen, backend
from tests.remat.test_plans import MB, chain, value


def large_to_host(problem: Problem) -> RematPlan:
    """Everything that save_all saves and that is no small thing goes to the host."""
    saved = [problem[n] for n in resolve("save_all").plan(problem).saved if not problem[n].is_given]
    large = [v.name for v in saved if v.kind in ("kernel", "reduction", "extern") and v.nbytes >= 1024]
    return assemble(problem, [v.name for v in saved if v.name not in large], "large_to_host", offloaded=large)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(64, 256), nn.Linear(256, 64), nn.LayerNorm(64)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(nn.functional.gelu(self.up(self.norm(x)))))


def gradients(model: nn.Module, x: Tensor, **options: object) -> list[Tensor]:
    torch._dynamo.reset()
    torch.manual_seed(3)
    model.zero_grad()
    torch.compile(model, backend="minifuse", options=options)(x).square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("device", ["cpu", "H100"])  # with a link the ways are longer, and begin earlier
def test_gradients_are_those_of_what_is_saved_bit_for_bit(device: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(*(Block() for _ in range(3))), torch.randn(128, 64)
    want = gradients(model, x, remat="save_all", device_model=device)
    found = gradients(model, x, remat=large_to_host, device_model=device)
    assert all(map(torch.equal, want, found))
    plan = records("forward")[-1].stages["remat"]
    assert len(plan.offloaded) > 9 and plan.offloaded_bytes == max(plan.timeline.host) > 20 * plan.saved_bytes
    for stage, ops in (("forward", ("offload", "offloaded")), ("backward", ("reload", "reloaded"))):
        calls = [str(e.target) for e in records(stage)[-1].stages["memory"].externs]
        assert all(calls.count(f"minifuse.{op}.default") == len(plan.offloaded) for op in ops)


def test_the_peak_of_a_step_falls_by_what_the_host_keeps() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(*(Block() for _ in range(6))), torch.randn(512, 64)
    gradients(model, x, remat="save_all")
    everything = records("forward")[-1].stages["remat"]
    gradients(model, x, remat=large_to_host)
    plan = records("forward")[-1].stages["remat"]
    assert plan.peak_bytes < 0.4 * everything.peak_bytes
    # here the host's memory is the device's: the plans that run hold both
    planned = max(peak(records(stage)[-1].stages["memory"])[0] for stage in ("forward", "backward"))
    held = max(a + b for a, b in zip(plan.timeline.total, plan.timeline.host, strict=True))
    assert planned == pytest.approx(held, rel=0.1)


def test_a_transfer_takes_the_link_beside_the_work_and_is_behind_when_it_is_needed() -> None:
    link = replace(DEVICES["H100"], link=1e9)
    work = [value(f"v{i}", kind="extern", flops=1e-3 * link.flops, nbytes=MB) for i in range(9)]
    problem = Problem(tuple(work), ("v8",), (), (), link)
    # each takes a little over 1 ms, a way of 1 MB on the link too
    assert arrivals(problem, work, [work[0], work[4]]) == {"v0": 1, "v4": 5}
    assert arrivals(problem, work, [work[0], work[1], work[2]]) == {"v0": 1, "v1": 2, "v2": 3}
    assert departures(problem, work, [work[8], work[7]]) == {"v8": 7, "v7": 6}
    host = replace(problem, device=replace(link, link=0.0))
    assert arrivals(host, work, [work[3]]) == departures(host, work, [work[3]]) == {"v3": 3}


def test_beside_a_link_a_step_takes_the_longer_of_the_two() -> None:
    problem = chain(value("a", "mm", flops=1e6), required=("mm", "a"))
    gpu = replace(problem, device=DEVICES["H100"])
    for p in (problem, gpu):
        saved, sent = assemble(p, ["mm", "a"], "p"), assemble(p, ["a"], "p", offloaded=["mm"])
        assert sent.choices["mm"].action == OFFLOAD and sent.offloaded_bytes == MB and sent.saved_bytes == MB
        assert sent.step_seconds > saved.step_seconds
    assert sent.timeline.transfers == (MB / DEVICES["H100"].link,) * 2
    assert RematPlan.from_json(sent.to_json()) == sent


@pytest.mark.parametrize(
    ("extra", "words"),
    [({"kind": "view", "storage": "mm"}, "cannot be offloaded"), ({"savable": False}, "cannot be offloaded"),
     ({"tag": "must_recompute"}, "tagged must_recompute")],
)  # fmt: skip
def test_what_is_no_memory_of_the_forward_is_not_offloaded(extra: dict[str, object], words: str) -> None:
    problem = chain(value("a", "mm", **extra), required=("mm", "a"))  # type: ignore[arg-type]
    with pytest.raises(RematError, match=words):
        verify_plan(problem, assemble(problem, ["mm"], "p", offloaded=["a"]))


def test_what_is_saved_too_is_not_offloaded_and_an_unknown_name_is_an_error() -> None:
    problem = chain(value("a", "mm"), required=("mm", "a"))
    assert assemble(problem, ["mm", "a"], "p", offloaded=["a"]).choices["a"].action == SAVE
    with pytest.raises(RematError, match="did you mean 'mm'"):
        assemble(problem, [], "p", offloaded=["mmm"])


def test_what_the_caller_is_given_stays_on_the_device_beside_its_copy_on_the_host() -> None:
    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.tanh()
        return y, y.exp()

    def both(problem: Problem) -> RematPlan:
        return assemble(problem, [], "both", offloaded=["tanh", "exp"])

    seen, x = Seen(), torch.randn(4, requires_grad=True)
    y, z = torch.compile(f, backend=backend(resolve(both), seen=seen))(x)
    z.sum().backward()
    torch.testing.assert_close((y, z), (x.tanh(), x.tanh().exp()))
    returned = [n.name for n in seen.forwards[0].graph.output_node().args[0]]
    assert returned[:2] == ["tanh", "exp"]
    assert sum(name.startswith("offloaded") for name in returned) == len(seen.plans[0].offloaded) == 2


def test_a_plan_read_from_a_file_offloads_what_it_did(tmp_path: Path) -> None:
    problem = chain(value("a", "mm"), value("b", "a", is_random=True), required=("mm", "a", "b"))
    plan = assemble(problem, ["a"], "p", offloaded=["mm", "b"])
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json())
    again = resolve(path).plan(problem)
    verify_plan(problem, again)
    assert again.choices == plan.choices and again.timeline == plan.timeline
