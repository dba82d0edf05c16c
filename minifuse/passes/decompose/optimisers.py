"""Fused optimiser steps (`torch._fused_adamw_` and its kin) as their elementwise parts.

Of the family torch traces Adam's with a rate that is a number alone: the others have no shape function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
Lists = tuple[list[Tensor], ...]


def _adam(decoupled: bool) -> Callable[..., Lists]:
    """Kingma and Ba, "Adam", 2015; decoupled weight decay by Loshchilov and Hutter, "AdamW", 2019.

    Gives parameters, gradients (divided by `grad_scale`), both moments and the greatest second one: all as they were
    where `found_inf` is 1. Step counts are the caller's to advance.
    """

    def step(
        params: Sequence[Tensor], grads: Sequence[Tensor], firsts: Sequence[Tensor], seconds: Sequence[Tensor],
        greatest: Sequence[Tensor], counts: Sequence[Tensor], *, lr: Any, beta1: float, beta2: float,
        weight_decay: float, eps: float, amsgrad: bool, maximize: bool, grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> Lists:  # fmt: skip
        out: Lists = ([], [], [], [], [])
        for k, (p, grad, m, v, count) in enumerate(zip(params, grads, firsts, seconds, counts, strict=True)):
            old = [p, grad, m, v, *greatest[k : k + 1]]
            grad = grad if grad_scale is None else grad / grad_scale
            g = -grad if maximize else grad
            if decoupled:
                p = p - lr * weight_decay * p
            elif weight_decay:
                g = g + p * weight_decay
            m = m + (1 - beta1) * (g - m)
            v = beta2 * v + (1 - beta2) * g * g
            most = torch.maximum(greatest[k], v) if amsgrad else v
            root = most.sqrt() / (1 - beta2**count).sqrt() + eps
            p = p - lr / (1 - beta1**count) * m / root
            for into, new, before in zip(out, [p, grad, m, v, most], old, strict=False):
                new = new if found_inf is None else torch.where(found_inf == 1, before, new)
                into.append(new.to(before.dtype))
        return out

    return step


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Overload -> its parts, for the functional forms."""
    return {aten._fused_adam.default: _adam(decoupled=False), aten._fused_adamw.default: _adam(decoupled=True)}
