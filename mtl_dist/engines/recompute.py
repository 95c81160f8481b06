"""Activation checkpointing's insides: whether the running code will be run a second time in the backward."""

from __future__ import annotations

import torch

CHECKPOINT = "torch.utils.checkpoint"


def will_run_again() -> bool:
    """Whether this code runs inside `checkpoint(..., use_reentrant=False)`, the first or the second time.

    Such a checkpoint replaces the tensors that autograd saves, by hooks. torch has no public way to see them;
    where the private one is missing, the second run is noticed because it happens inside a backward.
    """
    look = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if look is None:
        return torch._C._current_graph_task_id() != -1
    hooks = look(True)
    return bool(hooks) and getattr(hooks[0], "__module__", "") == CHECKPOINT
