"""Rules on a mixture of texts: validation loss of each domain, over seeds.

    nice -n 19 python -m benchmarks.text_mixture                  # 5 seeds, one core: about 20 minutes
    python -m benchmarks.text_mixture --rules equal mgda --seeds 0 --steps 50 --out /tmp/here

It trains the recipe `text_mixture`: one small language model for code, docstrings, numbers and prose. Every
sequence is of one kind. `SharedLayerProbe` measures the gradients at the output head. For one seed, all rules
have the same data, order and initial parameters. All use AdamW with the same number of steps and the same
learning rate. Nothing was tuned. `tokens` is the usual loss of a language model, without this library: the
mean over tokens, in which each domain counts by its number of tokens in the batch.

The results are bits per byte on documents that are not in the training data. Lower is better. `vs equal` is
the mean over domains minus that of `equal` with the same seed, with its standard error over seeds. The mean
rank is over domains; rules are ranked by their means. Writes `text_mixture.{md,json}`. An interrupted
benchmark continues when it is started again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from mtl_dist import RULES, Balancer, SharedLayerProbe
from mtl_dist.recipes import BatchData, TextMixture
from mtl_dist.training.batches import StepBatches
from mtl_dist.training.evaluate import eval_row
from mtl_dist.weighting import Rule

RECIPE = TextMixture()
TASKS = RECIPE.tasks
BATCH = 32
TOKENS = "tokens"  # the baseline: the mean over tokens; no rule of the library computes it
CHOSEN = (
    *(TOKENS, "equal", "uncertainty", "relobralo", "inverse_grad_norm"),
    *("mgda", "imtlg", "pcgrad", "upgrad"),
)

Metrics = dict[str, float]  # bits per byte, by domain
Results = dict[str, dict[str, Metrics]]  # by rule and seed


@cache
def data(seed: int) -> tuple[BatchData, BatchData]:
    return RECIPE.data(seed)


class OverTokens(torch.nn.Module):
    """Replaces the balancer, and returns the mean over all tokens."""

    def forward(self, hidden: Tensor, losses: object, *, layer: torch.nn.Module, task_ids: Tensor) -> Tensor:
        """The mean over all tokens; arguments as of the balancer."""
        mean: Tensor = losses(layer(hidden)).mean()  # type: ignore[operator]
        return mean


def make_balancer(name: str, lag: int = 0) -> torch.nn.Module:
    """A balancer with the rule of this name (with the arguments of its example), or the baseline."""
    if name == TOKENS:
        return OverTokens()
    rule: Rule = RULES[name].example(TASKS)
    probe = SharedLayerProbe() if rule.needs.name != "LOSSES" else None
    return Balancer(TASKS, rule, probe=probe, lag=lag)


def train(name: str, seed: int, steps: int, learning_rate: float, lag: int = 0) -> Metrics:
    """Runs one training. Returns its validation metrics."""
    samples, validation = data(seed)
    torch.manual_seed(seed)
    model = RECIPE.model(make_balancer(name, lag))
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.0)
    for indices in StepBatches(len(samples), BATCH, seed, 0, steps):
        model(**samples.__getitems__(indices)).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        sums = model(**validation.__getitems__(range(len(validation))))
    row = eval_row(sums, RECIPE)
    return {task: row[f"eval/{task}/bits_per_byte"] for task in TASKS}


def table(results: Results, names: Sequence[str]) -> str:
    """One row per rule; the best mean is first."""
    means = {name: {task: mean_over(results[name], task) for task in TASKS} for name in names}
    lines = [
        f"| rule | {' | '.join(TASKS)} | mean | vs equal | mean rank |",
        "|---|" + "---:|" * (len(TASKS) + 3),
    ]
    for name in sorted(names, key=lambda name: statistics.fmean(means[name].values())):
        cells = " | ".join(f"{means[name][task]:.3f}" for task in TASKS)
        mean, rank = statistics.fmean(means[name].values()), mean_rank(means, name)
        lines.append(f"| `{name}` | {cells} | {mean:.3f} | {versus(results, name)} | {rank:.1f} |")
    return "\n".join(lines)


def mean_over(runs: Mapping[str, Metrics], task: str) -> float:
    return statistics.fmean(metrics[task] for metrics in runs.values())


def mean_rank(means: Mapping[str, Metrics], name: str) -> float:
    """Mean rank over domains. 1 is the best; equal values get the mean of their ranks."""
    ranks = []
    for task in TASKS:
        better = sum(other[task] < means[name][task] for other in means.values())
        same = sum(other[task] == means[name][task] for other in means.values())
        ranks.append(better + (same + 1) / 2)
    return statistics.fmean(ranks)


def versus(results: Results, name: str) -> str:
    """Difference from `equal` with the same seeds, with its standard error."""
    differences = [
        statistics.fmean(metrics.values()) - statistics.fmean(results["equal"][seed].values())
        for seed, metrics in results[name].items()
    ]
    if name == "equal":
        return "0"
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return f"{statistics.fmean(differences):+.3f} ± {error:.3f}"


def describe(arguments: argparse.Namespace) -> str:
    """The setting and the machine."""
    sizes = data(0)[0]
    share = torch.bincount(sizes.domains, minlength=len(TASKS)) / len(sizes)  # type: ignore[attr-defined]
    drawn = ", ".join(f"{task} {part:.0%}" for task, part in zip(TASKS, share.tolist(), strict=True))
    return (
        f"Bits per byte on held-out documents, lower is better. {arguments.steps} steps of AdamW at "
        f"{arguments.lr:g}, batches of {BATCH} sequences of {RECIPE.length} bytes ({drawn}), "
        f"{len(arguments.seeds)} seeds. {datetime.date.today()}, Python {platform.python_version()}, torch "
        f"{torch.__version__}, {platform.machine()}."
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rules", nargs="+", default=list(CHOSEN), choices=[TOKENS, *sorted(RULES)])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    names = list(dict.fromkeys(["equal", *arguments.rules]))
    path = arguments.out / "text_mixture.json"
    setting = {"steps": arguments.steps, "lr": arguments.lr, "recipe": repr(RECIPE), "batch": BATCH}
    before = json.loads(path.read_text()) if path.exists() else {}
    results: Results = before["results"] if before.get("setting") == setting else {}
    for seed in arguments.seeds:
        for name in names:
            if str(seed) in results.setdefault(name, {}):
                continue
            start = time.perf_counter()
            results[name][str(seed)] = train(name, seed, arguments.steps, arguments.lr)
            print(name, seed, results[name][str(seed)], f"{time.perf_counter() - start:.0f} s", flush=True)
            path.write_text(json.dumps({"setting": setting, "results": results}, indent=1) + "\n")
    text = f"{describe(arguments)}\n\n{table(results, names)}\n"
    (arguments.out / "text_mixture.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
