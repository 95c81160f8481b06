"""Finding out that parameters are partitioned: freed after each use, as DeepSpeed's ZeRO-3 does."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from mtl_dist._graph import accumulators
from mtl_dist.probes._features import Features
from mtl_dist.probes._losses import Heads, Mixture, evaluate
from mtl_dist.probes._replay import replayed

ZERO_3 = (
    "the parameters are partitioned (DeepSpeed ZeRO-3), and gone when a gradient is taken of losses whose "
    "forward has ended"
)


def find_partitioned(shared: Features, heads: Heads, tasks: Sequence[str]) -> bool:
    """Whether trunk or heads have partitioned parameters. Leaves no trace in either.

    Looks at the parameters in the features' graph, and at those of the first module that the heads call,
    before it runs.
    """
    if "deepspeed" not in sys.modules:
        return False
    return in_graph(shared) or _in_heads(shared, heads, tasks)


def in_graph(shared: Features) -> bool:
    """Whether a partitioned parameter made the features."""
    return any(
        _is_partitioned(getattr(node, "variable", None))
        for leaf in shared.leaves
        for node in accumulators(leaf)
    )


class _Seen(BaseException):  # not an Exception: heads may catch those
    """Ends the heads' evaluation at their first module."""


def _in_heads(shared: Features, heads: Heads, tasks: Sequence[str]) -> bool:
    found = False

    def look(module: nn.Module, _: Any) -> None:
        nonlocal found
        parameters = list(module.parameters(recurse=False))
        if parameters:
            found = any(_is_partitioned(parameter) for parameter in parameters)
            raise _Seen

    handle = register_module_forward_pre_hook(look)
    try:
        with torch.no_grad(), replayed(leaf.device for leaf in shared.leaves):
            features = shared.rebuild(shared.leaves)
            heads(features) if isinstance(heads, Mixture) else evaluate(heads, features, tasks)
    except _Seen:
        pass
    finally:
        handle.remove()
    return found


def _is_partitioned(parameter: Any) -> bool:
    return hasattr(parameter, "ds_status")  # DeepSpeed sets it on what it partitions
