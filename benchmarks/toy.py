"""The toy problem of CAGrad, Nash-MTL and FAMO: two objectives on a plane, five starting points, every rule.

    python -m benchmarks.toy [--steps 35000] [--rules mgda nash_mtl ...]

On the way from the starting points to the Pareto front (`x₂ = -8.3552`, `|x₁| <= 7`) the objectives conflict,
and their scales differ by a factor of 10. Published results: equal weights, PCGrad and CAGrad do not reach
the front from (9, 9). MGDA, IMTL-G, Nash-MTL and FAMO reach it from all five points. The objectives, Adam
with learning rate 1e-3, and 35000 steps are those of the Nash-MTL repository. Writes
`benchmarks/results/toy.{md,png}`. The picture needs matplotlib.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting import FAMO, PCD, RULES, Fixed, GeneralizedMean, PrimaryAuxiliary, PriorLoss, Rule

RESULTS = Path(__file__).parent / "results"
TASKS = ("L1", "L2")
STARTS = ((-8.5, 7.5), (0.0, 0.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0))
SCALE = 0.1  # of L1
LOWER_BOUNDS = (-21.0 * SCALE, -21.0)
_FLOOR = 5e-6

# rules with arguments for this problem; all others run with their defaults
SETTINGS: dict[str, Rule] = {
    "famo": FAMO(weight_decay=0.0),  # as in the toy problem of its authors
    "fixed": Fixed({"L1": 10.0, "L2": 1.0}),  # compensates the difference in scale
    "generalized_mean": GeneralizedMean(2.0),
    "pcd": PCD("L1"),
    "primary_auxiliary": PrimaryAuxiliary("L1"),
    "prior_loss": PriorLoss({"L1": SCALE, "L2": 1.0}),
}


def objectives(x: Tensor) -> Tensor:
    """The losses `[..., 2]` at points `[..., 2]`."""
    x1, x2 = x[..., 0], x[..., 1]
    f1 = (0.5 * (-x1 - 7) - torch.tanh(-x2)).abs().clamp(min=_FLOOR).log() + 6
    f2 = (0.5 * (-x1 + 3) + torch.tanh(-x2) + 2).abs().clamp(min=_FLOOR).log() + 6
    c1, c2 = torch.tanh(0.5 * x2).clamp(min=0), torch.tanh(-0.5 * x2).clamp(min=0)
    square1 = ((-x1 + 7) ** 2 + 0.1 * (-x2 - 8) ** 2) / 10 - 20
    square2 = ((-x1 - 7) ** 2 + 0.1 * (-x2 - 8) ** 2) / 10 - 20
    return torch.stack([SCALE * (f1 * c1 + square1 * c2), f2 * c1 + square2 * c2], dim=-1)


def losses_and_gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    """Losses `[k, 2]` and gradients `[k, 2, 2]`, by task, at k points."""
    x = x.detach().requires_grad_()
    losses = objectives(x)
    first, second = (torch.autograd.grad(losses[:, i].sum(), x, retain_graph=i == 0)[0] for i in (0, 1))
    return losses.detach(), torch.stack([first, second], dim=1)


def descend(rules: Mapping[str, Rule], steps: int, lr: float = 1e-3, records: int = 200) -> dict[str, Tensor]:
    """Points `[records, 5, 2]` on the path of each rule from each starting point. The last record is the end.

    One autograd call and one Adam step handle all rules and starting points. Rules get losses minus their
    lower bounds, because some rules take logarithms; a constant does not change the gradients.
    """
    device = torch.device("cpu")
    runs = [(name, rule) for name, rule in rules.items() for _ in STARTS]
    states = [rule.init(TASKS, device) for _, rule in runs]
    x = torch.tensor(STARTS, dtype=torch.float64).repeat(len(rules), 1)
    bounds = torch.tensor(LOWER_BOUNDS, dtype=torch.float64)
    present, counts = torch.ones(2, dtype=torch.bool), torch.ones(2, dtype=torch.float64)
    mean, square = torch.zeros_like(x), torch.zeros_like(x)
    track = [x]
    for step in range(steps):
        losses, gradients = losses_and_gradients(x)
        grams = gradients @ gradients.mT
        weights = torch.empty_like(losses)
        for k, (_, rule) in enumerate(runs):
            stats = TaskStats(losses[k] - bounds, present, grams[k], counts, step)
            weights[k], states[k] = rule.update(stats, states[k])
        update = torch.einsum("kn,knd->kd", weights, gradients)
        mean = 0.9 * mean + 0.1 * update
        square = 0.999 * square + 0.001 * update**2
        size = (square / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
        x = x - lr * mean / (1 - 0.9 ** (step + 1)) / size
        if (step + 1) % max(steps // records, 1) == 0 or step == steps - 1:
            track.append(x)
    paths = torch.stack(track).reshape(len(track), len(rules), len(STARTS), 2)
    return {name: paths[:, i] for i, name in enumerate(rules)}


def reached(points: Tensor) -> Tensor:
    """Which of the points `[..., 2]` are on the front, or in the valley that leads to it."""
    return (points[..., 1] < -4.5) & (points[..., 0].abs() < 7.2)


def all_rules() -> dict[str, Rule]:
    return {name: SETTINGS.get(name) or rule.example(TASKS) for name, rule in RULES.items()}


def markdown(paths: Mapping[str, Tensor]) -> str:
    lines = ["| rule | reaches the front | " + " | ".join(str(s) for s in STARTS) + " |"]
    lines.append("|---|--:|" + "---|" * len(STARTS))
    for name, path in paths.items():
        ends = path[-1]
        cells = [f"({a:.3f}, {b:.3f})" for a, b in objectives(ends).tolist()]
        lines.append(f"| {name} | {int(reached(ends).sum())} of 5 | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(paths: Mapping[str, Tensor], file: Path) -> None:
    """One panel per rule: contours of the sum, the front in grey, and one path per starting point.

    Blue paths reach the front; red paths do not.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(6, len(paths))
    rows = -(-len(paths) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.0 * columns, 2.15 * rows), squeeze=False)
    side = torch.linspace(-10, 10, 150, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(side, side, indexing="xy"), dim=-1)
    height = objectives(grid).sum(-1)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (name, path) in zip(axes.flat, paths.items(), strict=False):
        axis.contour(side, side, height, levels=16, linewidths=0.5, colors="0.82", linestyles="solid")
        axis.plot([-7, 7], [-8.3552, -8.3552], color="0.55", linewidth=4, zorder=1)
        arrived = reached(path[-1])
        for start in range(len(STARTS)):
            color = "tab:blue" if arrived[start] else "tab:red"
            axis.plot(*path[:, start].T, linewidth=1.2, color=color)
            axis.plot(*path[0, start], "o", markersize=3, color="black")
            axis.plot(*path[-1, start], "*" if arrived[start] else "X", markersize=7, color=color)
        axis.set_title(f"{name} ({int(arrived.sum())}/5)", fontsize=9)
        axis.set_xlim(-10, 10)
        axis.set_ylim(-10, 10)
    figure.tight_layout(pad=0.4)
    figure.savefig(file, dpi=90)
    plt.close(figure)
    shrink(file)


def shrink(file: Path) -> None:
    """Reduces the picture to 64 colours, a quarter of the bytes, because git keeps every version."""
    from PIL import Image  # installed, because matplotlib needs it

    with Image.open(file) as image:
        # median cut, the default, mixes the few red pixels with the few black ones
        method = Image.Quantize.FASTOCTREE
        small = image.convert("RGB").quantize(64, method=method, dither=Image.Dither.NONE)
    small.save(file, optimize=True)


def run(rules: Mapping[str, Rule], steps: int, lr: float, processes: int) -> dict[str, Tensor]:
    """Runs `descend`, with the rules divided over several processes."""
    parts = [dict(list(rules.items())[k::processes]) for k in range(min(processes, len(rules)))]
    with multiprocessing.get_context("spawn").Pool(len(parts)) as pool:
        done = pool.starmap(descend, [(part, steps, lr) for part in parts])
    paths = {name: path for part in done for name, path in part.items()}
    return {name: paths[name] for name in rules}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=35_000)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # the workers inherit it
    rules = {name: rule for name, rule in all_rules().items() if name in args.rules}
    before = time.perf_counter()
    paths = run(rules, args.steps, args.lr, args.processes)
    seconds = time.perf_counter() - before
    head = f"{args.steps} steps of Adam at {args.lr:g}, {seconds:.0f} s. Final (L1, L2):\n\n"
    table = head + markdown(paths)
    print(table)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "toy.md").write_text(table)
    try:
        draw(paths, args.output / "toy.png")
    except ImportError:
        print("no picture: matplotlib is not installed")


if __name__ == "__main__":
    main()
