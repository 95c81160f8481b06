"""A column of the data set that holds each row's task, on its way through a collator into the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

TASK_IDS = "mtl_dist_task_ids"  # key of the task ids in a batch


class ColumnCollator:
    """A collator that takes one column out of the rows, and adds task ids to the batch.

    They have the shape `[B]`, one for each row (or pair of answers); or `[B, T]`, one for each token, where
    rows are packed or the inner collator puts all rows into one.

    Args:
        inner: the collator of the trainer.
        column: holds the task's name or index; of a packed row, a list with the index of each token.
        tasks: the n task names.
    """

    def __init__(self, inner: Callable[..., Any], column: str, tasks: Sequence[str]) -> None:
        self.inner = inner
        self._column = column
        self._tasks = tuple(tasks)

    def __getattr__(self, name: str) -> Any:
        """What else the inner collator has: trainers look at its settings."""
        if name == "inner":  # before `__init__`, as in a copy
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __call__(self, rows: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        """The batch of the inner collator, with task ids; without, if no row has the column.

        Raises:
            ValueError: rows without the column, values that are no task, or ids that do not fit the batch.
        """
        having = [row for row in rows if isinstance(row, Mapping) and self._column in row]
        if not having:
            return self.inner(rows, *args, **kwargs)
        if len(having) < len(rows):
            raise ValueError(
                f"{len(rows) - len(having)} of {len(rows)} rows of a batch have no column {self._column!r}: "
                "every row needs its task"
            )
        found = [_ids(row[self._column], self._column, self._tasks) for row in rows]
        rest = [{key: value for key, value in row.items() if key != self._column} for row in rows]
        batch = self.inner(rest, *args, **kwargs)
        batch[TASK_IDS] = _placed(found, rest, batch)
        return batch


def task_index(value: Any, column: str, tasks: Sequence[str]) -> int:
    """The index of a task that is given by its name or its index.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, str) and value in tasks:
        return tasks.index(value)
    number = value.item() if hasattr(value, "item") else value  # scalars of numpy and torch
    if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < len(tasks):
        return number
    raise ValueError(
        f"a row of the data set has {column}={value!r}: give the name or the index of one of the balancer's "
        f"tasks {list(tasks)}"
    )


def _ids(value: Any, column: str, tasks: Sequence[str]) -> int | list[int]:
    if isinstance(value, (list, tuple)) or (isinstance(value, Tensor) and value.dim()):
        return [task_index(one, column, tasks) for one in value]
    return task_index(value, column, tasks)


def _placed(found: Sequence[int | list[int]], rows: Sequence[Any], batch: Mapping[str, Any]) -> Tensor:
    """Task ids in the layout of the batch's tokens."""
    tokens = batch.get("input_ids")
    shape = tuple(tokens.shape) if isinstance(tokens, Tensor) else (len(rows),)
    whole = [one for one in found if isinstance(one, int)]
    of_pairs = "chosen_ids" in rows[0]  # a batch of DPO has two sequences for each row
    if len(whole) == len(rows) and (of_pairs or len(rows) == shape[0]):
        return torch.tensor(whole)
    spread = [
        [one] * len(row["input_ids"]) if isinstance(one, int) else one
        for one, row in zip(found, rows, strict=True)
    ]
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != shape:
        if len(rows) == shape[0]:  # padded on the right
            mask = torch.arange(shape[1]) < torch.tensor([len(one) for one in spread])[:, None]
        else:  # all rows in one, with padding at its end
            mask = torch.arange(shape[1])[None] < sum(map(len, spread))
            mask = mask.expand(shape)
    flat = torch.tensor([task for one in spread for task in one])
    ids = torch.zeros(shape, dtype=torch.int64)
    if int((mask != 0).sum()) != len(flat):
        raise ValueError(
            f"the rows of a batch have {len(flat)} tokens, and the collator gave {int((mask != 0).sum())}: "
            "the task of each token is not known then. Give `input_ids` of the final length, or a collator "
            "that neither cuts nor adds tokens"
        )
    ids[mask != 0] = flat
    return ids
