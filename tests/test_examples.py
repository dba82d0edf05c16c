from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BACKEND = "minifuse"

EXAMPLES = {
    "quickstart": ["--elements", "100000"],
    "vit_digits": ["--steps", "4"],
    "bert_llama": ["--steps", "3", "--layers", "1"],
    "dit_adaln": ["--steps", "3", "--hidden", "32"],
    "gpt_on_text": ["--steps", "3", "--no-memory"],
    "custom_remat_policy": ["--layers", "1", "--batch", "8"],
    "read_the_dump": [],
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_runs_and_names_its_backend(name: str) -> None:
    command = [sys.executable, "-m", f"examples.{name}", "--backend", BACKEND, *EXAMPLES[name]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert BACKEND in done.stdout


def test_every_example_is_tested() -> None:
    found = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert found - {"__init__", "common"} == EXAMPLES.keys()
