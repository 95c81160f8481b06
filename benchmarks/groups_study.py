"""Does training by groups help? What the studies with known groups have in common.

`grouping.py` and `grouping_census.py` say which tasks there are and how they are made. Every variant trains
with every learning rate of the grid. Validation data choose the rate for all seeds together, and test data
give the result: the mean over the tasks of the error that is left, as a part of that of the best constant,
and Δm against one network per task, with as many features for itself.

`found` are the groups that `find_groups` makes from the cosines of the first run of the seed with equal
weights, `wrong` are two groups of half true members each, `split` is one network per group.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.tables import RESULTS, facts
from mtl_dist import Balancer
from mtl_dist.grouping import Affinities, find_groups
from mtl_dist.probes import FeatureProbe, ParameterProbe, Probe
from mtl_dist.weighting import MGDA, Equal, Grouped, InverseGradNorm, Rule

Groups = Mapping[str, tuple[str, ...]]
Part = tuple[Tensor, ...]  # what the trunk takes, `[N, ...]` each, and at last the targets `[N, tasks]`
Runs = list[dict[str, dict[str, float]]]  # of each seed: "validation" or "test" -> task -> error


@dataclass(frozen=True)
class Data:
    """Samples for training, validation and test."""

    train: Part
    validation: Part
    test: Part


class Net(nn.Module):
    """A trunk, and a linear head per task.

    Args:
        trunk: from the inputs to `[N, features]`.
        features: number of features.
        tasks: that have a head.
    """

    def __init__(self, trunk: nn.Module, features: int, tasks: Iterable[str]) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleDict({task: nn.Linear(features, 1) for task in tasks})


class Study(ABC):
    """Tasks in known groups.

    Attributes:
        name: of the module and of its results.
        true: the two known groups. Their tasks are all tasks, in the order of the columns of the targets.
        rates: learning rates; groups are looked for with the second one.
        batch: number of samples of a step.
        left: what is left of the error, for the head of the table.
        extra: name of a second measure, the higher the better; None: there is none.
        gram: rules that read the Gram matrix, by name: without groups, and between them.
    """

    name: ClassVar[str]
    true: ClassVar[Groups]
    rates: ClassVar[tuple[float, ...]]
    batch: ClassVar[int]
    left: ClassVar[str]
    extra: ClassVar[str | None] = None
    gram: ClassVar[Mapping[str, Rule]] = {"mgda": MGDA()}

    @property
    def tasks(self) -> tuple[str, ...]:
        """All of them, group by group."""
        return tuple(task for group in self.true.values() for task in group)

    @property
    def wrong(self) -> Groups:
        """Two groups that tear both true ones apart."""
        return {"first": self.tasks[::2], "second": self.tasks[1::2]}

    @abstractmethod
    def draw(self, seed: int) -> Data:
        """The samples of a seed."""

    @abstractmethod
    def net(self, tasks: tuple[str, ...]) -> Net:
        """A new network."""

    @abstractmethod
    def loss(self, task: str, output: Tensor, target: Tensor) -> Tensor:
        """The loss of a task, from its `[B]` outputs and targets."""

    @abstractmethod
    def error(self, output: Tensor, target: Tensor) -> float:
        """The error that is left of `[N]` outputs, divided by that of the best constant."""

    def second(self, output: Tensor, target: Tensor) -> float:
        """The measure `extra`."""
        raise NotImplementedError

    def of_task(self, targets: Tensor, task: str) -> Tensor:
        """`[N]`, its targets."""
        return targets[:, self.tasks.index(task)]

    @torch.no_grad()
    def measured(self, net: Net, part: Part, how: Callable[[Tensor, Tensor], float]) -> dict[str, float]:
        """A measure of each task that the network has."""
        *inputs, targets = part
        z = net.trunk(*inputs)
        return {task: how(head(z)[:, 0], self.of_task(targets, task)) for task, head in net.heads.items()}


def train(
    study: Study, tasks: tuple[str, ...], rule: Rule, data: Data, rate: float, seed: int, steps: int,
    probe: Probe | None = None,
) -> tuple[Net, Affinities]:  # fmt: skip
    """A trained network, and the affinities of its tasks over the run."""
    torch.manual_seed(seed)
    net, balancer = study.net(tasks), Balancer(tasks, rule, probe=probe)
    optimizer = torch.optim.Adam(net.parameters(), lr=rate)
    rng, size = torch.Generator().manual_seed(seed), len(data.train[-1])
    cosines, norms, losses = [], [], []
    for _ in range(steps):
        index = torch.randint(size, (study.batch,), generator=rng)
        *inputs, y = (field[index] for field in data.train)

        def head(task: str, y: Tensor = y) -> Callable[[Tensor], Tensor]:
            return lambda z: study.loss(task, net.heads[task](z)[:, 0], study.of_task(y, task))

        optimizer.zero_grad()
        balancer(net.trunk(*inputs), {task: head(task) for task in tasks}).backward()
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


def variants(study: Study, found: Groups) -> dict[str, list[tuple[tuple[str, ...], Rule]]]:
    """Name -> the networks that it trains: tasks and rule of each."""
    plain: dict[str, Rule] = {"equal": Equal(), "inverse_grad_norm": InverseGradNorm(), **study.gram}
    grouped: dict[str, Rule] = {}
    known = {"true": study.true, "found": found, "wrong": study.wrong}
    for name, groups in known.items():
        grouped[f"equal inside, norms between, {name}"] = Grouped(Equal(), InverseGradNorm(), groups)
        for between, rule in study.gram.items():
            grouped[f"norms inside, {between} between, {name}"] = Grouped(InverseGradNorm(), rule, groups)
    joint = {name: [(study.tasks, rule)] for name, rule in (plain | grouped).items()}
    split = {
        f"split, {name}": [(tasks, InverseGradNorm()) for tasks in groups.values()]
        for name, groups in known.items()
    }
    return {"single": [((task,), Equal()) for task in study.tasks]} | joint | split


def find(
    study: Study, data: Data, seed: int, steps: int, probe: Probe | None = None
) -> tuple[Groups, Affinities]:
    """Groups of a run whose weights are equal. A rule that reads the Gram makes the balancer measure it."""
    equal = Grouped(Equal(), MGDA(), {"all": study.tasks})
    _, affinities = train(study, study.tasks, equal, data, study.rates[1], seed, steps, probe)
    groups, _ = find_groups(affinities.links())
    return {f"found{k}": tuple(study.tasks[i] for i in group) for k, group in enumerate(groups)}, affinities


def where(study: Study, seeds: int, steps: int) -> dict[str, list[dict[str, object]]]:
    """Place of the measurement -> of each seed: groups found, mean cosines inside and between true groups."""
    places: dict[str, Probe] = {"features": FeatureProbe(), "parameters": ParameterProbe()}
    number = len(next(iter(study.true.values())))
    true = tuple(range(number)), tuple(range(number, len(study.tasks)))
    result: dict[str, list[dict[str, object]]] = {place: [] for place in places}
    for place, probe in places.items():
        for seed in range(seeds):
            found, affinities = find(study, study.draw(seed), seed, steps, probe)
            inside, between = (affinities.agreement(true, inside=inside) for inside in (True, False))
            result[place].append(
                {"groups": [*map(list, found.values())], "inside": inside.cosine, "between": between.cosine}
            )
    return result


def measure(study: Study, seeds: int, steps: int, file: Path) -> dict[str, Any]:
    """`errors[variant][rate][seed][task]` on validation and test data, and the groups found.

    Every seed is written to `file` when it is done. A study that was interrupted or had fewer seeds goes on.
    """
    measured: dict[str, Any] = {"facts": facts(), "seconds": 0.0, "steps": steps, "errors": {}}
    done = 0
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        known = len(next(iter(before["errors"]["single"].values())))
        if before["steps"] == steps and (known < seeds or "where" not in before):
            measured, done = before, known
    errors: dict[str, dict[str, Runs]] = measured["errors"]
    for seed in range(done, seeds):
        start = time.process_time()
        data = study.draw(seed)
        found, _ = find(study, data, seed, steps)
        for name, networks in variants(study, found).items():
            for rate in study.rates:
                result: dict[str, dict[str, float]] = {"validation": {}, "test": {}, "extra": {}}
                for tasks, rule in networks:
                    net, _ = train(study, tasks, rule, data, rate, seed, steps)
                    result["validation"] |= study.measured(net, data.validation, study.error)
                    result["test"] |= study.measured(net, data.test, study.error)
                    if study.extra is not None:
                        result["extra"] |= study.measured(net, data.test, study.second)
                errors.setdefault(name, {}).setdefault(f"{rate:g}", []).append(result)
        measured["seconds"] += time.process_time() - start
        file.write_text(json.dumps(measured) + "\n", encoding="utf-8")
    start = time.process_time()
    measured["where"] = where(study, seeds, steps)
    measured["seconds"] += time.process_time() - start
    file.write_text(json.dumps(measured) + "\n", encoding="utf-8")
    return measured


def table(study: Study, measured: dict[str, Any]) -> str:
    """The table, best first."""
    errors, places = measured["errors"], measured.get("where", {})
    rows = []
    single = _best(errors["single"])[1]
    for name, by_rate in errors.items():
        rate, chosen = _best(by_rate)
        means = [statistics.mean(run["test"].values()) for run in chosen]
        deltas = [
            100 * statistics.mean(run["test"][task] / alone["test"][task] - 1 for task in study.tasks)
            for run, alone in zip(chosen, single, strict=True)
        ]
        cells = [f"{statistics.mean(means):.4f} ± {_error(means):.4f}"]
        cells += [f"{value:.4f}" for value in _by_group(study, chosen, "test")]
        cells.append(f"{statistics.mean(deltas):+.1f} ± {_error(deltas):.1f}")
        if study.extra is not None:
            cells += [f"{value:.4f}" for value in _by_group(study, chosen, "extra")]
        rows.append((statistics.mean(means), f"| {' | '.join((name, rate, *cells))} |"))
    f = measured["facts"]
    heads = ["variant", "rate", study.left, *(f"group {name}" for name in study.true), "Δm, %"]
    if study.extra is not None:
        heads += [f"{study.extra}, group {name}" for name in study.true]
    lines = [
        f"`python -m benchmarks.{study.name}`, {f['date']}: {measured['steps']} steps of Adam, batches of "
        f"{study.batch}, {len(single)} seeds, {measured['seconds']:.0f} s of one core of {f['processor']}, "
        f"torch {f['torch']}. ± is the standard error over seeds. Lower is better"
        f"{f', but for the {study.extra}' if study.extra else ''}.",
        "",
        f"| {' | '.join(heads)} |",
        f"|---|{'--:|' * (len(heads) - 1)}",
        *(line for _, line in sorted(rows)),
        "",
        "Groups that `find_groups` makes from a run with equal weights:",
        "",
        "| cosines of gradients at the | true groups found | mean cosine inside true groups | between them |",
        "|---|--:|--:|--:|",
    ]
    for place, seen in places.items():
        right = sum(sorted(run["groups"]) == sorted(map(list, study.true.values())) for run in seen)
        inside, between = (statistics.mean(run[where] for run in seen) for where in ("inside", "between"))
        lines.append(f"| {place} | {right} of {len(seen)} | {inside:+.3f} | {between:+.3f} |")
    return "\n".join(lines) + "\n"


def _best(by_rate: dict[str, Runs]) -> tuple[str, Runs]:
    """The rate with the least mean error on validation data, and its runs."""
    return min(
        by_rate.items(),
        key=lambda item: statistics.mean(error for run in item[1] for error in run["validation"].values()),
    )


def _by_group(study: Study, chosen: Runs, kind: str) -> list[float]:
    return [
        statistics.mean(run[kind][task] for run in chosen for task in group) for group in study.true.values()
    ]


def _error(values: list[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def main(study: Study, description: str, steps: int) -> None:
    """Measures, and writes the results as JSON and as a table."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / f"{study.name}.json"
    text = table(study, measure(study, arguments.seeds, arguments.steps, file))
    (arguments.out / f"{study.name}.md").write_text(text, encoding="utf-8")
    print(text)
