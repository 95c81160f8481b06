"""Does weighting help? Every rule on the recipe multi_digits, compared with one network per task.

    python -m benchmarks.multi_digits                       # 5 seeds, 2 processes: some minutes
    python -m benchmarks.multi_digits --rules equal mgda --seeds 0 1 --steps 100

All runs use AdamW with the same number of steps and the same learning rate. For one seed, all rules have the
same data, order and initial parameters. A task that is trained alone uses the same network, with `Fixed`
weights: 1 for that task, 0 for the others.

    Δm = 100/n Σᵢ sᵢ (Mᵢ - Sᵢ) / Sᵢ

Mᵢ is the validation metric of task i under a rule. Sᵢ is the same metric of the task alone, with the same
seed. sᵢ is 1 if higher is better, and -1 if lower is better. If Δm is above 0, the tasks gain from each
other. Its standard error is over seeds. The mean rank is over tasks; rules are ranked by their means over
seeds. Times are measured afterwards, in pairs: each round takes one step of each rule, in random order, and
the result is the median over rounds of time / (time of `equal` in the same round). Writes
`benchmarks/results/multi_digits.{md,json,png}`. The picture needs matplotlib.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import multiprocessing
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from mtl_dist import Balancer
from mtl_dist.priors import Categorical, Priors, Regression
from mtl_dist.recipes import Batch, BatchData, MultiDigits
from mtl_dist.training.batches import StepBatches
from mtl_dist.training.evaluate import evaluate
from mtl_dist.weighting import (
    DWA,
    RULES,
    CoBa,
    Fixed,
    GeneralizedMean,
    PrimaryAuxiliary,
    PriorLoss,
    Rule,
)

RESULTS = Path(__file__).parent / "results"
RECIPE = MultiDigits()
BATCH = 128
HIGHER_IS_BETTER = {"accuracy": True, "psnr": True, "mae": False}
ALONE = "alone: "  # prefix of the name of a baseline
RANDOM = "random weights "  # prefix of a draw of fixed weights
OBSERVE_EVERY = 5  # a rule that learns from held-out losses gets them every this many steps


@dataclass(frozen=True)
class Choice:
    """Arguments without defaults, or with defaults for runs that are longer than this one.

    Attributes:
        make: a function from the losses that follow from label statistics to the rule.
        reason: why these arguments.
    """

    make: Callable[[Priors], Rule]
    reason: str


# all other rules run with their defaults; no argument was tuned
CHOICES: dict[str, Choice] = {
    "coba": Choice(
        lambda priors: CoBa(warmup=8, window=16),
        "its defaults are for hundreds of validations; here there is one every 5 steps, on compositions of "
        "training digits that no batch holds, so that the validation digits stay unseen",
    ),
    "dwa": Choice(
        lambda priors: DWA(interval=RECIPE.num_train // BATCH), "an epoch, as in the paper: 64 steps"
    ),
    "fixed": Choice(
        lambda priors: Fixed({task: 1 / loss for task, loss in priors.initial.items()}),
        "the inverse of the loss at zero outputs, which is what one would work out by hand",
    ),
    "generalized_mean": Choice(
        lambda priors: GeneralizedMean(0.5), "halfway between `equal` (1) and `geometric_mean` (0)"
    ),
    "primary_auxiliary": Choice(
        lambda priors: PrimaryAuxiliary(["left", "right"]), "the digits matter, their sum and image help"
    ),
    "prior_loss": Choice(lambda priors: PriorLoss(priors.prior), "the label statistics of the training set"),
}


@dataclass(frozen=True)
class Schedule:
    """The settings that all runs have in common."""

    steps: int
    learning_rate: float


@dataclass(frozen=True)
class Outcome:
    """The result of one run: validation metrics by task, or the error that ended it."""

    name: str
    seed: int
    metrics: dict[str, float]
    error: str | None = None


@cache
def data(seed: int) -> tuple[BatchData, BatchData, BatchData]:
    """Training samples, validation samples, and other compositions of the training digits."""
    train, validation = RECIPE.data(seed)
    held_out, _ = RECIPE.data(10_000 + seed)
    return train, validation, held_out


@cache
def priors(seed: int) -> Priors:
    """Initial and prior losses from the training labels."""
    train = data(seed)[0]
    batch = train.__getitems__(range(len(train)))
    pixels = batch["image"].flatten(1)
    labels = {"left": batch["left"], "right": batch["right"], "sum": batch["left"] + batch["right"]}
    kinds = {
        "left": Categorical(10),
        "right": Categorical(10),
        "sum": Regression(),
        "image": Regression(pixels.shape[1], reduction="sum"),
    }
    for task, kind in kinds.items():
        kind.update(labels.get(task, pixels))
    return Priors.of(kinds)


def make_rule(name: str, seed: int) -> Rule:
    """The rule with this name in `RULES`, the baseline of a task, or a draw of fixed weights."""
    if name.startswith(ALONE):
        return Fixed({task: float(task == name.removeprefix(ALONE)) for task in RECIPE.tasks})
    if name.startswith(RANDOM):
        drawn = random.Random(int(name.removeprefix(RANDOM)))
        return Fixed({task: 10 ** drawn.uniform(-3, 0) for task in RECIPE.tasks})
    return CHOICES[name].make(priors(seed)) if name in CHOICES else RULES[name]()


class Training:
    """A model under a rule, and its optimizer."""

    def __init__(self, name: str, seed: int, learning_rate: float, lag: int = 0) -> None:
        self.balancer = Balancer(RECIPE.tasks, make_rule(name, seed), lag=lag)
        self.held_out = data(seed)[2]
        torch.manual_seed(seed)
        self.model: nn.Module = RECIPE.model(self.balancer)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), learning_rate, weight_decay=0.0)

    def step(self, batch: Batch) -> None:
        """One optimizer step, and the losses that the rule observes."""
        self.model(**batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.balancer.weighting.observes and self.balancer.step % OBSERVE_EVERY == 0:
            self.observe()

    @torch.no_grad()
    def observe(self) -> None:
        """Gives the rule losses of other compositions."""
        self.model.eval()
        sums = self.model(**self.held_out.__getitems__(range(BATCH)))
        self.balancer.observe(dict(zip(RECIPE.tasks, sums[:, 0] / sums[:, 2], strict=True)))
        self.model.train()


def train(job: tuple[str, int], schedule: Schedule, lag: int = 0) -> Outcome:
    """Runs one training. Returns its validation metrics."""
    name, seed = job
    torch.set_num_threads(1)
    train_data, validation, _ = data(seed)
    training = Training(name, seed, schedule.learning_rate, lag)
    try:
        for indices in StepBatches(len(train_data), BATCH, seed, 0, schedule.steps):
            training.step(train_data.__getitems__(indices))
    except ValueError as error:  # losses or gradients are NaN or infinite
        return Outcome(name, seed, {}, str(error))
    row = evaluate(training.model, validation, RECIPE, Accelerator(cpu=True), 500)
    metrics = {task: row[f"eval/{task}/{metric.name}"] for task, metric in RECIPE.metrics.items()}
    return Outcome(name, seed, metrics)


def sweep(jobs: Sequence[tuple[str, int]], schedule: Schedule, processes: int) -> list[Outcome]:
    """All runs, seed by seed, in a pool of processes."""
    start = time.perf_counter()
    outcomes = []
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for outcome in pool.imap_unordered(partial(train, schedule=schedule), jobs):
            outcomes.append(outcome)
            seconds = time.perf_counter() - start
            print(f"{len(outcomes)}/{len(jobs)} {seconds:.0f} s {outcome}", flush=True)
    order = {job: k for k, job in enumerate(jobs)}
    return sorted(outcomes, key=lambda outcome: order[outcome.name, outcome.seed])


def step_times(rules: Sequence[str], rounds: int, learning_rate: float) -> dict[str, float]:
    """Median time of a step relative to that of `equal` in the same round."""
    torch.set_num_threads(1)
    trainings = {name: Training(name, 0, learning_rate) for name in {*rules, "equal"}}
    batch = data(0)[0].__getitems__(range(BATCH))
    ratios: dict[str, list[float]] = {name: [] for name in rules}
    shuffle = random.Random(0)
    for turn in range(rounds + 3):
        seconds = {}
        for name in shuffle.sample(sorted(trainings), len(trainings)):
            before = time.perf_counter()
            trainings[name].step(batch)
            seconds[name] = time.perf_counter() - before
        if turn >= 3:  # the first rounds are a warm-up
            for name in rules:
                ratios[name].append(seconds[name] / seconds["equal"])
    return {name: statistics.median(values) for name, values in ratios.items()}


@dataclass(frozen=True)
class Summary:
    """The row of a rule: means over seeds. Infinite or NaN if a run ended with an error."""

    rule: str
    delta: float
    error: float
    rank: float
    metrics: dict[str, float]
    time: float
    failed: int = 0


def summarise(outcomes: Sequence[Outcome], times: dict[str, float]) -> list[Summary]:
    """One row per rule; the best Δm is first."""
    runs = {(outcome.name, outcome.seed): outcome for outcome in outcomes}
    seeds = sorted({outcome.seed for outcome in outcomes})
    means = {name: means_over([runs[name, seed] for seed in seeds]) for name in times}
    ranks = mean_ranks(means)
    rows = []
    for name in times:
        failed = sum(runs[name, seed].error is not None for seed in seeds)
        deltas = [] if failed else [delta(runs, name, seed) for seed in seeds]
        error = statistics.stdev(deltas) / math.sqrt(len(deltas)) if len(deltas) > 1 else math.nan
        value = statistics.fmean(deltas) if deltas else -math.inf
        rows.append(Summary(name, value, error, ranks[name], means[name], times[name], failed))
    return sorted(rows, key=lambda row: -row.delta)


def means_over(runs: Sequence[Outcome]) -> dict[str, float]:
    """Means of the metric of each task. A failed run counts as the worst possible value."""
    if any(run.error is not None for run in runs):
        return {task: -sign(task) * math.inf for task in RECIPE.tasks}
    return {task: statistics.fmean(run.metrics[task] for run in runs) for task in RECIPE.tasks}


def sign(task: str) -> int:
    """1 if a higher metric is better, otherwise -1."""
    return 1 if HIGHER_IS_BETTER[RECIPE.metrics[task].name] else -1


def delta(runs: dict[tuple[str, int], Outcome], name: str, seed: int) -> float:
    """Δm in %."""
    changes = []
    for task in RECIPE.tasks:
        alone = runs[ALONE + task, seed].metrics[task]
        changes.append(100 * sign(task) * (runs[name, seed].metrics[task] - alone) / alone)
    return statistics.fmean(changes)


def mean_ranks(means: dict[str, dict[str, float]]) -> dict[str, float]:
    """Mean ranks over tasks. 1 is the best; equal values get the mean of their ranks."""
    ranks: dict[str, list[float]] = {name: [] for name in means}
    for task in RECIPE.tasks:
        scores = [sign(task) * metrics[task] for metrics in means.values()]
        for name, metrics in means.items():
            own = sign(task) * metrics[task]
            better, equal = sum(s > own for s in scores), sum(s == own for s in scores)
            ranks[name].append(better + (equal + 1) / 2)
    return {name: statistics.fmean(values) for name, values in ranks.items()}


def markdown(rows: Sequence[Summary], alone: dict[str, float], head: str) -> str:
    """All rows with their metrics, and the chosen arguments."""
    titles = [f"{task} {metric.name}" for task, metric in RECIPE.metrics.items()]
    lines = [head, "", f"| rule | Δm % | mean rank | {' | '.join(titles)} | time / Equal |"]
    lines.append("|---|---:|---:|" + "---:|" * len(titles) + "---:|")
    lines.append(f"| each task alone | 0 | | {cells(alone)} | |")
    for row in rows:
        note = f" ({row.failed} runs failed)" if row.failed else ""
        lines.append(
            f"| {row.rule}{note} | {signed(row)} | {row.rank:.1f} | {cells(row.metrics)} | {row.time:.2f} |"
        )
    lines += ["", "Arguments that are no defaults:", ""]
    lines += [f"* `{make_rule(name, 0)}`: {choice.reason}." for name, choice in CHOICES.items()]
    return "\n".join(lines) + "\n"


def compact(rows: Sequence[Summary], blocks: int = 2) -> str:
    """The table in docs/results.md: all rules ordered by Δm, in two columns."""
    height = -(-len(rows) // blocks)
    lines = ["| " + " | | ".join(["rule | Δm % | rank | time"] * blocks) + " |"]
    lines.append("|" + "---|".join(["---|---:|---:|---:|"] * blocks))
    for k in range(height):
        some = [rows[b * height + k] if b * height + k < len(rows) else None for b in range(blocks)]
        parts = [
            f"`{row.rule}` | {signed(row)} | {row.rank:.1f} | {row.time:.2f}" if row else " | | | "
            for row in some
        ]
        lines.append("| " + " | | ".join(parts) + " |")
    return "\n".join(lines) + "\n"


def signed(row: Summary) -> str:
    """Δm with its standard error."""
    return f"{row.delta:+.1f} ± {row.error:.1f}" if math.isfinite(row.delta) else "failed"


def cells(metrics: dict[str, float]) -> str:
    return " | ".join(f"{metrics[task]:.3f}" for task in RECIPE.tasks)


def draw(rows: Sequence[Summary], file: Path, floor: float = -60) -> None:
    """Δm of all rules with standard errors. The colour shows what a rule reads. Below `floor`: a number."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    labels = {"LOSSES": "reads losses", "NORMS": "reads norms", "GRAM": "reads the Gram matrix"}
    colors = dict(zip(labels, ("tab:blue", "tab:orange", "tab:green"), strict=True))
    figure, axis = plt.subplots(figsize=(6.4, 0.17 * len(rows) + 1.1))
    for k, row in enumerate(rows):
        need = RULES[row.rule].needs.name
        if row.delta < floor:
            axis.text(floor, k, f" ◂ {row.delta:.0f}", fontsize=7, va="center", color=colors[need])
        else:
            label = labels.pop(need, None)
            axis.errorbar(
                row.delta, k, xerr=row.error, fmt="o", markersize=4, color=colors[need], label=label
            )
        if row.rule == "equal":
            axis.axvline(row.delta, color="0.5", linewidth=0.8, linestyle=":", label="equal")
    axis.axvline(0, color="0.5", linewidth=0.8, linestyle="--", label="each task alone")
    axis.set_yticks(range(len(rows)), [row.rule for row in rows], fontsize=7)
    axis.set_ylim(len(rows) - 0.3, -0.7)
    axis.set_xlim(left=floor)
    axis.set_xlabel("Δm %, mean and standard error over seeds; right is better", fontsize=8)
    axis.tick_params(axis="x", labelsize=7)
    axis.grid(axis="both", linewidth=0.3)
    axis.legend(fontsize=7, loc="lower right")
    figure.tight_layout(pad=0.4)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def describe(arguments: argparse.Namespace, load: float) -> str:
    """The setting and the machine."""
    return (
        f"{arguments.steps} steps of AdamW at {arguments.lr:g}, batches of {BATCH}, {len(arguments.seeds)} "
        f"seeds. {datetime.date.today().isoformat()}, torch {torch.__version__}, {platform.machine()}, "
        f"{os.cpu_count()} cores; times from {arguments.rounds} paired rounds in one thread, load average "
        f"{load:.1f} when they were taken."
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=3e-3, help="that of configs/recipe/multi_digits.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--rounds", type=int, default=31, help="of the timing")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--redraw", action="store_true", help="only tables and picture, from the JSON")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.redraw:
        record = json.loads((arguments.output / "multi_digits.json").read_text(encoding="utf-8"))
        times = {row["rule"]: row["time"] for row in record["rules"]}
        write([Outcome(**run) for run in record["runs"]], times, record["head"], arguments.output)
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # the workers inherit it
    schedule = Schedule(arguments.steps, arguments.lr)
    names = [ALONE + task for task in RECIPE.tasks] + list(arguments.rules)
    jobs = [(name, seed) for seed, name in product(arguments.seeds, names)]
    outcomes = sweep(jobs, schedule, arguments.processes)
    load = os.getloadavg()[0]
    times = step_times(arguments.rules, arguments.rounds, arguments.lr)
    write(outcomes, times, describe(arguments, load), arguments.output)


def write(outcomes: Sequence[Outcome], times: dict[str, float], head: str, folder: Path) -> None:
    """Writes the three result files."""
    rows = summarise(outcomes, times)
    alone = {
        task: statistics.fmean(o.metrics[task] for o in outcomes if o.name == ALONE + task)
        for task in RECIPE.tasks
    }
    table = markdown(rows, alone, head)
    print(table, compact(rows), sep="\n")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "multi_digits.md").write_text(table, encoding="utf-8")
    record: dict[str, Any] = {
        "head": head,
        "alone": alone,
        "rules": [asdict(row) for row in rows],
        "runs": [asdict(outcome) for outcome in outcomes],
    }
    text = json.dumps(record, indent=1, ensure_ascii=False)
    (folder / "multi_digits.json").write_text(text + "\n", encoding="utf-8")
    try:
        draw(rows, folder / "multi_digits.png")
    except ImportError:
        print("no picture: matplotlib is not installed")


if __name__ == "__main__":
    main()
