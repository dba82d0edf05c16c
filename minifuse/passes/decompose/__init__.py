"""Decompositions: which ATen operators are taken apart, and into what."""

from .tables import KEEP_ON_CPU, RESIZING, Decompositions

__all__ = ["KEEP_ON_CPU", "RESIZING", "Decompositions"]
