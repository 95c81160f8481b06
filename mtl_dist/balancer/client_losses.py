"""A client's own dictionary of losses: entries that are no losses, and fixed weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClientLosses:
    """Reads the losses of a client: leaves out what is no task, and multiplies by the client's weights.

    Attributes:
        ignore: names in the client's dictionary that are no tasks.
        base: the client's weight of each task, in task order; None: 1.
        tasks: the n task names.
    """

    ignore: frozenset[str]
    base: tuple[float, ...] | None
    tasks: tuple[str, ...]

    @classmethod
    def checked(
        cls, tasks: Sequence[str], ignore: Collection[str], base: Mapping[str, float] | None
    ) -> ClientLosses:
        """Raises `ValueError` for an ignored task, and for weights that are not those of the tasks."""
        names = frozenset(
            ignore if isinstance(ignore, Iterable) and not isinstance(ignore, str) else [ignore]
        )
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"ignore= must hold names, got {ignore!r}")
        if both := sorted(names & set(tasks)):
            raise ValueError(f"ignore= holds {both}, which are tasks: take them out of one of the two")
        if base is None:
            return cls(names, None, tuple(tasks))
        if not isinstance(base, Mapping):
            raise ValueError(f"base= must be a mapping from task to weight, got {base!r}")
        given = {name: weight for name, weight in base.items() if name not in names}
        if set(given) != set(tasks):
            raise ValueError(
                f"base= must give one weight for each task {list(tasks)}, got {sorted(given)}: name in "
                "ignore= what is no task"
            )
        if not all(_is_positive(weight) for weight in given.values()):
            raise ValueError(
                f"base= must hold finite numbers > 0, got {given}: a loss of weight 0 is no task, so name it "
                "in ignore="
            )
        return cls(names, tuple(float(given[task]) for task in tasks), tuple(tasks))

    def read(
        self, features: Any, heads: Any, counts: Any, task_ids: Any
    ) -> tuple[Any, Any, Mapping[str, Any] | None]:
        """Features, heads and counts as the balancer takes them, from those of the client.

        What has the wrong type stays as it is: the balancer refuses it in words.
        """
        if isinstance(counts, Mapping):
            counts = {task: count for task, count in counts.items() if task not in self.ignore}
        if task_ids is not None:
            if heads is None:
                return self._of_samples(task_ids, features), heads, counts
            return features, _then(heads, partial(self._of_samples, task_ids)), counts
        if heads is None:
            return self.losses(features), heads, counts
        if isinstance(heads, Mapping):
            named = {task: head for task, head in heads.items() if task not in self.ignore}
            return features, {t: _then(h, partial(self._weighted, t)) for t, h in named.items()}, counts
        return features, _then(heads, self.losses), counts

    def losses(self, given: Any) -> Any:
        """A mapping of losses without what is no task, times the client's weights."""
        if not isinstance(given, Mapping):
            return given
        return {task: self._weighted(task, loss) for task, loss in given.items() if task not in self.ignore}

    def _weighted(self, task: str, loss: Any) -> Any:
        if self.base is None or not isinstance(loss, Tensor) or task not in self.tasks:
            return loss
        return loss * self.base[self.tasks.index(task)]

    def _of_samples(self, task_ids: Any, losses: Any) -> Any:
        if self.base is None or not isinstance(losses, Tensor) or not isinstance(task_ids, Tensor):
            return losses
        if losses.shape[: task_ids.dim()] != task_ids.shape or task_ids.is_floating_point():
            return losses
        ids = task_ids.to(losses.device, torch.int64, non_blocking=True)
        # ids out of range are refused later, where they count
        base = torch.tensor(self.base, dtype=losses.dtype).to(losses.device, non_blocking=True)
        weights = base[ids.clamp(0, len(self.base) - 1)]
        return losses * weights.reshape(*ids.shape, *[1] * (losses.dim() - ids.dim()))


def _then(head: Any, follow: Callable[[Any], Any]) -> Any:
    return (lambda features: follow(head(features))) if callable(head) else head


def _is_positive(weight: Any) -> bool:
    try:
        return not isinstance(weight, (bool, str)) and 0 < float(weight) < math.inf
    except (TypeError, ValueError, OverflowError):
        return False
