"""HF Trainer with a model whose loss function returns a dictionary of losses, as detectors have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from mtl_dist.balancer import Balancer
from mtl_dist.integrations._evaluation_rows import Weights
from mtl_dist.integrations._trainer import attach, base_model, evaluates_as_before


def balance_loss_dict(
    trainer: Trainer,
    balancer: Balancer,
    *,
    parameters: nn.Module | Tensor | Iterable[Tensor] | None = None,
    name: str = "balancer",
    eval_weights: Weights | None = None,
) -> Balancer:
    """Balances the losses that `model.loss_function` returns beside their total (DETR and its relatives).

        tasks = {"loss_ce": 1, "loss_bbox": 5, "loss_giou": 2}  # the model's own weights
        balancer = Balancer(list(tasks), rule, base=tasks, ignore=["cardinality_error"])
        balance_loss_dict(trainer, balancer, parameters=trainer.model.model.decoder.layers[-1])

    In evaluation the model computes its own total, and each task's loss is logged beside it.

    Args:
        trainer: its model has a `loss_function` that returns `(loss, loss_dict, ...)`.
        balancer: its tasks are names in `loss_dict`. It is not a part of the model; the trainer holds it.
        parameters: where rules that read gradients measure them.
        name: as for `attach`.
        eval_weights: as for `attach`.

    Returns:
        The same balancer.

    Raises:
        ValueError: a rule that reads gradients without `parameters`, or as `attach`.
        TypeError: a model without such a loss function; some only show it at the first batch.
    """
    model = base_model(trainer.model)
    inner = getattr(model, "loss_function", None)
    if not callable(inner):
        raise TypeError(
            f"balance_loss_dict needs a model with a loss_function, got {type(model).__name__}: call the "
            "balancer in the model's forward"
        )
    if balancer.measures and parameters is None:
        raise ValueError(
            f"{balancer.weighting!r} reads gradients: say where they are measured, such as "
            "parameters=trainer.model.model.decoder.layers[-1]"
        )
    if parameters is not None and not isinstance(parameters, (nn.Module, Tensor)):
        parameters = list(parameters)
    own_flag = trainer.model_accepts_loss_kwargs
    attach(balancer, trainer, name=name, eval_weights=eval_weights)
    evaluates_as_before(trainer, own_flag)

    @wraps(inner)
    def loss_function(*args: Any, **kwargs: Any) -> Any:
        found = inner(*args, **kwargs)
        if not isinstance(found, tuple) or len(found) < 2 or not isinstance(found[1], Mapping):
            raise TypeError(
                f"balance_loss_dict: the loss function of {type(model).__name__} returned no dictionary of "
                "losses beside the total: call the balancer in the model's forward"
            )
        balancer.train(model.training)
        if model.training and torch.is_grad_enabled():
            return (balancer(found[1], parameters=parameters), *found[1:])
        with torch.no_grad():
            balancer(found[1])
        return found

    model.loss_function = loss_function
    return balancer
