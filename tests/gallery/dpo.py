"""TRL's DPOTrainer with LoRA: pairs of answers, with a column that holds the domain of each pair."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaForCausalLM
from trl import DPOConfig, DPOTrainer

from mtl_dist import Balancer, Rule
from mtl_dist.integrations.transformers import balance_by_column
from mtl_dist.weighting import InverseGradNorm, KeepNorm, TokenShare
from tests.gallery.causal_lm import DOMAINS, config
from tests.gallery.run import flat
from tests.gallery.sft_lora import tokenizer, trl_settings

PLAIN, RULE = TokenShare(), KeepNorm(InverseGradNorm(), like="tokens")
LINES = 2


def pairs(rows: int = 96) -> Dataset:
    """A prompt, two answers of different lengths, and the domain."""
    draw = random.Random(0)

    def words(most: int) -> str:
        return "".join(f" w{draw.randrange(2, 40)}" for _ in range(draw.randrange(2, most)))

    return Dataset.from_list(
        [
            {"prompt": words(5), "chosen": words(8), "rejected": words(8), "domain": draw.choice(DOMAINS)}
            for _ in range(rows)
        ]
    )


def train(rule: Rule | None, folder: Path, steps: int, resume: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    lora = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    settings = {**trl_settings(folder, steps), "learning_rate": 0.1}
    trainer = DPOTrainer(
        LlamaForCausalLM(config()),
        args=DPOConfig(str(folder), bf16=False, beta=0.5, **settings),
        train_dataset=pairs(),
        processing_class=tokenizer(),
        peft_config=lora,
    )
    if rule is not None:
        balancer = Balancer(DOMAINS, rule)  # +
        balance_by_column(trainer, balancer, column="domain")  # +
    trainer.train(resume_from_checkpoint=resume or None)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    rewards = [row["rewards/margins"] for row in trainer.state.log_history if "rewards/margins" in row]
    assert len(rewards) >= len(losses), "the metrics of DPOTrainer are gone"
    return {"parameters": flat(trainer.model), "losses": losses}
