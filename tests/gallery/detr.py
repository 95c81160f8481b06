"""DETR under HF Trainer: a dictionary of losses with fixed weights, one entry of which is a metric."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig, Trainer

from mtl_dist import Balancer, Rule
from mtl_dist.integrations.transformers import balance_loss_dict
from mtl_dist.weighting import Fixed, InverseGradNorm, KeepNorm
from tests.gallery.causal_lm import arguments
from tests.gallery.run import SAVED, flat

WEIGHTS = {"loss_ce": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0}
PLAIN, RULE = Fixed([1.0, 1.0, 1.0]), KeepNorm(InverseGradNorm())
LINES = 2


def config() -> DetrConfig:
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_queries": 5}
    return DetrConfig(
        backbone_config=backbone, use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
        num_labels=3, dropout=0.0, auxiliary_loss=False, **sizes,
    )  # fmt: skip


def images() -> Dataset:
    draw = torch.Generator().manual_seed(1)
    rows = []
    for number in range(96):
        boxes = torch.rand(1 + number % 3, 4, generator=draw) * 0.4 + 0.2
        labels = torch.randint(3, (len(boxes),), generator=draw)
        pixels = torch.randn(3, 32, 32, generator=draw)
        rows.append({"pixels": pixels.tolist(), "boxes": boxes.tolist(), "classes": labels.tolist()})
    return Dataset.from_list(rows)


def collated(rows: list[dict[str, Any]]) -> dict[str, Any]:
    labels = [
        {"class_labels": torch.tensor(row["classes"]), "boxes": torch.tensor(row["boxes"])} for row in rows
    ]
    pixels: Tensor = torch.tensor([row["pixels"] for row in rows])
    return {"pixel_values": pixels, "labels": labels}


def train(rule: Rule | None, folder: Path, steps: int, resume: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    model = DetrForObjectDetection(config())
    if resume:  # Trainer of transformers 5.23 loads only those parameters that have no other name in files
        saved = DetrForObjectDetection.from_pretrained(folder / f"checkpoint-{SAVED}")
        model.load_state_dict(saved.state_dict())
    args = arguments(
        folder, steps, remove_unused_columns=False, learning_rate=0.002, gradient_accumulation_steps=1
    )
    trainer = Trainer(model, args, train_dataset=images(), data_collator=collated)
    if rule is not None:
        balancer = Balancer(list(WEIGHTS), rule, base=WEIGHTS, ignore=["cardinality_error"])  # +
        balance_loss_dict(trainer, balancer, parameters=model.model.decoder.layers[-1])  # +
    trainer.train(resume_from_checkpoint=resume or None)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {"parameters": flat(model), "losses": losses}
