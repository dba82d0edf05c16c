"""A tenth of PyTorch's operator database; `make conformance` takes all of it."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from tests.conformance.known import KNOWN, is_known
from tests.conformance.run import DTYPES, Job, check, operators

TENTH = [name for name in operators() if name not in KNOWN][4::10]


@pytest.mark.parametrize("name", TENTH)
def test_an_operator_does_what_eager_does(name: str) -> None:
    warnings.simplefilter("ignore")
    dtype = "float32" if operators()[name].supports_dtype(DTYPES["float32"], "cpu") else "int64"
    found = [f for dynamic in (False, True) for f in check(Job(name, dtype, dynamic, limit=3)) if f.kind != "torch"]
    assert not found, "\n".join(map(str, found))


def test_an_operator_that_differs_in_some_dtypes_is_judged_in_the_others() -> None:
    for name, known in KNOWN.items():
        supported = {d for d, t in DTYPES.items() if operators()[name].supports_dtype(t, "cpu")}
        assert known.dtypes and known.dtypes <= supported
    assert is_known("nn.functional.soft_margin_loss", "float16")
    assert not is_known("nn.functional.soft_margin_loss", "float32") and not is_known("add", "float32")


@pytest.mark.slow
def test_a_thirtieth_of_the_operators_does_what_eager_does_by_interpreted_triton(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tests.conformance", "--target", "triton", "--limit", "2", "--shapes", "static"]
    environment = {**os.environ, "MINIFUSE_CACHE_DIR": str(tmp_path)}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([*command, "--part", "7/30", "--jobs", "1"], cwd=root, env=environment, capture_output=True,
                          text=True, timeout=900)  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
