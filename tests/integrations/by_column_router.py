"""One step of a mixture of experts on two ranks; started by test_by_column.py with OUT.

Each rank writes its batch and the parameters after the step, with a balancer and without.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import MixtralConfig, MixtralForCausalLM, Trainer

from mtl_dist import Balancer
from mtl_dist.integrations.transformers import balance_by_column
from mtl_dist.weighting import TokenShare
from tests.gallery.causal_lm import DOMAINS, arguments, padded, table
from tests.gallery.run import RANK, flat

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
SIZES |= {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
COEFFICIENT = 0.3


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, router_aux_loss_coef=COEFFICIENT))


def main() -> None:
    torch.set_num_threads(1)
    batches: list[dict[str, Any]] = []

    def recorded(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = padded(rows)
        batches.append(dict(batch))
        return batch

    found = {}
    for way in ("own", "plain"):
        model = mixtral()
        args = arguments(Path(f"{sys.argv[1]}.runs"), 1, save_strategy="no", gradient_accumulation_steps=1)
        trainer = Trainer(model, args, train_dataset=table(), data_collator=recorded)
        if way == "own":
            balance_by_column(trainer, Balancer(DOMAINS, TokenShare()))
        trainer.train()
        found[way] = flat(model)
    torch.save({"batch": batches[0], **found}, f"{sys.argv[1]}.{RANK}")
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
