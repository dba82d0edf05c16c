"""A tenth of the families, chosen by `families.TENTH`; `make models` takes all of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.models.check import COVERED, check
from tests.models.families import FAMILIES, KINDS, TENTH


@pytest.mark.parametrize("family", TENTH)
def test_a_training_step_is_as_exact_as_eager_and_runs_in_generated_kernels(family: str) -> None:
    found = check(family)
    assert not found.wrong
    assert not found.unknown
    assert found.coverage >= COVERED, found.left


def test_a_batch_norm_of_images_sees_more_than_a_pair_of_numbers() -> None:
    """Of two numbers it makes plus and minus one, whatever they are: their gradient is what rounding left, and differs
    from eager's by chance."""
    for name, make in FAMILIES.items():
        torch.manual_seed(0)
        model, inputs = make()
        seen: list[int] = []
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            norm.register_forward_pre_hook(lambda norm, x, seen=seen: seen.append(x[0].numel() // norm.num_features))
        if norms:
            with torch.no_grad():
                model.train()(**inputs)
        assert min(seen, default=8) >= 8, (name, min(seen))


def test_every_kind_has_families_and_one_of_each_is_in_the_tenth() -> None:
    assert len(FAMILIES) == sum(map(len, KINDS.values())), "two kinds share a name"
    assert all(set(kind) & set(TENTH) for kind in KINDS.values())
