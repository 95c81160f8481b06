"""The optimizer of a run, its learning rate as a function of the step, and clipping."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from mtl_dist.training.components import Kind, Spec, component_class, component_value, hint, parameters_of

Schedule = Literal["constant", "linear", "cosine"]

_KIND: Kind[Optimizer] = Kind(Optimizer, {"adamw": AdamW, "adam": Adam, "sgd": SGD})
_OWN = ("params", "lr", "weight_decay")  # they come from other settings


def build_optimizer(
    spec: Spec, parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float
) -> Optimizer:
    """The optimizer that `spec` describes.

    Args:
        spec: adamw, adam, sgd or the import path of a subclass of `torch.optim.Optimizer`; or a mapping with
            `name` and further arguments of the class.
        parameters: what it trains.
        learning_rate: `lr` of the class.
        weight_decay: `weight_decay` of the class.

    Raises:
        ValueError: a name or argument is unknown, or a value is wrong.
    """
    fields: Mapping[str, Any] = {"name": spec} if isinstance(spec, str) else spec
    if not isinstance(fields, Mapping):
        raise ValueError(f"optimizer: give a name, or a mapping with name and arguments; got {spec!r}")
    cls = component_class(fields.get("name"), _KIND, "optimizer.name")
    accepted, hints = parameters_of(cls, "optimizer.name")
    takes_all = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in accepted.values())
    arguments: dict[str, Any] = {"lr": learning_rate}
    for key, value in fields.items():
        if key == "name":
            continue
        if key in _OWN:
            raise ValueError(f"optimizer.{key}: set learning_rate or weight_decay of the run instead")
        if key not in accepted and not takes_all:
            valid = [name for name in accepted if name not in _OWN]
            raise ValueError(f"optimizer.{key}: {fields['name']!r} has no such argument{hint(key, valid)}")
        arguments[key] = component_value(value, hints.get(key, Any), f"optimizer.{key}")
    if "weight_decay" in accepted or takes_all:
        arguments["weight_decay"] = weight_decay
    elif weight_decay:
        raise ValueError(
            f"weight_decay={weight_decay}: the optimizer {fields['name']!r} has none; set it to 0"
        )
    try:
        optimizer: Optimizer = cls(parameters, **arguments)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"optimizer: {error}; got {spec!r}") from error
    return optimizer


def check_optimizer(spec: Spec, learning_rate: float, weight_decay: float) -> None:
    """Raises the errors of `build_optimizer`, without a model."""
    build_optimizer(spec, [nn.Parameter(torch.zeros(1))], learning_rate, weight_decay)


def learning_rate_factor(schedule: Schedule, step: int, steps: int, warmup: int) -> float:
    """What the learning rate of a step is multiplied with, in [0, 1].

    It rises linearly over the first `warmup` steps. Then it is constant, or falls to 0 at the end of the run:
    linearly, or as half a period of a cosine. It follows from the step alone, so a checkpoint holds nothing
    of it.

    Args:
        schedule: the form after the warm-up.
        step: the step, from 0.
        steps: number of steps of the run.
        warmup: number of steps of the warm-up.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    if schedule == "linear":
        return 1 - done
    return 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1.0


def set_hyperparameters(optimizer: Any, learning_rate: float, weight_decay: float) -> None:
    """Sets them for all parameters. The engine's wrapper of the optimizer passes them on."""
    set_learning_rate(optimizer, learning_rate)
    for group in optimizer.param_groups:
        if "weight_decay" in group:
            group["weight_decay"] = weight_decay


def set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    """Sets it for all parameters."""
    for group in optimizer.param_groups:
        lr = group["lr"]
        if isinstance(lr, torch.Tensor):
            lr.fill_(learning_rate)  # capturable optimizers hold it on the device
        else:
            group["lr"] = learning_rate
