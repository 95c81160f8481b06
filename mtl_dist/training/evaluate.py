"""Validation: sums and counts over all ranks, and one division at the end."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import nn
from torch.nn import functional

from mtl_dist.recipes import BatchData, Recipe
from mtl_dist.stats import stats_dtype
from mtl_dist.tracking import Row
from mtl_dist.training.batches import eval_batches
from mtl_dist.training.contract import check_sums, check_value
from mtl_dist.training.together import everyone


def evaluate(
    model: nn.Module, data: BatchData, recipe: Recipe, accelerator: Accelerator, batch_size: int
) -> Row:
    """`eval/loss/<task>` and `eval/<task>/<metric>` over all validation samples, the same on every rank.

    Args:
        model: the prepared model; its training mode is restored.
        data: the validation samples.
        recipe: the recipe with the tasks and metrics.
        accelerator: accelerator of the run.
        batch_size: number of samples of a validation batch, over all ranks.
    """
    total = torch.zeros(
        len(recipe.tasks), 3, dtype=stats_dtype(accelerator.device), device=accelerator.device
    )
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for batch in eval_batches(data, batch_size, accelerator.process_index, accelerator.num_processes):
            sums = check_sums(recipe, model(**send_to_device(batch, accelerator.device)))
            width = max(sums.shape[1], total.shape[1])
            total = _padded(sums, width) + _padded(total, width)
    model.train(was_training)
    # a rank without samples may have fewer columns, and buffers of unequal size would hang
    total = _padded(total, max(everyone(accelerator, total.shape[1])))
    summed: torch.Tensor = accelerator.reduce(total, reduction="sum")
    return eval_row(summed, recipe)


def eval_row(sums: torch.Tensor, recipe: Recipe) -> Row:
    """Means and metrics from the sums that `Recipe.model` describes. Tasks without samples have none."""
    row: Row = {}
    for (task, metric), (loss, value, count, *more) in zip(
        recipe.metrics.items(), sums.tolist(), strict=True
    ):
        if count:
            row[f"eval/loss/{task}"] = loss / count
            row[f"eval/{task}/{metric.name}"] = check_value(
                recipe, task, metric.name, metric.value([value, *more], count)
            )
    return row


def _padded(sums: torch.Tensor, width: int) -> torch.Tensor:
    return functional.pad(sums, (0, width - sums.shape[1]))
