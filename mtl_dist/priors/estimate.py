"""Initial and prior losses of all tasks, from one pass over a data loader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from mtl_dist.priors._base import LabelStatistics, synchronize

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Priors:
    """The losses for `InitialLoss(losses=priors.initial)` and `PriorLoss(losses=priors.prior)`.

    Attributes:
        initial: task -> loss of a model that knows nothing.
        prior: task -> loss of the best constant prediction; 0 if all labels are the same.
        counts: task -> number of labels.
    """

    initial: dict[str, float]
    prior: dict[str, float]
    counts: dict[str, int]

    @classmethod
    def of(cls, statistics: Mapping[str, LabelStatistics]) -> Priors:
        """The losses that follow from `statistics` (task -> label statistics).

        Raises:
            ValueError: a task has no labels, or labels that are out of range or not finite; the message names
                the task.
        """
        for task, one in statistics.items():
            try:
                one._checked()
            except ValueError as error:
                raise ValueError(f"task {task!r}: {error}") from None
        return cls(
            initial={task: one.initial_loss for task, one in statistics.items()},
            prior={task: one.prior_loss for task, one in statistics.items()},
            counts={task: one.count for task, one in statistics.items()},
        )


def estimate_priors(
    loader: Iterable[Batch],
    losses: Mapping[str, LabelStatistics],
    *,
    labels: Callable[[Batch], Mapping[str, Tensor | None]],
    group: ProcessGroup | None = None,
) -> Priors:
    """Initial and prior loss of every task, from one pass over `loader` on each rank.

        priors = estimate_priors(
            loader,
            {"left": Categorical(10), "sum": Regression()},
            labels=lambda batch: {"left": batch["left"], "sum": batch["sum"]},
        )
        balancer = Balancer(["left", "sum"], weighting=PriorLoss(losses=priors.prior))

    If the loader is sharded over ranks, the result covers all shards and is the same on every rank. If a
    distributed sampler repeats samples to fill its shards, those samples count twice. If every rank reads the
    same data, the result is the same as on one rank. `itertools.islice(loader, k)` estimates from k batches.

    Args:
        loader: batches. Ranks may have different numbers of batches, or none.
        losses: task -> definition of its loss. They are not modified; labels that they already have do not
            count.
        labels: a function from a batch to task -> labels. None, or no entry: the task has no labels there.
        group: the data-parallel ranks; None for all. The call is a collective: call it on every rank.

    Raises:
        ValueError: there is no task, a task has no labels or labels out of range, or ranks have different
            tasks (on every rank); labels belong to an unknown task or have a wrong shape (on this rank).
    """
    if not losses:
        raise ValueError("losses must name at least one task, got none")
    statistics = {task: loss.empty() for task, loss in losses.items()}
    for batch in loader:
        for task, values in labels(batch).items():
            if task not in statistics:
                raise ValueError(f"got labels for {task!r}; the tasks are {list(statistics)}")
            if values is not None:
                statistics[task].update(values)
    return Priors.of(synchronize(statistics, group))
