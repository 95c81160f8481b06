"""The insides of torch's pipeline stages: whether the running forward is a rehearsal."""

from __future__ import annotations

import sys
from types import FrameType

STAGE = "torch.distributed.pipelining.stage"
# since torch 2.12; before, a rehearsal ran without gradients
REHEARSALS = frozenset({"_forward_metadata_inference", "_backward_metadata_inference"})


def is_rehearsal() -> bool:
    """Whether a pipeline stage runs its module and its loss to learn their shapes, before the first step.

    The tensors that it passes are empty memory, with gradients, so nothing may be learnt from them. torch
    has no public sign of it: it is found in the functions that are running.
    """
    if STAGE not in sys.modules:
        return False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in REHEARSALS and frame.f_globals.get("__name__") == STAGE:
            return True
        frame = frame.f_back
    return False
