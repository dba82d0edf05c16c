"""Lowering: FX nodes to kernels, externs and views."""

from .graph import lower

__all__ = ["lower"]
