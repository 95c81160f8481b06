"""RT-DETR under HF Trainer: it divides its losses by the boxes of its own rank. Some images have none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig, Trainer

from mtl_dist import Balancer, Rule
from mtl_dist.integrations.transformers import balance_loss_dict
from mtl_dist.weighting import Fixed, InverseGradNorm, KeepNorm
from tests.gallery.causal_lm import arguments
from tests.gallery.run import SAVED, flat

LOSSES = ["loss_vfl", "loss_bbox", "loss_giou"]
PLAIN, RULE = Fixed([1.0, 1.0, 1.0]), KeepNorm(InverseGradNorm())
LINES = 2


def config() -> RTDetrConfig:
    backbone = RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    return RTDetrConfig(
        backbone_config=backbone, encoder_hidden_dim=16, encoder_in_channels=[8] * 3, encoder_ffn_dim=16,
        encoder_attention_heads=2, d_model=16, num_queries=6, decoder_in_channels=[16] * 3,
        decoder_ffn_dim=16, decoder_layers=1, decoder_attention_heads=2, num_denoising=0, num_labels=3,
        dropout=0.0, auxiliary_loss=False,
    )  # fmt: skip


class Normalised(nn.BatchNorm2d):
    """With the running statistics, because those of a batch are of one rank."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


def images() -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    rows = []
    for number in range(96):
        boxes = torch.rand((0, 1, 3)[number % 3], 4, generator=draw) * 0.4 + 0.2
        classes = torch.randint(3, (len(boxes),), generator=draw)
        rows.append({"pixels": torch.randn(3, 64, 64, generator=draw), "boxes": boxes, "classes": classes})
    return rows


def collated(rows: list[dict[str, Tensor]]) -> dict[str, Any]:
    labels = [{"class_labels": row["classes"], "boxes": row["boxes"]} for row in rows]
    return {"pixel_values": torch.stack([row["pixels"] for row in rows]), "labels": labels}


def train(rule: Rule | None, folder: Path, steps: int, resume: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    model = RTDetrForObjectDetection(config())
    if resume:  # as in detr.py
        saved = RTDetrForObjectDetection.from_pretrained(folder / f"checkpoint-{SAVED}")
        model.load_state_dict(saved.state_dict())
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = Normalised
    args = arguments(
        folder, steps, remove_unused_columns=False, learning_rate=0.002, gradient_accumulation_steps=1
    )
    trainer = Trainer(model, args, train_dataset=images(), data_collator=collated)
    if rule is not None:
        balancer = Balancer(LOSSES, rule)  # +
        balance_loss_dict(trainer, balancer, parameters=model.model.decoder.layers[-1])  # +
    trainer.train(resume_from_checkpoint=resume or None)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {"parameters": flat(model), "losses": losses}
