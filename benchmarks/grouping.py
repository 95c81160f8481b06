"""Does training by groups help? Eight regressions with two known groups on one narrow trunk.

    python -m benchmarks.grouping            # minutes on two cores

The tasks of a group are similar combinations of four features of their group, with noise. The trunk has
half as many features as the two groups need together, so the groups compete for it. The losses of the
second group are ten times as large. Every variant trains with every learning rate of the grid; validation
data choose the rate for all seeds together, and test data give the result: the mean over the tasks of the
error that is left, as part of the variance, and Δm against one network per task, with as many features for
itself.

`found` are the groups that `find_groups` makes from the cosines of the first run of the seed with equal
weights, `wrong` are two groups of half true members each, `split` is one network per group.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.tables import RESULTS, facts
from mtl_dist import Balancer
from mtl_dist.grouping import Affinities, find_groups
from mtl_dist.probes import FeatureProbe, ParameterProbe, Probe
from mtl_dist.weighting import MGDA, Equal, Grouped, InverseGradNorm, Rule, UPGrad

TASKS = tuple(f"{group}{number}" for group in "ab" for number in range(4))
TRUE = {"a": TASKS[:4], "b": TASKS[4:]}
WRONG = {"first": TASKS[::2], "second": TASKS[1::2]}
RATES = (1e-3, 3e-3, 1e-2)
INPUTS, FEATURES, WIDTH = 12, 4, 64
NOISE, SCALE = 0.3, 10.0  # of the targets; of the losses of group b
OWN = 0.7  # size of the part of a task that the others of its group do not have
Groups = dict[str, tuple[str, ...]]
Runs = list[dict[str, dict[str, float]]]  # of each seed: "validation" or "test" -> task -> error


@dataclass(frozen=True)
class Data:
    """Inputs `[N, 12]` and targets `[N, 8]` for training, validation and test."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @classmethod
    def draw(cls, seed: int) -> Data:
        """A new problem for each seed."""
        rng = torch.Generator().manual_seed(1000 + seed)
        first = torch.randn(2, INPUTS, FEATURES, generator=rng) / INPUTS**0.5 * 1.5
        # the tasks of a group have a common part, so their gradients agree
        own, common = (torch.randn(2, FEATURES, num, generator=rng) for num in (4, 1))
        second = (common + OWN * own) / FEATURES**0.5

        def draw(num: int) -> tuple[Tensor, Tensor]:
            x = torch.randn(num, INPUTS, generator=rng)
            y = torch.cat([torch.tanh(x @ a) @ b for a, b in zip(first, second, strict=True)], 1)
            return x, y + NOISE * torch.randn(y.shape, generator=rng)

        return cls(draw(512), draw(1024), draw(4096))


class Net(nn.Module):
    """A trunk with few features, and a linear head per task."""

    def __init__(self, tasks: Iterable[str], features: int = FEATURES) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.Tanh(), nn.Linear(WIDTH, features), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(features, 1) for task in tasks})

    def errors(self, x: Tensor, y: Tensor) -> dict[str, float]:
        """Of each task: mean squared error divided by the variance of the target."""
        with torch.no_grad():
            z = self.trunk(x)
            return {
                task: float((head(z)[:, 0] - of_task(y, task)).square().mean() / of_task(y, task).var())
                for task, head in self.heads.items()
            }


def of_task(y: Tensor, task: str) -> Tensor:
    """`[N]`, its targets."""
    return y[:, TASKS.index(task)]


def train(
    tasks: tuple[str, ...],
    rule: Rule,
    data: Data,
    rate: float,
    seed: int,
    steps: int,
    probe: Probe | None = None,
) -> tuple[Net, Affinities]:
    """A trained network, and the affinities of its tasks over the run."""
    torch.manual_seed(seed)
    net, balancer = Net(tasks), Balancer(tasks, rule, probe=probe)
    optimizer = torch.optim.Adam(net.parameters(), lr=rate)
    rng, (inputs, targets) = torch.Generator().manual_seed(seed), data.train
    cosines, norms, losses = [], [], []
    for _ in range(steps):
        index = torch.randint(len(inputs), (64,), generator=rng)
        y = targets[index]

        def head(task: str, y: Tensor = y) -> Callable[[Tensor], Tensor]:
            scale = SCALE if task in TRUE["b"] else 1.0
            return lambda z: scale * (net.heads[task](z)[:, 0] - of_task(y, task)).square().mean()

        optimizer.zero_grad()
        balancer(net.trunk(inputs[index]), {task: head(task) for task in tasks}).backward()
        optimizer.step()
        report = balancer.report
        if report.cosines is not None:
            cosines.append(report.cosines.numpy())
            norms.append([*report.grad_norms.values()])
            losses.append([*report.losses.values()])
    n = len(tasks)
    empty = np.zeros((0, n, n)), np.zeros((0, n)), np.zeros((0, n))
    recorded = (np.array(cosines), np.array(norms), np.array(losses)) if cosines else empty
    return net, Affinities.measure(tasks, *recorded)


def variants(found: Groups) -> dict[str, list[tuple[tuple[str, ...], Rule]]]:
    """Name -> the networks that it trains: tasks and rule of each."""
    plain: dict[str, Rule] = {
        "equal": Equal(),
        "inverse_grad_norm": InverseGradNorm(),
        "mgda": MGDA(),
        "upgrad": UPGrad(),
    }
    grouped: dict[str, Rule] = {}
    for name, groups in (("true", TRUE), ("found", found), ("wrong", WRONG)):
        grouped |= {
            f"equal inside, norms between, {name}": Grouped(Equal(), InverseGradNorm(), groups),
            f"norms inside, upgrad between, {name}": Grouped(InverseGradNorm(), UPGrad(), groups),
            f"norms inside, mgda between, {name}": Grouped(InverseGradNorm(), MGDA(), groups),
        }
    joint = {name: [(TASKS, rule)] for name, rule in (plain | grouped).items()}
    split = {
        f"split, {name}": [(tasks, rule) for tasks in groups.values()]
        for name, groups, rule in (
            ("true", TRUE, InverseGradNorm()),
            ("found", found, InverseGradNorm()),
            ("wrong", WRONG, InverseGradNorm()),
        )
    }
    return {"single": [((task,), Equal()) for task in TASKS]} | joint | split


def find(data: Data, seed: int, steps: int, probe: Probe | None = None) -> tuple[Groups, Affinities]:
    """Groups of a run whose weights are equal. A rule that reads the Gram makes the balancer measure it."""
    equal = Grouped(Equal(), MGDA(), {"all": TASKS})
    _, affinities = train(TASKS, equal, data, RATES[1], seed, steps, probe)
    groups, _ = find_groups(affinities.links())
    return {f"found{k}": tuple(TASKS[i] for i in group) for k, group in enumerate(groups)}, affinities


def where(seeds: int, steps: int) -> dict[str, list[dict[str, object]]]:
    """Place of the measurement -> of each seed: groups found, mean cosines inside and between true groups."""
    places: dict[str, Probe] = {"features": FeatureProbe(), "parameters": ParameterProbe()}
    result: dict[str, list[dict[str, object]]] = {place: [] for place in places}
    for place, probe in places.items():
        for seed in range(seeds):
            found, affinities = find(Data.draw(seed), seed, steps, probe)
            inside, between = (
                affinities.agreement(((0, 1, 2, 3), (4, 5, 6, 7)), inside=inside) for inside in (True, False)
            )
            result[place].append(
                {"groups": [*map(list, found.values())], "inside": inside.cosine, "between": between.cosine}
            )
    return result


def measure(seeds: int, steps: int) -> dict[str, object]:
    """`errors[variant][rate][seed][task]` on validation and test data, and the groups found."""
    errors: dict[str, dict[str, Runs]] = {}
    start = time.perf_counter()
    for seed in range(seeds):
        data = Data.draw(seed)
        found, _ = find(data, seed, steps)
        for name, networks in variants(found).items():
            for rate in RATES:
                result: dict[str, dict[str, float]] = {"validation": {}, "test": {}}
                for tasks, rule in networks:
                    net, _ = train(tasks, rule, data, rate, seed, steps)
                    result["validation"] |= net.errors(*data.validation)
                    result["test"] |= net.errors(*data.test)
                errors.setdefault(name, {}).setdefault(f"{rate:g}", []).append(result)
    return {
        "facts": facts(),
        "seconds": time.perf_counter() - start,
        "steps": steps,
        "where": where(seeds, steps),
        "errors": errors,
    }


def table(measured: dict[str, object]) -> str:
    """The table, best first."""
    errors, places = measured["errors"], measured["where"]
    assert isinstance(errors, dict)
    assert isinstance(places, dict)
    rows = []
    single = _best(errors["single"])[1]
    for name, by_rate in errors.items():
        rate, chosen = _best(by_rate)
        means = [statistics.mean(run["test"].values()) for run in chosen]
        halves = [statistics.mean(run["test"][task] for run in chosen for task in TRUE[g]) for g in "ab"]
        deltas = [
            100 * statistics.mean(run["test"][task] / alone["test"][task] - 1 for task in TASKS)
            for run, alone in zip(chosen, single, strict=True)
        ]
        rows.append((statistics.mean(means), name, rate, halves, deltas, means))
    seeds = len(rows[0][4])
    lines = [
        f"{measured['steps']} steps of Adam, batches of 64, {seeds} seeds, {measured['seconds']:.0f} s. "
        "± is the standard error over seeds.",
        "",
        "| variant | rate | error left | group a | group b | Δm, % |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for mean, name, rate, (a, b), deltas, means in sorted(rows):
        lines.append(
            f"| {name} | {rate} | {mean:.4f} ± {_error(means):.4f} | {a:.4f} | {b:.4f} "
            f"| {statistics.mean(deltas):+.1f} ± {_error(deltas):.1f} |"
        )
    lines += [
        "",
        "Groups that `find_groups` makes from a run with equal weights:",
        "",
        "| cosines of gradients at the | true groups found | mean cosine inside true groups | between them |",
        "|---|--:|--:|--:|",
    ]
    for place, seen in places.items():
        right = sum(sorted(run["groups"]) == sorted(map(list, TRUE.values())) for run in seen)
        inside, between = (statistics.mean(run[where] for run in seen) for where in ("inside", "between"))
        lines.append(f"| {place} | {right} of {len(seen)} | {inside:+.3f} | {between:+.3f} |")
    return "\n".join(lines) + "\n"


def _best(by_rate: dict[str, Runs]) -> tuple[str, Runs]:
    """The rate with the least mean error on validation data, and its runs."""
    return min(
        by_rate.items(),
        key=lambda item: statistics.mean(error for run in item[1] for error in run["validation"].values()),
    )


def _error(values: list[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def main() -> None:
    """Measures, and writes `grouping.json` and `grouping.md`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    measured = measure(arguments.seeds, arguments.steps)
    text = table(measured)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "grouping.json").write_text(json.dumps(measured) + "\n", encoding="utf-8")
    (arguments.out / "grouping.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
