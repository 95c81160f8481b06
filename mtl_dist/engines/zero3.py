"""ZeRO-3's insides: parameters that DeepSpeed partitions over ranks, and frees after each use."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from mtl_dist.engines.graph import accumulators
from mtl_dist.engines.replay import replayed
from mtl_dist.losses import Features, Heads

ZERO_3 = (
    "DeepSpeed ZeRO-3 partitions the parameters, and frees them before a gradient can be taken of losses "
    "whose forward has ended"
)


def find_partitioned(shared: Features, heads: Heads) -> bool:
    """Whether trunk or heads have partitioned parameters. Changes nothing in either.

    It looks at the leaves of the features' graph, because an engine partitions the parameters of a model or
    none of them. If the graph has no leaf (a frozen trunk), it looks at the parameters of the first module
    that the heads call, before that module runs.
    """
    if "deepspeed" not in sys.modules:
        return False
    found = [is_partitioned(leaf) for leaf in _leaves(shared)]
    return any(found) if found else _in_heads(shared, heads)


def in_graph(shared: Features) -> bool:
    """Whether a partitioned parameter made the features."""
    return any(is_partitioned(leaf) for leaf in _leaves(shared))


def _leaves(shared: Features) -> Iterator[Any]:
    """The leaves of the graph that made the features, parameters as a rule."""
    made = (tensor for tensor in shared.originals if tensor.grad_fn is not None or tensor.requires_grad)
    return (
        getattr(node, "variable", None) for tensor in made for node in accumulators(tensor.view_as(tensor))
    )


class _Seen(BaseException):  # not an Exception, because heads may catch those
    """Ends the evaluation of the heads at their first module."""


def _in_heads(shared: Features, heads: Heads) -> bool:
    found = False

    def look(module: nn.Module, _: Any) -> None:
        nonlocal found
        parameters = list(module.parameters(recurse=False))
        if parameters:
            found = any(is_partitioned(parameter) for parameter in parameters)
            raise _Seen

    # with gradients, because heads may take derivatives before they call their first module
    handle = register_module_forward_pre_hook(look)
    try:
        with torch.enable_grad(), replayed(leaf.device for leaf in shared.leaves):
            heads.at(shared.rebuild())
    except _Seen:
        pass
    finally:
        handle.remove()
    return found


def is_partitioned(parameter: Any) -> bool:
    """Whether DeepSpeed partitions this parameter."""
    return hasattr(parameter, "ds_status")


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of a parameter, also where this rank holds only a part of it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
