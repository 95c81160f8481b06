"""A causal language model under HF Trainer, with a column that holds the domain of each text.

Texts have different lengths, and some tokens are not learned, so micro-batches have different token counts.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from mtl_dist import Balancer, Rule, SharedLayerProbe
from mtl_dist.integrations.transformers import balance_by_column
from mtl_dist.weighting import MGDA, KeepNorm, TokenShare
from tests.gallery.run import DEVICE, RANK, WORLD_SIZE, flat

PLAIN, RULE = TokenShare(), KeepNorm(MGDA(), like="tokens")
LINES = 3
DOMAINS = ("code", "prose", "tables")


def table(rows: int = 96) -> Dataset:
    """Token ids, labels of which some are -100, and the domain."""
    draw = random.Random(0)
    found = []
    for number in range(rows):
        ids = [draw.randrange(1, 40) for _ in range(draw.randrange(4, 12))]
        hidden = 2 if number % 3 == 0 else 0
        domain = DOMAINS[0] if number % 2 else draw.choice(DOMAINS)
        found.append({"input_ids": ids, "labels": [-100] * hidden + ids[hidden:], "domain": domain})
    return Dataset.from_list(found)


def padded(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A collator for `table`."""
    length = max(len(row["input_ids"]) for row in rows)

    def column(name: str, filler: int) -> Tensor:
        return torch.tensor([[*row[name], *[filler] * (length - len(row[name]))] for row in rows])

    ones = [{"mask": [1] * len(row["input_ids"])} for row in rows]
    mask = torch.tensor([[*one["mask"], *[0] * (length - len(one["mask"]))] for one in ones])
    return {"input_ids": column("input_ids", 0), "labels": column("labels", -100), "attention_mask": mask}


def config(**others: Any) -> LlamaConfig:
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaConfig(**{**sizes, **heads, **others})


def arguments(folder: Path, steps: int, **others: Any) -> TrainingArguments:
    """Of a run with accumulation, in which ranks share each batch of 4."""
    on_cpu = DEVICE == "cpu"
    place = {"use_cpu": on_cpu, **({"ddp_backend": "gloo"} if on_cpu and WORLD_SIZE > 1 else {})}
    settings = {"max_steps": steps, "save_steps": 2, "logging_steps": 1, "optim": "sgd", "report_to": "none"}
    settings |= {"learning_rate": 0.5, "lr_scheduler_type": "constant", "max_grad_norm": 1e6}
    settings |= {"per_device_train_batch_size": 4 // WORLD_SIZE, "gradient_accumulation_steps": 2}
    settings |= {"disable_tqdm": True, "dataloader_pin_memory": False, "data_seed": 5}
    return TrainingArguments(output_dir=str(folder), **{**settings, **place, **others})


def train(rule: Rule | None, folder: Path, steps: int, resume: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(config())
    trainer = Trainer(model, arguments(folder, steps), train_dataset=table(), data_collator=padded)
    if rule is not None:
        probe = SharedLayerProbe() if rule == RULE else None  # +
        balancer = Balancer(DOMAINS, rule, probe=probe)  # +
        balance_by_column(trainer, balancer, column="domain")  # +
    trainer.train(resume_from_checkpoint=resume or None)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert trainer.accelerator.num_processes == WORLD_SIZE
    assert trainer.accelerator.process_index == RANK
    return {"parameters": flat(model), "losses": losses}
