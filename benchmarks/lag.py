"""Does a lag hurt? Every rule with lag 0 and lag 1, on multi_digits and text_mixture.

    nice -n 19 python -m benchmarks.lag                                 # everything, one core: hours
    nice -n 19 python -m benchmarks.lag --data multi_digits --seeds 0 1 --rules equal mgda

For one seed, both trainings of a rule have the same data, order and initial parameters, and one learning rate
for all. Multi-Digits: Δm % against each task alone, as in `which_rule.py` (higher is better). Text mixture:
mean bits per byte (lower is better). The difference is lag 1 minus lag 0 with the same seed, with its
standard error over seeds. An interrupted run continues when it is started again. Writes
`benchmarks/results/lag.{md,json}`.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.data_sets import DATA_SETS, Metrics
from mtl_dist import RULES

RESULTS = Path(__file__).parent / "results"
LAGGED = [name for name in DATA_SETS["multi_digits"].rules if not RULES[name].own_batch]
UNITS = {"multi_digits": "Δm %", "text_mixture": "bits per byte"}
LEARNING_RATE = 3e-3
EVERYTHING = slice(None)
Values = dict[str, float | None]  # by "data/rule/lag/seed"; None: the training ended with an error


def key(data: str, rule: str, lag: int, seed: int) -> str:
    return f"{data}/{rule}/{lag}/{seed}"


def measure(data: str, rule: str, lag: int, seed: int, alone: Metrics) -> float | None:
    """The result of one training."""
    metrics = DATA_SETS[data].train(rule, LEARNING_RATE, seed, EVERYTHING, lag)
    if isinstance(metrics, str):
        return None
    return DATA_SETS[data].delta(metrics, alone) if alone else statistics.fmean(metrics.values())


def baselines(data: str, seed: int) -> Metrics:
    """The metric of each task of Multi-Digits alone."""
    data_set = DATA_SETS[data]
    found = {}
    for task, entry in zip(data_set.tasks, data_set.alone, strict=True):
        metrics = data_set.train(entry, LEARNING_RATE, seed, EVERYTHING)
        if isinstance(metrics, str):
            raise ValueError(f"lag: {task} alone cannot be trained: {metrics}")
        found[task] = metrics[task]
    return found


def table(values: Values, data: str, rules: Sequence[str], seeds: Sequence[int]) -> str:
    """One row per rule with lag 0 and 1; the largest harm is last."""
    rows = []
    for rule in rules:
        pairs = [[values.get(key(data, rule, lag, seed)) for lag in (0, 1)] for seed in seeds]
        whole = [(a, b) for a, b in pairs if a is not None and b is not None]
        if not whole:
            continue
        differences = [b - a for a, b in whole]
        error = statistics.stdev(differences) / math.sqrt(len(whole)) if len(whole) > 1 else math.nan
        means = [statistics.fmean(column) for column in zip(*whole, strict=True)]
        rows.append((statistics.fmean(differences), error, rule, means, len(whole)))
    better = -1 if data == "multi_digits" else 1
    lines = ["| rule | lag 0 | lag 1 | difference | seeds |", "|---|---:|---:|---:|---:|"]
    digits = 1 if data == "multi_digits" else 3
    for difference, error, rule, (first, second), number in sorted(rows, key=lambda row: better * row[0]):
        shown = f"{difference:+.{digits}f} ± {error:.{digits}f}"
        lines.append(f"| `{rule}` | {first:.{digits}f} | {second:.{digits}f} | {shown} | {number} |")
    return "\n".join(lines)


def page(values: Values, seeds: Sequence[int]) -> str:
    """Both tables, and the setting."""
    parts = [
        f"Each rule with `lag=0` and `lag=1`, the same seeds. AdamW at {LEARNING_RATE:g}. "
        f"{datetime.date.today()}, torch {torch.__version__}, {platform.machine()}. "
        "`python -m benchmarks.lag`."
    ]
    for data, unit in UNITS.items():
        if any(name.startswith(data) for name in values):
            better = "higher" if data == "multi_digits" else "lower"
            parts += [f"## {data}: {unit}, {better} is better", table(values, data, LAGGED, seeds)]
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", default=list(UNITS), choices=list(UNITS))
    parser.add_argument("--rules", nargs="+", default=LAGGED, choices=LAGGED)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    path = arguments.out / "lag.json"
    values: Values = json.loads(path.read_text()) if path.exists() else {}
    for data, seed in itertools.product(arguments.data, arguments.seeds):
        wanted = [
            (rule, lag)
            for rule, lag in itertools.product(arguments.rules, (0, 1))
            if key(data, rule, lag, seed) not in values
        ]
        found = baselines(data, seed) if data == "multi_digits" and wanted else {}
        for rule, lag in wanted:
            start = time.perf_counter()
            name = key(data, rule, lag, seed)
            values[name] = measure(data, rule, lag, seed, found)
            print(name, values[name], f"{time.perf_counter() - start:.1f} s", flush=True)
            path.write_text(json.dumps(values, indent=0, sort_keys=True) + "\n")
    (arguments.out / "lag.md").write_text(page(values, arguments.seeds))


if __name__ == "__main__":
    main()
