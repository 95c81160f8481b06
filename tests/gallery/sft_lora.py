"""TRL's SFTTrainer with LoRA, on texts of several domains that are packed into rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from mtl_dist import Balancer, Rule, SharedLayerProbe
from mtl_dist.integrations.transformers import balance_by_column
from mtl_dist.weighting import MGDA, KeepNorm, TokenShare
from tests.gallery.causal_lm import DOMAINS, arguments, config, table
from tests.gallery.run import flat

PLAIN, RULE = TokenShare(), KeepNorm(MGDA(), like="tokens")
LINES = 3
PACKING: dict[str, Any] = {"packing": True, "max_length": 16}


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<eos>": 1, **{f"w{k}": k for k in range(2, 40)}}
    model = Tokenizer(models.WordLevel(words, unk_token="w2"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="<eos>")


def trl_settings(folder: Path, steps: int) -> dict[str, Any]:
    """Those of `arguments` that are not defaults, for the configurations of TRL."""
    args = arguments(folder, steps)
    names = ("max_steps", "save_steps", "logging_steps", "optim", "report_to", "learning_rate", "use_cpu")
    names += ("lr_scheduler_type", "max_grad_norm", "per_device_train_batch_size", "disable_tqdm")
    names += ("data_seed", "gradient_accumulation_steps", "dataloader_pin_memory", "ddp_backend")
    return {name: getattr(args, name) for name in names}


def settings(folder: Path, steps: int, **others: Any) -> SFTConfig:
    return SFTConfig(str(folder), bf16=False, **{**trl_settings(folder, steps), **PACKING, **others})


def train(rule: Rule | None, folder: Path, steps: int, resume: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    texts = table(240)  # more rows than 10 steps take, also after packing
    lora = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    trainer = SFTTrainer(
        LlamaForCausalLM(config()),
        settings(folder, steps),
        train_dataset=texts,
        processing_class=tokenizer(),
        peft_config=lora,
    )
    if rule is not None:
        packed = texts if PACKING.get("packing") else None
        probe = SharedLayerProbe() if rule == RULE else None  # +
        balancer = Balancer(DOMAINS, rule, probe=probe)  # +
        balance_by_column(trainer, balancer, column="domain", dataset=packed)  # +
    trainer.train(resume_from_checkpoint=resume or None)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    entropies = [row["entropy"] for row in trainer.state.log_history if "entropy" in row]
    assert len(entropies) >= len(losses), "the metrics of SFTTrainer are gone"
    return {"parameters": flat(trainer.model), "losses": losses}
