"""Trainings of recipes for tables. Results are kept in a JSON file: an interrupted benchmark goes on."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.tables import facts
from mtl_dist.recipes import Batch, BatchData, Recipe
from mtl_dist.tracking import Row
from mtl_dist.training.batches import StepBatches
from mtl_dist.training.evaluate import eval_row

EVAL_BATCH = 500


@dataclass(frozen=True)
class Schedule:
    """How long a training is."""

    steps: int
    batch: int


@dataclass(frozen=True)
class Plan(Schedule):
    """What all trainings of a table have in common. There is no weight decay."""

    learning_rate: float


class Trial:
    """A model with initial parameters that follow from the seed, and its optimizer."""

    def __init__(
        self,
        recipe: Recipe,
        balancer: nn.Module,
        learning_rate: float,
        seed: int,
        optimizer_class: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    ) -> None:
        torch.manual_seed(seed)
        self.recipe, self.balancer = recipe, balancer
        self.model = recipe.model(balancer)
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = optimizer_class(parameters, learning_rate, weight_decay=0.0)

    def step(self, batch: Batch) -> None:
        """One ordinary step."""
        self.model(**batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def sums(self, data: BatchData, indices: Sequence[int]) -> Tensor:
        """What the model returns in eval mode, for these samples. Its mode is restored."""
        was_training = self.model.training
        self.model.eval()
        parts = [indices[start : start + EVAL_BATCH] for start in range(0, len(indices), EVAL_BATCH)]
        first, *others = (self.model(**data.__getitems__(part)) for part in parts)
        self.model.train(was_training)
        return sum(others, first)

    def validate(self, data: BatchData, indices: Sequence[int] | None = None) -> Row:
        """`eval/...` of these samples, or of all."""
        return eval_row(self.sums(data, range(len(data)) if indices is None else indices), self.recipe)


def trained(
    recipe: Recipe,
    balancer: nn.Module,
    data: tuple[BatchData, BatchData],
    plan: Plan,
    seed: int,
    optimizer_class: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
) -> tuple[nn.Module, Row]:
    """Runs one training. Returns the model in eval mode, and its validation row with `cpu_ms`.

    `cpu_ms` is the median processor time of a step on one core, in milliseconds: on a machine that others use
    too, it says more than a clock.
    """
    samples, validation = data
    trial = Trial(recipe, balancer, plan.learning_rate, seed, optimizer_class)
    times = []
    for indices in StepBatches(len(samples), plan.batch, seed, 0, plan.steps):
        batch = samples.__getitems__(indices)
        before = time.process_time()
        trial.step(batch)
        times.append(1e3 * (time.process_time() - before))
    trial.model.eval()
    return trial.model, {**trial.validate(validation), "cpu_ms": statistics.median(times)}


class Store:
    """Results by name, in a JSON file beside what they were made with. Others than those are thrown away.

    A store that is only read makes no result, and raises a KeyError for one that it does not have.
    """

    def __init__(
        self, path: Path, plan: Schedule, setting: Mapping[str, Any], only_read: bool = False
    ) -> None:
        self.path, self.only_read = path, only_read
        self.setting = {**asdict(plan), **setting}
        before = json.loads(path.read_text()) if path.exists() else {}
        self.results: dict[str, Any] = before["results"] if before.get("setting") == self.setting else {}
        self.facts: dict[str, Any] = before.get("facts", facts()) if self.results else facts()

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """The result of this name; made and written if there is none yet."""
        if name not in self.results and self.only_read:
            raise KeyError(f"{self.path} has no result {name!r}: run the benchmark that writes it")
        if name not in self.results:
            start = time.perf_counter()
            self.results[name] = make()
            print(name, self.results[name], f"{time.perf_counter() - start:.0f} s", flush=True)
            whole = {"setting": self.setting, "facts": self.facts, "results": self.results}
            self.path.write_text(json.dumps(whole, indent=1) + "\n")
        return self.results[name]

    def made_with(self) -> str:
        """Date and machine, in one sentence."""
        f = self.facts
        return f"{f['date']}, {f['processor']} (one core), Python {f['python']}, torch {f['torch']}."


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def decimals(error: float) -> int:
    """How many decimals say something beside this standard error: its first digit, and at least one."""
    return max(1, -math.floor(math.log10(error))) if error > 0 else 1


def cell(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± standard error."""
    mean, error = mean_and_error(values)
    return f"{mean:.{digits}f} ± {error:.{digits}f}"
