"""torchvision's Faster R-CNN: four losses in a dictionary, with gradients at the feature pyramid.

Ranks equal one process where each image has the same number of samples, as the client divides by that of its
own rank: no anchor is left out, and no proposal is suppressed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtl_dist import Balancer, Rule
from mtl_dist.weighting import Fixed, InverseGradNorm, KeepNorm
from tests.gallery.loop import generator, group_norms, train_loop
from tests.gallery.run import STEPS
from tests.gallery.without_ops import prepare_torchvision

prepare_torchvision()

from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn  # noqa: E402
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead  # noqa: E402

PLAIN, RULE = Fixed([1.0, 1.0, 1.0, 1.0]), KeepNorm(InverseGradNorm())
LINES = 2
LOSSES = ("loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg")
SIZE = 64


def detector() -> nn.Module:
    sampling = {"rpn_batch_size_per_image": 1024, "box_batch_size_per_image": 1024}
    sampling |= {"rpn_fg_iou_thresh": 0.5, "rpn_bg_iou_thresh": 0.5, "rpn_nms_thresh": 1.0}
    sampling |= {"rpn_pre_nms_top_n_train": 8, "rpn_post_nms_top_n_train": 8, "rpn_score_thresh": 0.0}
    net = fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, min_size=SIZE, max_size=SIZE, **sampling
    )
    group_norms(net)
    # as for another data set; narrow, to be fast
    net.roi_heads.box_head = TwoMLPHead(net.backbone.out_channels * 7 * 7, 32)
    net.roi_heads.box_predictor = FastRCNNPredictor(32, num_classes=4)
    return net


class Client(nn.Module):
    """The detector in a loop of one's own."""

    def __init__(self, rule: Rule | None) -> None:
        super().__init__()
        self.detector = detector()
        self.balancer = None
        if rule is not None:
            self.balancer = Balancer(LOSSES, rule)  # +

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        pairs = zip(batch["boxes"], batch["labels"], strict=True)
        targets = [{"boxes": boxes, "labels": labels} for boxes, labels in pairs]
        losses = self.detector(list(batch["images"]), targets)
        if self.balancer is None:
            return sum(losses.values())
        return self.balancer(losses, parameters=self.detector.backbone.fpn)  # +


def train(rule: Rule | None, folder: Path, steps: int, resume: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    draw = generator()
    images = torch.rand(STEPS, 4, 3, SIZE, SIZE, generator=draw).double()
    corners = torch.rand(STEPS, 4, 2, 2, generator=draw) * SIZE / 2
    sides = 8 + torch.rand(STEPS, 4, 2, 2, generator=draw) * SIZE / 3
    labels = torch.randint(1, 4, (STEPS, 4, 2), generator=draw)
    boxes = torch.cat([corners, corners + sides], -1).double()
    batches = [{"images": images[k], "boxes": boxes[k], "labels": labels[k]} for k in range(steps)]
    return train_loop(Client(rule).double(), batches, folder, resume, lr=0.01)
