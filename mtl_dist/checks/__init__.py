"""`check=True`: every step measured a second time by plain autograd, and findings in plain words."""

from __future__ import annotations

from mtl_dist.checks.check import Check
from mtl_dist.checks.diagonal import DiagonalWatch
from mtl_dist.checks.findings import Finding
from mtl_dist.checks.one_task import OneTaskWatch
from mtl_dist.checks.recent import Watches

__all__ = ["Check", "DiagonalWatch", "Finding", "OneTaskWatch", "Watches"]
