"""Batch invariance of a user's model: which operators give a sequence other bits in another batch."""

from grpo_fast.invariance.check import check_invariance
from grpo_fast.invariance.report import InvarianceReport, Operator

__all__ = ["InvarianceReport", "Operator", "check_invariance"]
