"""Operators of the database that differ from eager, with the reason: `title of the OpInfo` -> where and why.

`python -m tests.conformance` counts these apart; one that no longer fails is to be taken out.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

FLOATS = frozenset({"float16", "bfloat16", "float32", "float64"})


@dataclass(frozen=True)
class Known:
    """Why an operator differs, and in which dtypes; in the others it is to be as eager."""

    why: str
    dtypes: Set[str]


_UNPOOL = Known(
    "torch's shape function says row-major strides where eager gives channels-last ones; the values are right", FLOATS
)

KNOWN: dict[str, Known] = {
    "nn.functional.max_unpool2d": _UNPOOL,
    "nn.functional.max_unpool2d.grad": _UNPOOL,
    "nn.functional.soft_margin_loss": Known(
        "torch's decomposition stays in float32 where eager's steps overflow in float16", {"float16"}
    ),
}


def is_known(op: str, dtype: str) -> bool:
    """Whether an operator is known to differ from eager in a dtype."""
    return op in KNOWN and dtype in KNOWN[op].dtypes
