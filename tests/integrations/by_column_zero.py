"""`balance_by_column` under DeepSpeed on a CPU; started by test_by_column.py with OUT and the ZeRO stage.

One process trains without DeepSpeed, for comparison.

Three lines let HF Trainer run DeepSpeed without an accelerator: the variable, the state with its backend, and
`use_configured_state`. Rank 0 writes the losses of each way.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from transformers import LlamaForCausalLM, Trainer

from mtl_dist import Balancer, SharedLayerProbe
from mtl_dist.integrations.transformers import balance_by_column
from mtl_dist.weighting import MGDA, KeepNorm, TokenShare
from tests.gallery.causal_lm import DOMAINS, arguments, config, padded, table
from tests.gallery.run import WORLD_SIZE

DEEPSPEED: dict[str, Any] = {"zero_allow_untested_optimizer": True}
DEEPSPEED |= dict.fromkeys(
    (
        "gradient_clipping",
        "gradient_accumulation_steps",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
    ),
    "auto",
)


def train(out: str, stage: int, balancer: Balancer | None) -> dict[str, Any]:
    torch.manual_seed(0)
    engine: dict[str, Any] = {"use_cpu": True}
    if stage:
        engine = {"deepspeed": {**DEEPSPEED, "zero_optimization": {"stage": stage}}, "use_cpu": False}
        engine |= {"accelerator_config": {"use_configured_state": True}, "ddp_backend": None}
    args = arguments(Path(f"{out}.runs"), 6, save_strategy="no", **engine)
    trainer = Trainer(LlamaForCausalLM(config()), args, train_dataset=table(), data_collator=padded)
    if balancer is not None:
        balance_by_column(trainer, balancer, column="domain")
    trainer.train()
    assert not stage or trainer.model_wrapped.zero_optimization_stage() == stage
    AcceleratorState._reset_state()  # or DeepSpeed takes no second configuration
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def main() -> None:
    out, stage = sys.argv[1], int(sys.argv[2]) if WORLD_SIZE > 1 else 0
    torch.set_num_threads(1)
    rule = KeepNorm(MGDA(), like="tokens")
    ways = {
        "plain": None,
        "own": Balancer(DOMAINS, TokenShare()),
        "head": Balancer(DOMAINS, rule, probe=SharedLayerProbe()),
        "logits": Balancer(DOMAINS, rule),
    }
    losses = {name: train(out, stage, balancer) for name, balancer in ways.items()}
    state = PartialState()
    if state.is_main_process:
        Path(out).write_text(json.dumps(losses))
    gc.collect()
    if stage:
        state.destroy_process_group()


if __name__ == "__main__":
    if WORLD_SIZE > 1:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend="gloo")
    main()
