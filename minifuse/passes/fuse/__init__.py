"""Fusion: which kernels become one, decided by the time that they save."""

from .rules import RULES, Candidate, Force, Rule, forbid, force
from .search import Landed, fuse, landed

__all__ = ["RULES", "Candidate", "Force", "Landed", "Rule", "forbid", "force", "fuse", "landed"]
