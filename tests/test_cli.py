"""The command line."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import minifuse
from minifuse.cli import main
from minifuse.explain.curves import curve_of, limited
from minifuse.remat import POLICIES, Problem, RematPlan, assemble, limit_of, resolve
from minifuse.runtime.cache import DiskCache


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    cache = DiskCache(tmp_path / "cache")
    cache.put("graph_a.0", b"1" * 3000)
    cache.put("0123456789abcdef", b"2" * 500)
    cache.put("device_b", b"3")
    return tmp_path / "cache"


def test_the_cache_is_shown_by_kind(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "--dir", str(folder)]) == 0
    said = capsys.readouterr().out
    rows = {line.split("  ")[0].strip(): line.split() for line in said.splitlines()[2:]}
    assert rows["compiled graphs"][2:4] == ["1", "3"] and rows["compiled kernels"][2:5] == ["1", "500", "B"]
    assert rows["all"][1] == "3"


def test_entries_are_listed_the_one_used_last_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (old,) = folder.glob("graph_*")
    os.utime(old, (time.time() - 90_000,) * 2)
    assert main(["cache", "list", "--dir", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and "graph_a.0" in lines[-1]


def test_entries_are_cleared_those_of_some_age_or_all(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (old,) = folder.glob("graph_*")
    os.utime(old, (time.time() - 90_000,) * 2)
    assert main(["cache", "clear", "--older", "1", "--dir", str(folder)]) == 0
    assert "1 of 3 entries cleared" in capsys.readouterr().out and not old.exists()
    assert main(["cache", "clear", "--dir", str(folder)]) == 0
    assert not [*folder.glob("*.bin")]


def test_what_is_not_ours_is_not_cleared(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder.chmod(0o777)
    assert main(["cache", "clear", "--dir", str(folder)]) == 1
    assert "others may write" in capsys.readouterr().out and len([*folder.glob("*.bin")]) == 3


def test_nothing_there_is_no_error_and_a_wrong_word_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "--dir", str(tmp_path / "none")]) == 0
    assert "nothing is cached" in capsys.readouterr().out
    for wrong in (["cache", "list", "--older", "3"], ["cash"], ["cache", "clean"]):
        with pytest.raises(SystemExit) as stop:
            main(wrong)
        assert stop.value.code == 2


MODULE = """
import torch
from torch import nn
from minifuse.remat import assemble


def model():
    torch.manual_seed(0)
    layers = (nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 16), nn.Tanh())
    return nn.Sequential(*layers), (torch.randn(8, 16),)


def twice():
    def run(x):
        x = layers(x)
        torch._dynamo.graph_break()
        return layers(x)

    layers, inputs = model()
    return run, (), {"x": inputs[0]}


def nothing():
    return torch.cos, (torch.randn(4),)


class Products:
    name = "products"

    def plan(self, problem):
        return assemble(problem, [v.name for v in problem.values if v.kind == "extern" and v.savable], self.name)


def wrong(problem):
    raise KeyError("lost")
"""


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The problem of a small model, in a folder that has a module beside it."""
    layers = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 16), nn.Tanh())
    found = minifuse.capture(layers, torch.randn(8, 16), compile_options={"device_model": "cpu"}).problem
    folder = tmp_path_factory.mktemp("curves")
    assert found is not None
    (folder / "small.json").write_text(found.to_json())
    (folder / "some_models.py").write_text(MODULE)
    yield folder / "small.json"
    sys.modules.pop("some_models", None)


@pytest.fixture
def here(problem: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    torch._dynamo.reset()
    monkeypatch.chdir(problem.parent)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    return problem.parent


def compared(*arguments: str) -> dict[str, Any]:
    assert main(["remat", *arguments, "--json", "out.json"]) == 0
    return json.loads(Path("out.json").read_text())


def test_every_policy_that_ships_is_asked_at_every_budget_that_it_looks_at(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (graph,) = compared("small.json", "--budgets", "1,.5,.2")["graphs"]
    printed = capsys.readouterr()
    problem = Problem.from_json(Path("small.json").read_text())
    asked: dict[str, list[float | None]] = {}
    for p in graph["points"]:
        asked.setdefault(p["policy"], []).append(p["budget"])
    assert set(asked) == set(POLICIES) and graph["failures"] == []
    assert asked["default"] == asked["knapsack_budget"] == [1, 0.5, 0.2]
    assert asked["save_all"] == asked["recompute_all"] == asked["chen_sqrt"] == [None]
    for p in graph["points"]:
        given = replace(problem, memory_budget=1.0 if p["budget"] is None else p["budget"], on_budget="best")
        plan = POLICIES[p["policy"]].plan(given)
        figures = (plan.peak_bytes, plan.saved_bytes, plan.step_seconds, plan.extra_flops, plan.status)
        assert figures == tuple(p[n] for n in ("peak_bytes", "saved_bytes", "step_seconds", "extra_flops", "status"))
        budgets = (1, 0.5, 0.2) if p["budget"] is None else [p["budget"]]
        limits = {b: limit_of(replace(problem, memory_budget=b)) for b in budgets}
        assert p["within"] == [b for b in budgets if plan.peak_bytes <= limits[b]]
        if plan.status == "optimal":
            assert 0 <= p["gap"] < 1e-4
    assert printed.err == "" and len(printed.out.splitlines()) >= 2 + len(graph["points"])
    assert re.search(r"^save_all +any ", printed.out, re.MULTILINE) and "over budget" in printed.out


def test_a_models_graphs_with_a_backward_each_have_a_curve(here: Path) -> None:
    data = compared("some_models:twice", "--policies", "default, some_models:Products", "--budgets", "1,.5,2000000",
                    "--device", "H100")  # fmt: skip
    first, second = data["graphs"]
    assert {g["device"] for g in data["graphs"]} == {"H100"} and first["graph"] != second["graph"]
    rows = [(p["policy"], p["budget"]) for p in first["points"]]
    assert rows == [("default", 1), ("default", 0.5), ("default", 2_000_000), ("products", None)]
    assert first["points"][2]["within"] == [2_000_000]


def test_a_plot_is_a_png_an_svg_or_a_page_that_needs_nothing_else(here: Path) -> None:
    pytest.importorskip("matplotlib")
    few = ("small.json", "--policies", "default,save_all", "--budgets", "1,.5,.1", "--device", "A100")
    for name, start in (("a.png", b"\x89PNG\r\n"), ("a.svg", b"<?xml"), ("a.html", b"<!doctype html>")):
        compared(*few, "--plot", name)
        assert Path(name).read_bytes().startswith(start)
    drawn, page = Path("a.svg").read_text(), Path("a.html").read_text()
    for text in (drawn, page):
        assert all(word in text for word in ("<svg", ">default<", ">save_all<", ">predicted peak (MB)<"))
    assert "<td>save_all</td>" in page and "rates of A100" in page
    assert not re.search(r"<(?:script|link|img)|(?:src|href)=\"http|url\(http|@import", page)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["small.json", "--policies", "defualt"],
            r"'defualt' \(did you mean 'default'\?\); policies: default, p",
        ),
        (["small.json", "--policies", "some_models:none"], "some_models:none: expected MODULE:NAME .* no attribute"),
        (["small.json", "--policies", "no_such_module:none"], "expected MODULE:NAME .* No module named"),
        (["small.json", "--budgets", "1,1.5"], "--budgets: got '1.5', expected shares from 0 to 1, or whole bytes"),
        (["small.json", "--budgets", "half"], "--budgets: got 'half'"),
        (["small.json", "--budgets", "nan"], "--budgets: got 'nan'"),
        (["small.json", "--budgets", "-1"], "expected one argument|got '-1'"),
        (["small.json", "--plot", "a.pdf"], "--plot: got 'a.pdf', expected a name that ends in .png, .svg, .html"),
        (["small.json", "--seconds", "0"], "--seconds: got 0, expected more than 0"),
        (["small.json", "--device", "abacus"], "invalid choice: 'abacus'"),
        (["none.json"], "none.json: expected what Problem.to_json wrote; FileNotFoundError"),
        (["some_models"], "some_models: expected MODULE:NAME"),
        (["some_models:MODULE"], "some_models:MODULE: expected|has no attribute"),
        (["some_models:nothing"], "some_models:nothing: expected a model to train"),
        (["builtins:dict"], r"builtins:dict: expected a function that returns \(model, args\) .* found dict"),
    ],
)
def test_what_is_not_there_is_named(
    arguments: list[str], words: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["remat", *arguments])
    assert stop.value.code == 2
    assert re.search(words, capsys.readouterr().err)


def test_without_matplotlib_a_plot_is_refused_before_anything_is_planned(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("minifuse.explain.curves.curve_of", lambda *a: pytest.fail("planned"))
    with pytest.raises(SystemExit):
        main(["remat", "small.json", "--plot", "a.png"])
    assert "pip install minifuse[plot]" in capsys.readouterr().err


def test_a_policy_that_fails_is_said_below_the_table_and_the_others_are_compared(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (graph,) = compared("small.json", "--policies", "some_models:wrong,save_all", "--budgets", "1,.5")["graphs"]
    assert [(f["policy"], f["budget"]) for f in graph["failures"]] == [("wrong", 1), ("wrong", 0.5)]
    assert [p["policy"] for p in graph["points"]] == ["save_all"]
    assert "wrong at 1: the rematerialisation policy 'wrong': expected" in capsys.readouterr().out
    assert main(["remat", "small.json", "--policies", "some_models:wrong"]) == 1


@dataclass(frozen=True)
class Searching:
    """Takes the seconds that it is given for its status."""

    seconds: float = 60.0
    name: str = "searching"

    def plan(self, problem: Problem) -> RematPlan:
        return assemble(problem, POLICIES["save_all"].plan(problem).saved, self.name, status=f"{self.seconds:g} s")


def test_a_limit_of_seconds_reaches_the_policies_that_take_one(problem: Path) -> None:
    read = Problem.from_json(problem.read_text())
    policies = [limited(p, 2.5) for p in (Searching(), POLICIES["mincut"], resolve(lambda p: [*p.required]))]
    assert policies[1] is POLICIES["mincut"]
    counted: list[int] = []
    found = curve_of("x", read, policies[:2], [1.0, 0.5], counted.append)
    assert found.points[0].status == "2.5 s" and counted == [1] * 4


def test_a_budget_of_nothing_is_refused_and_gives_the_least_there_is(problem: Path) -> None:
    read = Problem.from_json(problem.read_text())
    assert limit_of(replace(read, memory_budget=0.0)) == 0
    layers = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 16), nn.Tanh())
    asked = {"memory_budget": 0, "on_budget": "best"}
    least = minifuse.capture(layers, torch.randn(8, 16), compile_options=asked).remat
    most = minifuse.capture(layers, torch.randn(8, 16)).remat
    assert least is not None and most is not None and least.peak_bytes < most.peak_bytes
    with pytest.raises(minifuse.MinifuseError, match=r"the least peak of .* the budget is 0 B"):
        minifuse.capture(layers, torch.randn(8, 16), compile_options={"memory_budget": 0.0})
