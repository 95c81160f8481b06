"""What a balancer is, in words that are the same on every rank where it is the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from mtl_dist.balancer.progress import RuleProgress
from mtl_dist.canonical import canonical, tensor_bytes
from mtl_dist.sync import Identity


def identity(settings: Mapping[str, Any], progress: RuleProgress) -> Identity:
    """Settings as texts, the versions, and where the rule is.

    Args:
        settings: everything that decides which collectives run and which weights come out.
        progress: of the rule.
    """
    versions = {"torch": torch.__version__, "mtl_dist": _version()}
    return Identity(
        {name: canonical(value) for name, value in {**settings, **versions}.items()}, state_text(progress)
    )


def state_text(progress: RuleProgress) -> str:
    """Where a rule is: step, and a digest of weights and state."""
    return f"step {progress.step}, state {state_digest(progress):06x}"


def state_digest(progress: RuleProgress) -> int:
    """24 bits of a digest of step, weights and the rule's state; never 0. Reads values from the device."""
    whole = hashlib.sha256(str(progress.step).encode())
    for key, value in sorted({**progress.state, "weights of the balancer": progress.weights}.items()):
        whole.update(key.encode())
        whole.update(tensor_bytes(value))
    return int.from_bytes(whole.digest()[:3], "big") or 1


def _version() -> str:
    try:
        return version("mtl-dist")
    except PackageNotFoundError:  # run from a folder that is not installed
        return "not installed"
