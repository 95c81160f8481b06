"""Synchronised multi-task loss weighting for any data-parallel engine."""

from __future__ import annotations

__version__ = "0.1.0"
