"""Trains a small two-task BERT with the stock Trainer; started by test_transformers.py.

    trainer_run.py OUT ENGINE PARTS TABLE

ENGINE is `ddp` or `zero2`; PARTS is the number of ranks that share a batch of 4; TABLE is a JSON Lines file.
Each rank writes `OUT.RANK`: what it ran on, and by run its weights at every micro-batch, log and parameters.
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
from datasets import load_dataset
from torch import Tensor, nn
from transformers import BertConfig, BertModel, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from mtl_dist import Balancer
from mtl_dist.integrations.transformers import attach
from mtl_dist.weighting import MGDA, Smooth

CONFIG = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIG |= {"intermediate_size": 24, "max_position_embeddings": 8}
CONFIG |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
STEPS, SAVED = 6, 2
DEEPSPEED = {
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": "auto",  # where it is missing, Accelerate clips at 1
    "gradient_accumulation_steps": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
}


class Net(PreTrainedModel):
    """Reads a sentence: its topic, and each word's kind.

    `**kwargs` and a column called `labels` make Trainer believe that the loss is divided by their number.
    """

    config_class = BertConfig

    def __init__(self, config: BertConfig, window: int | None) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.topic, self.kind = nn.Linear(config.hidden_size, 3), nn.Linear(config.hidden_size, 5)
        self.balancer = Balancer(("topic", "kind"), Smooth(MGDA(), 0.5), window=window)
        self.post_init()

    def forward(self, input_ids: Tensor, topic: Tensor, labels: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        assert "num_items_in_batch" not in kwargs
        z = self.bert(input_ids).last_hidden_state
        heads = {
            "topic": lambda z: 3 * nn.functional.cross_entropy(self.topic(z[:, 0]), topic),
            "kind": lambda z: nn.functional.cross_entropy(self.kind(z).flatten(0, 1), labels.flatten()),
        }
        return {"loss": self.balancer(z, heads)}


class Diary(TrainerCallback):
    """Weights at every micro-batch."""

    def __init__(self, balancer: Balancer) -> None:
        self.balancer, self.rows = balancer, []

    def on_substep_end(self, *args: object, **kwargs: object) -> None:
        self.rows.append(self.balancer.report and self.balancer.report.weight_vector.tolist())

    on_step_end = on_substep_end


def arguments(out: str, engine: str, **others: object) -> TrainingArguments:
    place = {"use_cpu": True, **({"ddp_backend": "gloo"} if "RANK" in os.environ else {})}
    if engine == "zero2":
        # Trainer gives DeepSpeed no backend: the state is made before, and used as it is
        place = {"deepspeed": DEEPSPEED, "accelerator_config": {"use_configured_state": True}}
    settings = {"max_steps": STEPS, "save_steps": SAVED, "logging_steps": 1, "optim": "sgd"}
    settings |= {"per_device_eval_batch_size": 8 // int(os.environ.get("WORLD_SIZE", 1))}
    settings |= {"learning_rate": 0.05, "lr_scheduler_type": "constant", "max_grad_norm": 1e6}
    settings |= {"report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False, "data_seed": 5}
    return TrainingArguments(output_dir=out, **{**settings, **place, **others})


def flat(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()]).double()


def train(
    args: TrainingArguments, table: Any, *, window: int | None = None, resume: str | None = None
) -> dict:
    torch.manual_seed(0)
    net = Net(BertConfig(**CONFIG), window)
    before = flat(net)
    diary = Diary(net.balancer)
    trainer = Trainer(net, args, train_dataset=table, callbacks=[diary])
    attach(net.balancer, trainer)
    trainer.train(resume_from_checkpoint=resume)
    return {
        "world_size": trainer.accelerator.num_processes,
        "type": trainer.accelerator.distributed_type.value,
        "model": type(trainer.model_wrapped).__name__,
        "zero": trainer.model_wrapped.zero_optimization_stage() if args.deepspeed else None,
        "step": net.balancer.step,
        "weights": diary.rows,
        "log": [row for row in trainer.state.log_history if "loss" in row],
        "moved": (flat(net) - before).tolist(),
        "evaluation": {key: value for key, value in trainer.evaluate(table).items() if "loss" in key},
    }


def main() -> None:
    out, engine, parts, file = sys.argv[1:]
    torch.set_num_threads(1)
    table = load_dataset("json", data_files=file, split="train", cache_dir=f"{out}.cache").with_format(
        "torch"
    )
    small = {"per_device_train_batch_size": 4 // int(parts), "gradient_accumulation_steps": 2}
    large = {"per_device_train_batch_size": 8 // int(parts), "gradient_accumulation_steps": 1}

    def args(name: str, **others: object) -> TrainingArguments:
        return arguments(f"{out}.{name}", engine, **others)

    runs = {"whole": train(args("whole", **small), table)}
    saved = f"{out}.whole/checkpoint-{2 * SAVED}"
    AcceleratorState._reset_state()  # or DeepSpeed takes no second configuration
    runs["resumed"] = train(args("resumed", **small), table, resume=saved)
    if engine == "ddp":
        runs["averaged"] = train(args("averaged", **small, logging_steps=3, save_strategy="no"), table)
        runs["held"] = train(args("held", **small, save_strategy="no"), table, window=2)
        runs["large"] = train(args("large", **large, save_strategy="no"), table, window=1)
    state = PartialState()
    Path(f"{out}.{state.process_index}").write_text(json.dumps(runs))
    gc.collect()  # a DDP model that outlives its Gloo group can hang at exit (torch 2.13)
    state.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[2] == "zero2":
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend="gloo")
    main()
