"""Fusion: which kernels become one, decided by the time that they save."""

from .rules import RULES, Candidate, Force, Rule, forbid, force
from .search import fuse, landed

__all__ = ["RULES", "Candidate", "Force", "Rule", "forbid", "force", "fuse", "landed"]
