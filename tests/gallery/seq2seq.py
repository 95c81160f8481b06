"""T5 under HF Trainer: an encoder and a decoder, and a column with the domain of each pair of texts."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration, Trainer

from mtl_dist import Balancer, Rule
from mtl_dist.integrations.transformers import balance_by_column
from mtl_dist.weighting import InverseGradNorm, KeepNorm, TokenShare
from tests.gallery.causal_lm import DOMAINS, arguments
from tests.gallery.run import flat

PLAIN, RULE = TokenShare(), KeepNorm(InverseGradNorm(), like="tokens")
LINES = 2
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
T5 |= {"decoder_start_token_id": 0, "dropout_rate": 0.0}


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(T5Config(**T5))


def pairs(rows: int = 96) -> Dataset:
    """Texts, their ends backwards, and the domain. Both have different lengths."""
    draw = random.Random(0)
    found = []
    for number in range(rows):
        ids = [draw.randrange(3, 40) for _ in range(draw.randrange(3, 9))]
        labels = [*ids[::-1][: draw.randrange(2, 9)], 1]
        found.append({"input_ids": ids, "labels": labels, "domain": DOMAINS[number % 3]})
    return Dataset.from_list(found)


def collated(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    def column(name: str, filler: int) -> Tensor:
        length = max(len(row[name]) for row in rows)
        return torch.tensor([[*row[name], *[filler] * (length - len(row[name]))] for row in rows])

    ids = column("input_ids", 0)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": column("labels", -100)}


def train(rule: Rule | None, folder: Path, steps: int, resume: bool) -> dict[str, Any]:
    model = t5()
    # one micro-batch per step: T5 itself takes the mean of each
    args = arguments(folder, steps, gradient_accumulation_steps=1)
    trainer = Trainer(model, args, train_dataset=pairs(), data_collator=collated)
    if rule is not None:
        balancer = Balancer(DOMAINS, rule)  # +
        balance_by_column(trainer, balancer, column="domain")  # +
    trainer.train(resume_from_checkpoint=resume or None)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {"parameters": flat(model), "losses": losses}
