"""The terms of one bound under several rules: the recipe `hierarchical_vae`, over seeds.

    nice python -m benchmarks.hierarchical_vae                           # 3 seeds, one core: 8 minutes
    nice python -m benchmarks.hierarchical_vae --images fashion_mnist    # 15 minutes; for data/ see the YAML

`bound` has all weights 1 from the start: the negative ELBO. `warm-up` multiplies the KL terms by a β that
rises to 1 over the first 30 % of the steps. `kl_balance` balances them as well during the warm-up. These
three end with the same loss. `inverse_loss` and `uncertainty` keep other weights to the end: they train the
model for something else than the bound. All runs use Adamax with one learning rate.

Values are of validation images with weights 1: the negative ELBO and its part for the pixels in bits per
dimension, the KL terms in nats per image, and the units (latents) that carry more than 0.01 nats. The picture
shows images drawn from the models of the first seed. Writes `hierarchical_vae.{md,json,png}`, and for
Fashion-MNIST `hierarchical_vae_fashion_mnist.*`.
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
from mtl_dist.recipes import BatchData, ImageVAE
from mtl_dist.recipes.hierarchical_vae import bits_per_dim
from mtl_dist.recipes.hierarchical_vae.network import LEVELS, TASKS, num_noise, scales
from mtl_dist.stats import TaskStats
from mtl_dist.weighting import Fixed, InverseLoss, KLBalance, Rule, State, Uncertainty

SETUPS = {
    "digits": (ImageVAE(), Plan(steps=600, batch=64, learning_rate=1e-2)),
    "fashion_mnist": (
        ImageVAE("fashion_mnist", num_validation=1000, channels=16),
        Plan(steps=300, batch=64, learning_rate=1e-2),
    ),
}
KL_TASKS = TASKS[1:]
SCALES = {"kl_0": 1.0, "kl_1": 1.0, "kl_2": 4.0, "kl_3": 4.0}
WARMUP = 0.3  # of all steps
NUM_DRAWN = 20
LETTERS = "0123456789abcdefg"  # of the 17 levels


@dataclass(frozen=True)
class OnlyWarmup(KLBalance):
    """β as of `KLBalance`, without its γ."""

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """β for the KL terms, 1 for the pixels."""
        return torch.where(state["scales"] > 0, self.beta(stats.step), 1.0).to(stats.losses), state


RULES_CHOSEN: dict[str, Callable[[int], Rule]] = {  # from the number of steps of the warm-up
    "bound": lambda _: Fixed(dict.fromkeys(TASKS, 1.0)),
    "warm-up": lambda steps: OnlyWarmup(SCALES, steps),
    "kl_balance": lambda steps: KLBalance(SCALES, steps),
    "inverse_loss": lambda _: InverseLoss(),
    "uncertainty": lambda _: Uncertainty(),
}


@cache
def data(images: str, seed: int) -> tuple[BatchData, BatchData]:
    return SETUPS[images][0].data(seed)


def run(images: str, rule: str, seed: int) -> dict[str, object]:
    recipe, plan = SETUPS[images]
    balancer = Balancer(TASKS, RULES_CHOSEN[rule](warmup(plan)))
    model, row = trained(recipe, balancer, data(images, seed), plan, seed, torch.optim.Adamax)
    losses = {task: row[f"eval/loss/{task}"] for task in TASKS}
    active = {task: row[f"eval/{task}/active_units"] for task in KL_TASKS}
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(NUM_DRAWN, num_noise(recipe.side, recipe.latents), generator=draw)
    drawn = [written(image) for image in model.sample(noise, draw)] if seed == 0 else []  # type: ignore[operator]
    return {"losses": losses, "active": active, "cpu_ms": row["cpu_ms"], "drawn": drawn}


def warmup(plan: Plan) -> int:
    """Its number of steps."""
    return round(WARMUP * plan.steps)


def written(image: Tensor) -> str:
    """An image in one line: one letter for each level."""
    return "".join(LETTERS[level] for level in image.flatten().tolist())


def table(store: Store, images: str, seeds: Sequence[int]) -> str:
    recipe, _ = SETUPS[images]
    pixels_of = recipe.side**2
    heads = " | ".join(f"{task} nats (units)" for task in KL_TASKS)
    lines = [
        f"| rule | -ELBO bits/dim | pixels bits/dim | {heads} | active units |",
        "|---|---:|---:|" + "---:|" * len(KL_TASKS) + "---:|",
    ]
    for rule in RULES_CHOSEN:
        runs = [store.results.get(f"{rule} {seed}") for seed in seeds]
        if None in runs:
            continue
        bound = cell([bits_per_dim([sum(run["losses"].values()), pixels_of]) for run in runs], 3)
        pixels = cell([bits_per_dim([run["losses"]["pixels"], pixels_of]) for run in runs], 3)
        parts = " | ".join(
            f"{statistics.fmean(run['losses'][task] for run in runs):.2f} "
            f"({statistics.fmean(run['active'][task] for run in runs):.0f})"
            for task in KL_TASKS
        )
        units = cell([sum(run["active"].values()) for run in runs], 0)
        lines.append(f"| `{rule}` | {bound} | {pixels} | {parts} | {units} |")
    return "\n".join(lines)


def draw(store: Store, images: str, file: Path) -> None:
    """One row of drawn images for each rule, and one of real ones."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    side, held_out = SETUPS[images][0].side, data(images, 0)[1]
    spaced = range(0, len(held_out), len(held_out) // NUM_DRAWN) if images != "digits" else range(NUM_DRAWN)
    real = [written(image) for image in held_out.__getitems__(spaced)["image"]][:NUM_DRAWN]
    found = {rule: store.results.get(f"{rule} 0") for rule in RULES_CHOSEN}
    rows = {"held out": real, **{rule: run["drawn"] for rule, run in found.items() if run}}
    figure, axes = plt.subplots(len(rows), figsize=(8.4, 0.62 * len(rows)))
    for axis, (name, letters) in zip(axes, rows.items(), strict=True):
        padded = torch.full((side, NUM_DRAWN * (side + 1)), float(LEVELS // 2))
        for k, image in enumerate(letters):
            padded[:, k * (side + 1) : k * (side + 1) + side] = torch.tensor(
                [LETTERS.index(letter) for letter in image]
            ).view(side, side)
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
    parser.add_argument("--images", default="digits", choices=list(SETUPS))
    parser.add_argument("--rules", nargs="+", default=list(RULES_CHOSEN), choices=list(RULES_CHOSEN))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    images = arguments.images
    recipe, plan = SETUPS[images]
    name = "hierarchical_vae" if images == "digits" else f"hierarchical_vae_{images}"
    store = Store(arguments.out / f"{name}.json", plan, {"recipe": repr(recipe)})
    for seed in arguments.seeds:
        for rule in arguments.rules:
            store.get(f"{rule} {seed}", lambda r=rule, s=seed: run(images, r, s))
    coarse, *_, fine = (recipe.latents * scale**2 for scale in scales(recipe.side))
    head = (
        f"Values of {recipe.num_validation} held-out {images} images with weights 1, lower is better; mean ± "
        f"standard error of {len(arguments.seeds)} seeds. {plan.steps} steps of Adamax at "
        f"{plan.learning_rate:g}, batches of {plan.batch}, a warm-up of {warmup(plan)} steps. kl_0 and kl_1 "
        f"have {coarse} units each, kl_2 and kl_3 have {fine}. {store.made_with()}"
    )
    text = f"{head}\n\n{table(store, images, arguments.seeds)}\n"
    (arguments.out / f"{name}.md").write_text(text)
    draw(store, images, arguments.out / f"{name}.png")
    print(text)


if __name__ == "__main__":
    main()
