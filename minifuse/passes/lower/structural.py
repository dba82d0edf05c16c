"""Structural lowerers: views, reductions, indexing, concatenation, creation, randomness, in one table."""

from minifuse.ir import prims as _prims  # noqa: F401 - registers the random operators that rows name

from . import creation, indexing, joining, pooling, reductions, resizing, scans, scattering, viewing
from .registry import STRUCTURAL

__all__ = [
    "STRUCTURAL",
    "creation",
    "indexing",
    "joining",
    "pooling",
    "reductions",
    "resizing",
    "scans",
    "scattering",
    "viewing",
]
