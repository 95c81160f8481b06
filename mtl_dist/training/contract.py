"""What a recipe must provide (`mtl_dist.recipes.Recipe`), looked at where the program uses it."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from mtl_dist.recipes import BatchData, Metric, Recipe, SumsMetric

_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_OTHERS = ("loss", "weight", "grad_norm")  # beside a metric in `summary.json`


def check_metrics(recipe: Recipe) -> None:
    """Raises `ValueError` unless every metric has a column of its own, in rows and in the summary."""
    seen = set()
    for task, metric in recipe.metrics.items():
        if not isinstance(metric, Metric | SumsMetric):
            raise _wrong(
                recipe, f"metrics must map each task to a Metric or SumsMetric, got {metric!r} for {task!r}"
            )
        if not _NAME.fullmatch(metric.name) or metric.name in _OTHERS:
            raise _wrong(
                recipe,
                f"the metric of task {task!r} is called {metric.name!r}: use letters, digits, '_', '.' and "
                f"'-', and none of {', '.join(_OTHERS)}, which every task has",
            )
        for column in (f"eval/loss/{task}", f"eval/{task}/{metric.name}"):
            if column in seen:
                raise _wrong(recipe, f"two values would be in the column {column!r}: rename task or metric")
            seen.add(column)


def check_data(recipe: Recipe, data: Any) -> tuple[BatchData, BatchData]:
    """Training and validation samples. Raises `ValueError` unless they are that."""
    parts = data if isinstance(data, tuple | list) else ()
    if len(parts) != 2 or not all(
        hasattr(part, "__len__") and hasattr(part, "__getitems__") for part in parts
    ):
        raise _wrong(
            recipe,
            "data() must return training and validation samples, two objects with __len__ and __getitems__ "
            f"(such as TensorData), got {_kind(data)}",
        )
    return parts[0], parts[1]


def check_model(recipe: Recipe, model: Any) -> nn.Module:
    """The model. Raises `ValueError` unless it can be trained."""
    if not isinstance(model, nn.Module):
        raise _wrong(recipe, f"model() must return an nn.Module, got {_kind(model)}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise _wrong(recipe, "model() returned a module without a parameter that is trained")
    return model


def check_total(recipe: Recipe, total: Any) -> Tensor:
    """What a forward in training mode returned. Raises `ValueError` unless it is a scalar with a graph."""
    if not isinstance(total, Tensor) or total.dim() or not total.requires_grad:
        raise _wrong(
            recipe,
            "in training mode, the model's forward must return the scalar that the balancer gave it, got "
            f"{_kind(total)}",
        )
    return total


def check_sums(recipe: Recipe, sums: Any) -> Tensor:
    """What a forward in eval mode returned. Raises `ValueError` unless it is one line of sums per task."""
    number = len(recipe.tasks)
    if not isinstance(sums, Tensor) or sums.dim() != 2 or len(sums) != number or sums.shape[1] < 3:
        raise _wrong(
            recipe,
            f"in eval mode, the model's forward must return sums of shape [{number}, 3] or wider, one line "
            f"per task (eval_sums makes them), got {_kind(sums)}",
        )
    if not sums.is_floating_point():
        raise _wrong(recipe, f"in eval mode, sums must be floating-point numbers, got {sums.dtype}")
    return sums


def check_value(recipe: Recipe, task: str, name: str, value: Any) -> float:
    """What a metric gave, as a number. Raises `ValueError` unless it is one."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise _wrong(
            recipe, f"the metric {name!r} of task {task!r} must give a number, got {_kind(value)}"
        ) from None


def _wrong(recipe: Recipe, what: str) -> ValueError:
    return ValueError(f"recipe: {type(recipe).__name__}: {what}")


def _kind(given: Any) -> str:
    if isinstance(given, Tensor):
        detached = "" if given.requires_grad or not torch.is_grad_enabled() else " without a graph"
        return f"a tensor of shape {list(given.shape)}{detached}"
    return "None" if given is None else f"a {type(given).__name__}"
