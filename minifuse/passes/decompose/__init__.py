"""Decompositions: which ATen operators are taken apart, and into what."""

from .tables import RESIZING, decompositions

__all__ = ["RESIZING", "decompositions"]
