"""The terms of one bound under several rules: the recipe `hierarchical_vae`, over seeds.

    nice python -m benchmarks.hierarchical_vae                        # 3 seeds, one core: 8 minutes

`bound` has all weights 1 from the start: the negative ELBO. `warm-up` multiplies the KL terms by a β that
rises to 1 over the first 30 % of the steps. `kl_balance` balances them as well during the warm-up. These
three end with the same loss. `inverse_loss` and `uncertainty` keep other weights to the end: they train the
model for something else than the bound. All runs use Adamax with one learning rate.

Values are of validation images with weights 1: the negative ELBO and its part for the pixels in bits per
dimension, the KL terms in nats per image, and the units (latents) that carry more than 0.01 nats. Writes
`hierarchical_vae.{md,json,png}`. The picture shows images drawn from the models of the first seed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.tables import RESULTS
from benchmarks.trials import Plan, Store, cell, trained
from mtl_dist import Balancer
from mtl_dist.recipes import BatchData, DigitsVAE
from mtl_dist.recipes.hierarchical_vae import bits_per_dim
from mtl_dist.recipes.hierarchical_vae.network import LEVELS, SIDE, TASKS, num_noise
from mtl_dist.stats import TaskStats
from mtl_dist.weighting import Fixed, InverseLoss, KLBalance, Rule, State, Uncertainty

PLAN = Plan(steps=600, batch=64, learning_rate=1e-2)
RECIPE = DigitsVAE()
KL_TASKS = TASKS[1:]
SCALES = {"kl_0": 1.0, "kl_1": 1.0, "kl_2": 4.0, "kl_3": 4.0}
WARMUP = 180
NUM_DRAWN = 20
LETTERS = "0123456789abcdefg"  # of the 17 levels


@dataclass(frozen=True)
class OnlyWarmup(KLBalance):
    """β as of `KLBalance`, without its γ."""

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """β for the KL terms, 1 for the pixels."""
        return torch.where(state["scales"] > 0, self.beta(stats.step), 1.0).to(stats.losses), state


RULES_CHOSEN: dict[str, Callable[[], Rule]] = {
    "bound": lambda: Fixed(dict.fromkeys(TASKS, 1.0)),
    "warm-up": lambda: OnlyWarmup(SCALES, WARMUP),
    "kl_balance": lambda: KLBalance(SCALES, WARMUP),
    "inverse_loss": InverseLoss,
    "uncertainty": Uncertainty,
}


@cache
def data(seed: int) -> tuple[BatchData, BatchData]:
    return RECIPE.data(seed)


def run(rule: str, seed: int) -> dict[str, object]:
    model, row = trained(
        RECIPE, Balancer(TASKS, RULES_CHOSEN[rule]()), data(seed), PLAN, seed, torch.optim.Adamax
    )
    losses = {task: row[f"eval/loss/{task}"] for task in TASKS}
    active = {task: row[f"eval/{task}/active_units"] for task in KL_TASKS}
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(NUM_DRAWN, num_noise(RECIPE.latents), generator=draw)
    drawn = [written(image) for image in model.sample(noise, draw)] if seed == 0 else []  # type: ignore[operator]
    return {"losses": losses, "active": active, "cpu_ms": row["cpu_ms"], "drawn": drawn}


def written(image: Tensor) -> str:
    """An image in one line: one letter for each level."""
    return "".join(LETTERS[level] for level in image.flatten().tolist())


def table(store: Store, seeds: Sequence[int]) -> str:
    heads = " | ".join(f"{task} nats (units)" for task in KL_TASKS)
    lines = [
        f"| rule | -ELBO bits/dim | pixels bits/dim | {heads} | active units |",
        "|---|---:|---:|" + "---:|" * len(KL_TASKS) + "---:|",
    ]
    for rule in RULES_CHOSEN:
        runs = [store.results.get(f"{rule} {seed}") for seed in seeds]
        if None in runs:
            continue
        bound = cell([bits_per_dim(sum(run["losses"].values())) for run in runs], 3)
        pixels = cell([bits_per_dim(run["losses"]["pixels"]) for run in runs], 3)
        parts = " | ".join(
            f"{statistics.fmean(run['losses'][task] for run in runs):.2f} "
            f"({statistics.fmean(run['active'][task] for run in runs):.0f})"
            for task in KL_TASKS
        )
        units = cell([sum(run["active"].values()) for run in runs], 0)
        lines.append(f"| `{rule}` | {bound} | {pixels} | {parts} | {units} |")
    return "\n".join(lines)


def draw(store: Store, file: Path) -> None:
    """One row of drawn images for each rule, and one of real ones."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    real = [written(image) for image in data(0)[1].__getitems__(range(NUM_DRAWN))["image"]]
    found = {rule: store.results.get(f"{rule} 0") for rule in RULES_CHOSEN}
    rows = {"held-out digits": real, **{rule: run["drawn"] for rule, run in found.items() if run}}
    figure, axes = plt.subplots(len(rows), figsize=(8.4, 0.62 * len(rows)))
    for axis, (name, images) in zip(axes, rows.items(), strict=True):
        padded = torch.full((SIDE, NUM_DRAWN * (SIDE + 1)), float(LEVELS // 2))
        for k, image in enumerate(images):
            padded[:, k * (SIDE + 1) : k * (SIDE + 1) + SIDE] = torch.tensor(
                [LETTERS.index(letter) for letter in image]
            ).view(SIDE, SIDE)
        axis.imshow(padded, cmap="gray_r", vmin=0, vmax=LEVELS - 1)
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.tight_layout(pad=0.3)
    figure.savefig(file, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rules", nargs="+", default=list(RULES_CHOSEN), choices=list(RULES_CHOSEN))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    store = Store(arguments.out / "hierarchical_vae.json", PLAN, {"recipe": repr(RECIPE)})
    for seed in arguments.seeds:
        for rule in arguments.rules:
            store.get(f"{rule} {seed}", lambda r=rule, s=seed: run(r, s))
    head = (
        f"Values of {RECIPE.num_validation} held-out digits with weights 1, lower is better; mean ± standard "
        f"error of {len(arguments.seeds)} seeds. {PLAN.steps} steps of Adamax at {PLAN.learning_rate:g}, "
        f"batches of {PLAN.batch}, a warm-up of {WARMUP} steps. kl_0 and kl_1 have 16 units each, kl_2 and "
        f"kl_3 have 64. {store.made_with()}"
    )
    text = f"{head}\n\n{table(store, arguments.seeds)}\n"
    (arguments.out / "hierarchical_vae.md").write_text(text)
    draw(store, arguments.out / "hierarchical_vae.png")
    print(text)


if __name__ == "__main__":
    main()
