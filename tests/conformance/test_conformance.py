"""A tenth of PyTorch's operator database; `make conformance` takes all of it."""

from __future__ import annotations

import warnings

import pytest

from tests.conformance.known import KNOWN
from tests.conformance.run import DTYPES, Job, check, operators

TENTH = [name for name in operators() if name not in KNOWN][4::10]


@pytest.mark.parametrize("name", TENTH)
def test_an_operator_does_what_eager_does(name: str) -> None:
    warnings.simplefilter("ignore")
    dtype = "float32" if operators()[name].supports_dtype(DTYPES["float32"], "cpu") else "int64"
    found = [f for dynamic in (False, True) for f in check(Job(name, dtype, dynamic, limit=3)) if f.kind != "torch"]
    assert not found, "\n".join(map(str, found))
