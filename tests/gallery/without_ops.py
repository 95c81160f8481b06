"""torchvision beside a torch that its compiled operators were not built for: imported without them.

And without the compiler, which torchvision calls for RoI align in their place, also on a GPU that is asked
for the same bits each time: the first call takes a minute.

The wheel of the registry needs torch with CUDA of its version. Without its library, torchvision does not even
import (`operator torchvision::nms does not exist`), nor does what imports it. Its models need one operator
that has no form in Python, `nms`.
"""

from __future__ import annotations

import importlib
import inspect

import torch
from torch import Tensor


def prepare_torchvision() -> None:
    """Makes torchvision importable, before its first import; does nothing where it is whole."""
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    else:
        if torch.are_deterministic_algorithms_enabled():
            align_eagerly()
        return
    for name in ("nms", "qnms"):  # those that torchvision registers more about
        schema = "(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor"
        torch.library.define(f"torchvision::{name}", schema)
    torch.library.impl("torchvision::nms", ("cpu", "cuda"), nms)
    import torchvision.ops

    torchvision.ops.boxes._assert_has_ops = lambda: None  # it asks for all operators
    align_eagerly()


def align_eagerly() -> None:
    """RoI align by torch's operators, not compiled."""
    align = importlib.import_module("torchvision.ops.roi_align")  # a function of the same name hides it
    align._roi_align = inspect.unwrap(align._roi_align)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the boxes `[k, 4]` that are kept, best score first, as `torchvision.ops.nms`."""
    from torchvision.ops import box_iou

    order = scores.argsort(descending=True, stable=True)
    overlaps = box_iou(boxes[order], boxes[order]) > iou_threshold
    kept: list[int] = []
    for place in range(len(order)):
        if not overlaps[place, kept].any():
            kept.append(place)
    return order[kept]
