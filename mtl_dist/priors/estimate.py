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
    """What `InitialLoss(losses=priors.initial)` and `PriorLoss(losses=priors.prior)` take.

    Attributes:
        initial: loss of a model that knows nothing, by task.
        prior: loss of the best constant prediction, by task; 0 where all labels are the same.
        counts: number of labels behind them, by task.
    """

    initial: dict[str, float]
    prior: dict[str, float]
    counts: dict[str, int]

    @classmethod
    def of(cls, statistics: Mapping[str, LabelStatistics]) -> Priors:
        """The losses that `statistics`, by task name, give.

        Raises:
            ValueError: a task has no labels, or labels out of range or not finite; the message names it.
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
    """Initial and prior loss of every task, from one pass over `loader` on every rank.

        priors = estimate_priors(
            loader,
            {"left": Categorical(10), "sum": Regression()},
            labels=lambda batch: {"left": batch["left"], "sum": batch["sum"]},
        )
        balancer = Balancer(["left", "sum"], weighting=PriorLoss(losses=priors.prior))

    Where the loader is sharded over ranks, the result is that of all shards, the same on every rank; samples
    that a distributed sampler repeats to fill its shards count twice. Where every rank reads the same data,
    so is the result of one. `itertools.islice(loader, k)` estimates from k batches.

    Args:
        loader: batches; ranks may have different numbers of them, or none.
        losses: how each task's loss is defined; not modified, labels they already hold do not count.
        labels: the tasks' labels in a batch; None, or no entry, where a task has none.
        group: the data-parallel ranks; None for all. The call is a collective.

    Raises:
        ValueError: no task, labels for an unknown task, a task without labels, labels of a wrong shape or
            out of range, or ranks with different tasks; on every rank, but for unknown tasks and shapes.
    """
    if not losses:
        raise ValueError("losses must name at least one task, got none")
    statistics = {task: loss.empty() for task, loss in losses.items()}
    for batch in loader:
        for task, values in labels(batch).items():
            if task not in statistics:
                raise ValueError(f"labels were given for {task!r}; the tasks are {list(statistics)}")
            if values is not None:
                statistics[task].update(values)
    return Priors.of(synchronize(statistics, group))
