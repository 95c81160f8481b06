"""Sentence Transformers with two data sets and two losses: each batch comes from one of them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.losses import ContrastiveLoss, CosineSimilarityLoss
from sentence_transformers.models import Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from mtl_dist import Balancer, Rule
from mtl_dist.integrations.sentence_transformers import attach
from mtl_dist.weighting import InverseGradNorm, LastSeen, Relative, TokenShare
from tests.gallery.causal_lm import arguments
from tests.gallery.run import DEVICE, RANK, flat

PLAIN, RULE = TokenShare(), Relative(LastSeen(InverseGradNorm()), to="sts")
LINES = 2
BERT = {"vocab_size": 42, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
BERT |= {"intermediate_size": 24, "max_position_embeddings": 16}
BERT |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def encoder(folder: Path) -> SentenceTransformer:
    """A small BERT with a tokenizer of 40 words; written to a folder, as the library reads it."""
    words = {"[PAD]": 0, "[UNK]": 1, **{f"w{k}": k + 2 for k in range(40)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    BertModel(BertConfig(**BERT)).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    ).save_pretrained(folder)
    transformer = Transformer(str(folder))
    return SentenceTransformer(modules=[transformer, Pooling(16)], device=DEVICE)


def pairs(seed: int, rows: int, binary: bool) -> Dataset:
    draw = random.Random(seed)

    def sentence() -> str:
        return " ".join(f"w{draw.randrange(40)}" for _ in range(draw.randrange(3, 8)))

    return Dataset.from_list(
        [
            {"a": sentence(), "b": sentence(), "label": draw.randrange(2) if binary else draw.random()}
            for _ in range(rows)
        ]
    )


def train(rule: Rule | None, folder: Path, steps: int, resume: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    model = encoder(folder.with_suffix(f".model-{RANK}"))  # ranks must not write into one folder
    plain = arguments(folder, steps)
    names = ("max_steps", "save_steps", "logging_steps", "optim", "report_to", "use_cpu", "disable_tqdm")
    names += ("lr_scheduler_type", "max_grad_norm", "per_device_train_batch_size", "data_seed", "ddp_backend")
    names += ("dataloader_pin_memory",)
    same = {name: getattr(plain, name) for name in names}
    args = SentenceTransformerTrainingArguments(
        str(folder), learning_rate=0.05, multi_dataset_batch_sampler="round_robin", **same
    )
    trainer = SentenceTransformerTrainer(
        model,
        args,
        train_dataset=DatasetDict({"sts": pairs(1, 80, False), "duplicates": pairs(2, 80, True)}),
        loss={"sts": CosineSimilarityLoss(model), "duplicates": ContrastiveLoss(model)},
    )
    if rule is not None:
        balancer = Balancer(["sts", "duplicates"], rule)  # +
        attach(balancer, trainer, parameters=model[0].parameters())  # +
    trainer.train(resume_from_checkpoint=resume or None)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {"parameters": flat(model), "losses": losses}
