"""Ladder side-tuning on a transformer beside full tuning, LoRA and linear probing: time, memory, quality.

    pip install peft && nice python -m benchmarks.side_tuning         # 3 seeds, one core: 10 minutes

The recipe `side_tuning_text`: a small Llama is pretrained on English prose, then trained on code, docstrings,
numbers and prose, with `inverse_grad_norm` at the output head. For one seed, all four start with the same
pretrained transformer, data and order.

* quality: bits per byte on held-out documents. Lower is better.
* time: median processor time of a step on one core.
* memory: what a step keeps for its backward (every storage once, without parameters), and gradients and the
  state of AdamW (12 bytes a trained parameter). Both are counted, not sampled, so they are exact.

Writes `side_tuning.{md,json}`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.tables import RESULTS
from benchmarks.trials import Plan, Store, cell, trained
from mtl_dist import Balancer, SharedLayerProbe
from mtl_dist.recipes import Batch, BatchData, SideTuningText
from mtl_dist.weighting import InverseGradNorm

PLAN = Plan(steps=100, batch=32, learning_rate=3e-3)
CHOICES = ("full", "lora", "side", "linear")
TASKS = SideTuningText().tasks
PRETRAIN = 80  # steps on prose
_BYTES_PER_TRAINED = 12  # a gradient and two moments, float32


def recipe_of(tune: str) -> SideTuningText:
    return SideTuningText(tune=tune, pretrain_steps=PRETRAIN)  # type: ignore[arg-type]


@cache
def data(seed: int) -> tuple[BatchData, BatchData]:
    return recipe_of("side").data(seed)


def kept_for_backward(model: nn.Module, batch: Batch) -> int:
    """Bytes that the forward of a training step stores for its backward, without the parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    stored: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            stored[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch)
    size = sum(stored.values())
    del loss
    return size


def run(tune: str, seed: int) -> dict[str, float]:
    balancer = Balancer(TASKS, InverseGradNorm(), probe=SharedLayerProbe())
    model, row = trained(recipe_of(tune), balancer, data(seed), PLAN, seed)
    kept = kept_for_backward(model, data(seed)[0].__getitems__(range(PLAN.batch)))
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    found = {task: row[f"eval/{task}/bits_per_byte"] for task in TASKS}
    return {**found, "cpu_ms": row["cpu_ms"], "kept": kept, "trained": parameters}


def table(store: Store, seeds: Sequence[int]) -> str:
    lines = [
        f"| trained | {' | '.join(TASKS)} | mean | parameters | ms per step | kept, MiB | state, MiB |",
        "|---|" + "---:|" * (len(TASKS) + 5),
    ]
    for tune in CHOICES:
        runs = [store.results.get(f"{tune} {seed}") for seed in seeds]
        if None in runs:
            continue
        cells = " | ".join(f"{statistics.fmean(run[task] for run in runs):.3f}" for task in TASKS)
        mean = cell([statistics.fmean(run[task] for task in TASKS) for run in runs], 3)
        time = statistics.median(run["cpu_ms"] for run in runs)
        kept, number = statistics.fmean(run["kept"] for run in runs) / 2**20, runs[0]["trained"]
        state = number * _BYTES_PER_TRAINED / 2**20
        lines.append(f"| {tune} | {cells} | {mean} | {number} | {time:.0f} | {kept:.1f} | {state:.2f} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tune", nargs="+", default=list(CHOICES), choices=CHOICES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    store = Store(arguments.out / "side_tuning.json", PLAN, {"recipe": repr(recipe_of("side"))})
    for seed in arguments.seeds:
        for tune in arguments.tune:
            store.get(f"{tune} {seed}", lambda t=tune, s=seed: run(t, s))
    head = (
        f"Bits per byte on held-out documents, mean ± standard error of {len(arguments.seeds)} seeds. "
        f"{PLAN.steps} steps of AdamW at {PLAN.learning_rate:g}, batches of {PLAN.batch} sequences of 64 "
        f"bytes, after {PRETRAIN} steps of pretraining on prose. kept: what the forward stores for the "
        f"backward; state: gradients and moments of AdamW. {store.made_with()}"
    )
    text = f"{head}\n\n{table(store, arguments.seeds)}\n"
    (arguments.out / "side_tuning.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
