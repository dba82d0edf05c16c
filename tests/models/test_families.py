"""A tenth of the families, chosen by `families.TENTH`; `make models` takes all of them."""

from __future__ import annotations

import pytest

from tests.models.check import COVERED, check
from tests.models.families import FAMILIES, KINDS, TENTH


@pytest.mark.parametrize("family", TENTH)
def test_a_training_step_is_as_exact_as_eager_and_runs_in_generated_kernels(family: str) -> None:
    found = check(family)
    assert not found.wrong
    assert not found.unknown
    assert found.coverage >= COVERED, found.left


def test_every_kind_has_families_and_one_of_each_is_in_the_tenth() -> None:
    assert len(FAMILIES) == sum(map(len, KINDS.values())), "two kinds share a name"
    assert all(set(kind) & set(TENTH) for kind in KINDS.values())
