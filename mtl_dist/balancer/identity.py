"""What a balancer is, in words that are the same on every rank where it is the same."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from mtl_dist.balancer.progress import RuleProgress
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
        whole.update(_bytes(value))
    return int.from_bytes(whole.digest()[:3], "big") or 1


def canonical(value: Any) -> str:
    """A text for a setting: mappings and sets in one order, no addresses, fields that `repr` hides too."""
    if is_dataclass(value) and not isinstance(value, type):
        inner = ", ".join(f"{f.name}={canonical(getattr(value, f.name))}" for f in fields(value))
        return f"{type(value).__qualname__}({inner})"
    if isinstance(value, Mapping):
        pairs = sorted(f"{canonical(key)}: {canonical(item)}" for key, item in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, (set, frozenset)):
        return "{" + ", ".join(sorted(map(canonical, value))) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(canonical, value)) + "]"
    if isinstance(value, Tensor):
        return f"tensor of shape {list(value.shape)}, {hashlib.sha256(_bytes(value)).hexdigest()[:12]}"
    if isinstance(value, Enum) or not callable(value):
        return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
    return getattr(value, "__qualname__", type(value).__qualname__)


def _bytes(value: Tensor) -> bytes:
    host = value.detach().cpu()
    return (host.double() if host.is_floating_point() else host).contiguous().numpy().tobytes()


def _version() -> str:
    try:
        return version("mtl-dist")
    except PackageNotFoundError:  # run from a folder that is not installed
        return "not installed"
