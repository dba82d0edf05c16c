"""Operators of the database that differ from eager, with the reason: `title of the OpInfo` -> why.

`python -m tests.conformance` counts these apart; one that no longer fails is to be taken out.
"""

_UNPOOL = "torch's shape function says row-major strides where eager gives channels-last ones; the values are right"

KNOWN: dict[str, str] = {
    "nn.functional.max_unpool2d": _UNPOOL,
    "nn.functional.max_unpool2d.grad": _UNPOOL,
    "nn.functional.soft_margin_loss": "torch's decomposition stays in float32 where eager's steps overflow in float16",
}
