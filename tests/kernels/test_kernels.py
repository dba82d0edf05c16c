"""A slice of the Triton kernels of the model set; `make kernels` takes all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parents[2]
SLICE = [("compile", "families/vit", "--targets", "cuda:100"), ("run", "families/vit", "--draws", "1")]


@pytest.mark.slow
@pytest.mark.parametrize("chosen", SLICE, ids=["compile", "run"])
def test_kernels_of_a_training_step_compile_and_are_as_exact_as_eager(chosen: tuple[str, ...], tmp_path: Path) -> None:
    what, name, *rest = chosen
    command = [sys.executable, "-m", "tests.kernels", name, "--what", what, "--jobs", "1", *rest]
    environment = {**os.environ, "MINIFUSE_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "failing: none" in done.stdout


def test_what_fails_is_named_and_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = pytest.importorskip("tests.kernels.__main__")
    monkeypatch.setattr(main, "ask", lambda what, name, args, claims: (1, ["spilled"] if name.endswith("vit") else []))
    monkeypatch.setattr(sys, "argv", ["kernels", "families/vit", "families/bert", "--what", "compile"])
    assert main.main() == 1
    assert capsys.readouterr().out.endswith("failing: compile families/vit\n")
