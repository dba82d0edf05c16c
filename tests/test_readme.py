"""What the README and the docs say works as written."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks import readme
from benchmarks.chart import SHORT, chart
from benchmarks.harness import ratio
from minifuse.ir import ops
from minifuse.passes import pipeline
from minifuse.passes.lower import pointwise
from minifuse.passes.lower.externs import reason
from minifuse.records import RECORDS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Blocks of one page run together where a later one uses names of an earlier one.
TOGETHER = {"writing-a-remat-policy"}
EXTENSIONS = ("A pointwise operator", "A pass", "A rematerialisation policy", "A target")


def blocks(path: Path) -> list[str]:
    found = re.findall(r"^```python\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)
    return ["\n".join(found)] if path.stem in TOGETHER else found


CASES = [pytest.param(code, id=f"{path.stem}-{i}") for path in PAGES for i, code in enumerate(blocks(path))]


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(pipeline, "PASSES", pipeline.PASSES)
    table, rows = dict(ops.TABLE), dict(pointwise.ROWS)
    torch._dynamo.reset()
    RECORDS.clear()
    yield
    for now, then in ((ops.TABLE, table), (pointwise.ROWS, rows)):
        now.clear()
        now.update(then)  # type: ignore[arg-type]


@pytest.mark.parametrize("code", CASES)
def test_a_block_of_python_runs_as_written(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A module of its own: torch.library reads the annotations and the source of what it is given.
    name = f"readme_block_{abs(hash(code))}"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    del sys.modules[name]
    importlib.import_module(name)


@pytest.mark.parametrize("what", EXTENSIONS)
def test_an_extension_takes_fewer_than_twenty_lines(what: str) -> None:
    code = re.search(rf"\*\*{what}\*\*.*?```python\n(.*?)```", README, re.DOTALL)
    assert code is not None
    assert len([line for line in code[1].splitlines() if line.strip()]) < 20


def test_every_make_target_that_is_named_exists() -> None:
    rules = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = set(re.findall(r"`make (\w+)`|^    make (\w+)", README, re.MULTILINE))
    assert {a or b for a, b in named} <= set(rules)


def test_every_module_and_file_that_is_named_exists() -> None:
    for page in PAGES:
        text = page.read_text()
        for module in re.findall(r"python -m ([\w.]+)", text):
            assert importlib.util.find_spec(module), f"{page.name} names {module}"
        for path in re.findall(r"`((?:passes|codegen|docs|examples|tests|ir|runtime|explain)/[\w./-]+)`", text):
            assert (ROOT / path).exists() or (ROOT / "minifuse" / path).exists(), f"{page.name} names {path}"


def test_every_link_leads_to_a_file() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_figures_are_those_of_the_stored_results() -> None:
    assert readme.updated(README) == README


@pytest.mark.parametrize("name", readme.CHARTS)
def test_a_chart_is_that_of_the_stored_result(name: str) -> None:
    result = json.loads((readme.RESULTS / f"{name}.json").read_text())
    drawn = (readme.RESULTS / f"{name}.svg").read_text()
    assert drawn == chart(result)
    for row, figures in result["rows"].items():
        assert escape(row) in drawn
        assert all(f">{ratio(v)}<" in drawn for c, v in figures.items() if c.startswith("vs ") or "share" in c)


def test_a_chart_marks_what_misses_its_target_and_refuses_a_table_without_ratios() -> None:
    result = {"title": "t", "targets": {"vs eager": ">= 1"}, "rows": {"a": {"vs eager": 0.5}, "b": {"vs eager": 2.0}}}
    assert chart(result).count(SHORT) == 1
    with pytest.raises(ValueError, match="no column of ratios: step"):
        chart({"title": "t", "targets": {}, "rows": {"a": {"step": 1.0}}})


def test_a_stored_result_becomes_a_table() -> None:
    sample = {"median": 0.0123, "low": 0.012, "high": 0.0125, "count": 9}
    result = {
        "schema": 1,
        "title": "Steps",
        "targets": {"vs eager": ">= 1"},
        "rows": {"bert": {"step": sample, "vs eager": 1.25, "bytes": 2_000_000}, "vit": {"step": sample}},
        "errors": {},
        "verdict": "verdict: met",
        "versions": {"torch": "2.13.0"},
        "machine": {"gpu": None, "processor": "a processor", "threads": 2},
    }
    text = readme.table("cpu", result)
    assert "| bert | 12.3 ms ±2% | 1.25x | 2 MB |" in text
    assert "| vit | 12.3 ms ±2% | - | - |" in text
    assert "`python -m benchmarks.cpu`; a processor, 2 threads; torch 2.13.0" in text
    assert "vs eager (>= 1)" in text
    noted = readme.table("a-gpu-today", {**result, "gpu": {"driver": "1"}, "note": "Of commit abc.", "rows": {
        "norm": {"copy": 4.2e12, "of copy": 0.5}}})  # fmt: skip
    assert "`python -m benchmarks.gpu`;" in noted
    assert "Of commit abc." in noted
    assert "| norm | 4,200 GB/s | 0.50x |" in noted


def maker(name: str) -> ModuleType:
    """The script that writes a page of docs/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_options_is_current() -> None:
    assert (ROOT / "docs" / "options.md").read_text() == maker("make_options").page(), "run python docs/make_options.py"


def test_the_page_of_rematerialisation_is_made_from_the_stored_results() -> None:
    page = (ROOT / "docs" / "rematerialisation.md").read_text()
    assert page == maker("make_remat").page(), "run python docs/make_remat.py"


def test_the_kernels_in_the_docs_are_those_that_are_emitted() -> None:
    page = (ROOT / "docs" / "kernels.md").read_text()
    assert page.count("@triton.jit") == 5  # three functions, one of them in two launches, and a helper
    assert page == maker("make_kernels").page(), "run python docs/make_kernels.py"


def test_the_page_of_fusion_lists_the_rules_that_there_are() -> None:
    assert (ROOT / "docs" / "fusion.md").read_text() == maker("make_fusion").page(), "run python docs/make_fusion.py"


def test_the_page_of_externs_is_current_and_every_operator_has_a_reason() -> None:
    module = maker("make_externs")
    page = (ROOT / "docs" / "externs.md").read_text()
    if f"torch {module.VERSION}:" not in page:
        pytest.skip("written with another torch, whose operators are others")
    assert page == module.page(), "run python docs/make_externs.py"
    assert not sorted(name for name in module.unlowered() if reason(name) is None)
