"""Which rule? All rules and random fixed weights on multi_digits, with a learning rate tuned equally for all.

    nice -n 19 python -m benchmarks.which_rule                     # one core: about an hour
    nice -n 19 python -m benchmarks.which_rule --rules equal mgda --random 4

Each entry (a rule, a task alone, or one draw of fixed weights) is trained with each learning rate of a grid
on three tuning seeds. The rate with the best Δm is kept, for a task alone that with its best metric. Then it
is trained with this rate on five other seeds, and those are reported: other initial parameters, other
compositions. The digits in the validation samples are never trained on. Both times Δm is against the tasks
alone, at their own rates (benchmarks/multi_digits.py has its formula).

Random weights are log-uniform over three decades, one draw for all seeds. They show what a search by hand
would find with as many trials (Xin et al. 2022, Kurin et al. 2022); the draw that is best on the tuning seeds
has a row. An interrupted run continues when it is started again. Writes
`benchmarks/results/which_rule.{md,json}`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import multi_digits
from benchmarks.multi_digits import ALONE, RANDOM, RECIPE, Outcome, Schedule
from mtl_dist import RULES

RESULTS = Path(__file__).parent / "results"
STEPS = 200
RATES = (1e-3, 3e-3, 1e-2)
TUNING, REPORTED = (100, 101, 102), (0, 1, 2, 3, 4)
BASELINES = [ALONE + task for task in RECIPE.tasks]
Runs = dict[
    str, dict[str, float] | None
]  # metrics by "entry/rate/seed"; None: the training ended with an error


@dataclass(frozen=True)
class Trainings:
    """The trainings that were made, in a file."""

    path: Path
    runs: Runs

    @classmethod
    def at(cls, path: Path) -> Trainings:
        """Those that an earlier run has left."""
        return cls(path, json.loads(path.read_text(encoding="utf-8")) if path.exists() else {})

    def outcome(self, entry: str, rate: float, seed: int) -> Outcome:
        """One training, made now if it was not made before."""
        key = f"{entry}/{rate:g}/{seed}"
        if key not in self.runs:
            found = multi_digits.train((entry, seed), Schedule(STEPS, rate))
            self.runs[key] = None if found.error else found.metrics
            text = json.dumps(self.runs, indent=0, sort_keys=True)
            self.path.write_text(text + "\n", encoding="utf-8")
            print(key, self.runs[key], flush=True)
        metrics = self.runs[key]
        return Outcome(entry, seed, metrics or {}, "failed" if metrics is None else None)


def deltas(
    trainings: Trainings, entry: str, rate: float, seeds: Sequence[int], alone: dict[str, float]
) -> list[float]:
    """Δm of each seed; minus infinity for a training that failed."""
    values = []
    for seed in seeds:
        own = trainings.outcome(entry, rate, seed)
        runs = {(name, seed): trainings.outcome(name, alone[name], seed) for name in BASELINES}
        runs[entry, seed] = own
        values.append(-math.inf if own.error else multi_digits.delta(runs, entry, seed))
    return values


def tuned_alone(trainings: Trainings) -> dict[str, float]:
    """The best rate of each task alone."""
    rates = {}
    for name in BASELINES:
        task = name.removeprefix(ALONE)
        score = {
            rate: statistics.fmean(
                multi_digits.sign(task) * trainings.outcome(name, rate, seed).metrics[task] for seed in TUNING
            )
            for rate in RATES
        }
        rates[name] = max(score, key=score.__getitem__)
    return rates


@dataclass(frozen=True)
class Row:
    """One entry: its best rate, Δm with it on the tuning seeds, and on the others."""

    entry: str
    rate: float
    tuned: float
    values: list[float]

    @property
    def mean(self) -> float:
        """Over the reported seeds."""
        return statistics.fmean(self.values)

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return (
            statistics.stdev(self.values) / math.sqrt(len(self.values)) if self.mean > -math.inf else math.nan
        )


def rows(trainings: Trainings, entries: Sequence[str]) -> Iterator[Row]:
    """All entries, as they are done."""
    alone = tuned_alone(trainings)
    for entry in entries:
        score = {rate: statistics.fmean(deltas(trainings, entry, rate, TUNING, alone)) for rate in RATES}
        rate = max(score, key=score.__getitem__)
        yield Row(entry, rate, score[rate], deltas(trainings, entry, rate, REPORTED, alone))


def page(found: Sequence[Row]) -> str:
    """The table, best first; random weights as one row of their own and by their best draw."""
    drawn = [row for row in found if row.entry.startswith(RANDOM)]
    lines = [
        f"{STEPS} steps of AdamW, rates {', '.join(f'{rate:g}' for rate in RATES)} tuned on seeds "
        f"{', '.join(map(str, TUNING))}, Δm % on seeds {', '.join(map(str, REPORTED))}. "
        f"{datetime.date.today()}, torch {torch.__version__}, {platform.machine()}. "
        "`python -m benchmarks.which_rule`.",
        "",
        "| rule | reads | Δm % | learning rate |",
        "|---|---|---:|---:|",
    ]
    best = max(drawn, key=lambda row: row.tuned, default=None)
    for row in sorted(found, key=lambda row: -row.mean):
        if row in drawn and row is not best:
            continue
        name = f"best of {len(drawn)} random fixed weights" if row is best else f"`{row.entry}`"
        needs = "nothing" if row is best else RULES[row.entry].needs.name.lower()
        lines.append(f"| {name} | {needs} | {row.mean:+.1f} ± {row.error:.1f} | {row.rate:g} |")
    if drawn:
        means = sorted(row.mean for row in drawn)
        lines += [
            "",
            f"Random fixed weights, {len(drawn)} draws: Δm from {means[0]:+.1f} to {means[-1]:+.1f}, "
            f"median {statistics.median(means):+.1f}.",
        ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rules", nargs="*", default=sorted(RULES), choices=sorted(RULES))
    parser.add_argument("--random", type=int, default=16, help="draws of fixed weights")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    entries = [*arguments.rules, *(f"{RANDOM}{draw}" for draw in range(arguments.random))]
    found = list(rows(Trainings.at(arguments.out / "which_rule.json"), entries))
    (arguments.out / "which_rule.md").write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
