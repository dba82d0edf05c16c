"""Fusion: which kernels become one, decided by bytes of memory traffic."""

from .greedy import fuse

__all__ = ["fuse"]
