"""Rematerialisation: what the backward loads, and what it computes again.

Those who write policies import `minifuse.remat`.
"""

from .partition import partition

__all__ = ["partition"]
