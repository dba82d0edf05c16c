"""The code in docs/running.md that needs a package which minifuse does not; the rest is run with the other pages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.usage.page import blocks

CASES = [
    pytest.param(needs, code, id=f"{needs}-{i}") for needs in ("accelerate",) for i, code in enumerate(blocks(needs))
]


@pytest.mark.parametrize(("needs", "code"), CASES)
def test_a_block_runs_as_written(needs: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(needs)
    torch.compiler.reset()
    monkeypatch.chdir(tmp_path)
    exec(code, {"__name__": "block"})
