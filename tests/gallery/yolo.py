"""Ultralytics' YOLO: its own loss of boxes, classes and distances, with its own gains.

Its loss is the sum of three means, times the number of images, and its trainer multiplies it by the number
of ranks. Each rank divides by the scores of its own boxes. They are the counts here: ranks equal one process,
where every rank has boxes enough, as it divides by no less than 1.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtl_dist import Balancer, Rule
from mtl_dist.weighting import Fixed, InverseGradNorm, KeepNorm
from tests.gallery.loop import generator, group_norms, train_loop
from tests.gallery.run import DEVICE, RANK, STEPS, WORLD_SIZE
from tests.gallery.without_ops import prepare_torchvision

PLAIN, RULE = Fixed([1.0, 1.0, 1.0]), KeepNorm(InverseGradNorm())
LINES = 3
LOSSES = ("box_loss", "cls_loss", "dfl_loss")


def detector(folder: Path) -> nn.Module:
    """The smallest YOLO11, without a download."""
    os.environ |= {"YOLO_OFFLINE": "true", "YOLO_CONFIG_DIR": f"{folder}.settings-{RANK}"}
    prepare_torchvision()
    from ultralytics.cfg import get_cfg  # it writes its settings when it is imported
    from ultralytics.nn.tasks import DetectionModel

    net = DetectionModel("yolo11n.yaml", ch=3, nc=4, verbose=False)
    group_norms(net)
    net.to(DEVICE)  # the criterion reads where it is
    net.args = get_cfg()  # box 7.5, cls 0.5, dfl 1.5
    net.criterion = net.init_criterion()
    return net


class Client(nn.Module):
    """YOLO in a loop of one's own."""

    def __init__(self, rule: Rule | None, folder: Path) -> None:
        super().__init__()
        self.yolo = detector(folder)
        self.balancer = None
        if rule is not None:
            self.balancer = Balancer(LOSSES, rule)  # +
            assigner = self.yolo.criterion.assigner
            assigner.register_forward_hook(lambda one, _, found: setattr(one, "scores", found[2].sum()))  # +

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        images, objects = batch["boxes"].shape[:2]
        flat = {"cls": batch["cls"].flatten(), "bboxes": batch["boxes"].flatten(0, 1), "img": batch["img"]}
        flat["batch_idx"] = torch.arange(images, device=DEVICE).repeat_interleave(objects)
        losses, items = self.yolo.loss(flat)
        if self.balancer is None:
            return losses.sum()
        named, scores = dict(zip(items, losses, strict=True)), self.yolo.criterion.assigner.scores
        return self.balancer(named, parameters=self.yolo.model[16], counts=dict.fromkeys(named, scores))  # +


def train(rule: Rule | None, folder: Path, steps: int, resume: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    draw = generator()
    boxes = torch.rand(STEPS, 4, 2, 4, generator=draw) * 0.4 + 0.3
    images = torch.rand(STEPS, 4, 3, 96, 96, generator=draw)
    classes = torch.randint(4, (STEPS, 4, 2), generator=draw).float()
    batches = [{"img": images[k], "boxes": boxes[k], "cls": classes[k]} for k in range(steps)]

    def step(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch) * WORLD_SIZE  # as Ultralytics' trainer

    return train_loop(Client(rule, folder), batches, folder, resume, lr=5e-4, step=step)
