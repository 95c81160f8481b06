"""`check=True`: every step measured a second time by plain autograd, and findings in plain words."""

from __future__ import annotations

from mtl_dist.checks.check import Check
from mtl_dist.checks.diagonal import STREAK, DiagonalWatch
from mtl_dist.checks.findings import Finding

__all__ = ["STREAK", "Check", "DiagonalWatch", "Finding"]
