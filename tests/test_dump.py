"""The dump has every stage, its scripts run, and nothing about it can break a compile."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minifuse.explain.replay import kernel_script, replay
from minifuse.ir.plan import Plan
from minifuse.ir.text import print_kernel
from minifuse.records import RECORDS
from minifuse.runtime.cache import write_atomically

STEM = ("decisions.json", "decisions.txt", "kernels.c", "program.py", "report.html", "report.json", "report.txt")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm, self.linear = nn.Embedding(50, 16), nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.embedding(ids))
        return F.softmax(self.linear(F.dropout(x, 0.2)), -1).log().mean()


def dumped(folder: Path, *, dynamic: bool = False) -> list[Path]:
    torch._dynamo.reset()
    compiled = torch.compile(Attention(), backend="minifuse", options={"debug_dir": str(folder)}, dynamic=dynamic)
    compiled(torch.randint(0, 50, (4, 8))).backward()
    return sorted(folder.iterdir())


def test_each_graph_has_a_folder_with_every_stage(tmp_path: Path) -> None:
    backward, forward = dumped(tmp_path)
    assert forward.name.endswith("forward")
    for folder in (forward, backward):
        names = {path.name for path in folder.iterdir()}
        assert names >= {*STEM, "captured.fx.py", "joint.fx.py", "plan_lower.txt", "plan_fuse.txt", "plan_memory.txt"}
        assert f"{folder.name.rpartition('_')[2]}.fx.py" in names
        assert any(name.startswith("kernel_") for name in names)
        for name in ("decisions.json", "report.json"):
            json.loads((folder / name).read_text())


def test_a_folder_is_named_after_the_part_of_the_model(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.GELU()) for _ in range(2)])

        def forward(self, x: Tensor) -> Tensor:
            x = self.layers[0](x)
            torch._dynamo.graph_break()
            return self.layers[1](x)

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(Two(), backend="minifuse", options={"debug_dir": str(tmp_path)})(torch.randn(3, 4))
    first, second = sorted(path.name for path in tmp_path.iterdir())
    assert "Sequential_layers_0" in first
    assert "Sequential_layers_1" in second


def test_the_environment_asks_for_a_dump_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIFUSE_DEBUG", str(tmp_path))
    torch._dynamo.reset()
    torch.compile(lambda x: x.cos(), backend="minifuse")(torch.randn(3))
    assert len(list(tmp_path.iterdir())) == 1


def test_every_script_runs_its_kernel_and_agrees(tmp_path: Path) -> None:
    scripts = [s for folder in dumped(tmp_path) for s in sorted(folder.glob("kernel_*.py"))]
    assert len(scripts) >= 2
    for script in scripts[:2]:
        done = subprocess.run([sys.executable, script], cwd="/", capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        last = done.stdout.splitlines()[-1]
        assert "agrees with the interpreter" in last
        assert "µs" in last
        assert "GB/s" in last


@pytest.mark.parametrize("dynamic", [False, True])
def test_every_kernel_replays(tmp_path: Path, dynamic: bool) -> None:
    RECORDS.clear()
    dumped(tmp_path, dynamic=dynamic)
    for record in RECORDS:
        plan: Plan = record.stages["memory"]
        for launch in plan.launches:
            sizes = {s.name: plan.symbols[s.name].hint for s in launch.kernel.symbols()}
            found = replay(print_kernel(launch.kernel, launch.schedule, launch.name), sizes)
            assert found.right, found
            assert found.seconds > 0


def test_a_wrong_kernel_is_seen() -> None:
    text = """kernel k  i < 64
  param a : f32[64]
  param b : f32[64]
  store b[i] = cos(load a[i])
  schedule i: lane
"""
    assert replay(text, {}).right
    with pytest.raises(ValueError, match="no schedule"):
        replay(text.replace("  schedule i: lane\n", ""), {})


def test_text_of_the_user_stands_in_a_script_only_as_a_literal(tmp_path: Path) -> None:
    RECORDS.clear()
    torch._dynamo.reset()
    torch.compile(lambda x: x.cos() + len("\"\"\"'''\\"), backend="minifuse")(torch.randn(8))
    plan: Plan = RECORDS[-1].stages["memory"]
    evil = '""" \'\'\'\n__import__("os").abort() {0} \\'
    hurt = Plan(evil, plan.inputs, plan.buffers, plan.steps, plan.outputs, origins=dict.fromkeys(plan.origins, evil))
    tree = ast.parse(kernel_script(hurt, hurt.launches[0]))
    assert {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)} == {"main", "SystemExit"}
    values = {n.targets[0].id: ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign)}  # type: ignore[attr-defined]
    assert (values["GRAPH"], values["FROM"]) == (evil, (evil,))


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.txt"
    write_atomically(target, b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(target, b"new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_disk_that_refuses_is_one_warning(tmp_path: Path) -> None:
    refusing = tmp_path / "file"
    refusing.write_text("not a folder")
    options = {"debug_dir": str(refusing)}
    x = torch.randn(5)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for f in (torch.cos, torch.sin):
            torch._dynamo.reset()
            torch.testing.assert_close(torch.compile(f, backend="minifuse", options=options)(x), f(x))
    assert [str(w.message).split(":")[0] for w in said if "minifuse" in str(w.message)] == [
        f"minifuse writes no dump into {refusing}"
    ]


@pytest.mark.parametrize("part", ["minifuse.dump.print_plan", "torch.fx.GraphModule.print_readable"])
def test_a_stage_that_cannot_be_printed_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    def fail(*_: object, **given: object) -> str:
        if len(given) > 1:  # torch logs its graphs by the same method
            return ""
        raise KeyError("nothing of this name")

    monkeypatch.setattr(part, fail)
    x = torch.randn(5)
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match="writes no dump into .*: KeyError: 'nothing of this name'"):
        found = torch.compile(torch.cos, backend="minifuse", options={"debug_dir": str(tmp_path)})(x)
    torch.testing.assert_close(found, x.cos())
