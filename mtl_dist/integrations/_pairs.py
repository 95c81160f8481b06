"""TRL's DPOTrainer: one loss for each pair of a chosen and a rejected answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import Trainer

from mtl_dist.balancer import Balancer
from mtl_dist.integrations._columns import TASK_IDS
from mtl_dist.integrations._trainer import base_model
from mtl_dist.stats import stats_dtype


def is_dpo(trainer: Trainer) -> bool:
    """Whether it is TRL's DPOTrainer, or a subclass with the same loss."""
    own = next(kind for kind in type(trainer).__mro__ if "compute_loss" in vars(kind))
    return own.__name__ == "DPOTrainer" and own.__module__.startswith("trl.")


def check_pairs(trainer: Any, balancer: Balancer) -> None:
    """Raises `ValueError` for a DPOTrainer with another loss, and for a probe that cannot measure it."""
    others = {
        "loss_type": (trainer.loss_types, ["sigmoid"]),
        "f_divergence_type": (trainer.f_divergence_type, "reverse_kl"),
        "ld_alpha": (trainer.ld_alpha, None),
        "use_weighting": (trainer.use_weighting, False),
        "router_aux_loss_coef": (trainer.router_aux_loss_coef if trainer.aux_loss_enabled else 0.0, 0.0),
    }
    for name, (given, known) in others.items():
        if given != known:
            raise ValueError(
                f"balance_by_column knows the loss of DPO itself, with {name}={known!r}, got {given!r}: set "
                "it so, or train without a balancer"
            )
    if balancer.probe.takes_layers:
        raise ValueError(
            f"{balancer.probe!r}: DPOTrainer never makes logits, so the gradient of the output head's weight "
            "is not known: use FeatureProbe() or ParameterProbe(parameters=...)"
        )


def count_pairs(batch: Mapping[str, Any], num_tasks: int) -> Tensor:
    """`[n]`, number of pairs of each task."""
    ids: Tensor = batch[TASK_IDS]
    return torch.bincount(ids, minlength=num_tasks).to(stats_dtype(ids.device))


class Pairs:
    """Losses of the pairs of a batch, `-log σ(β (Δ_chosen - Δ_rejected))` (Rafailov et al., NeurIPS 2023).

    `Δ` is the log-probability of an answer minus that under the reference. DPOTrainer computes both in its
    own `compute_loss`, whose metrics stay; they are read from the outputs of its models.

    Args:
        trainer: TRL's DPOTrainer.
        model: the model of `transformers` that it trains.
        balancer: takes the losses.
    """

    def __init__(self, trainer: Any, model: Any, balancer: Balancer) -> None:
        self._trainer, self._balancer = trainer, balancer
        # in `compute_loss`: log-probabilities of tokens, of the policy and then of the reference
        self._seen: list[Tensor] | None = None
        model.forward = self._recorded(model.forward)
        if trainer.ref_model is not None:  # or the same model without adapters, or computed before
            reference = base_model(trainer.accelerator.unwrap_model(trainer.ref_model))
            reference.forward = self._recorded(reference.forward)

    def install(self) -> None:
        """`compute_loss` returns the balancer's scalar in training."""
        trainer, balancer, inner = self._trainer, self._balancer, self._trainer.compute_loss

        @wraps(inner)
        def compute_loss(model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            inputs = dict(inputs)
            ids = inputs.pop(TASK_IDS, None)
            self._seen = []
            found = inner(model, inputs, return_outputs, **kwargs)
            seen, self._seen = self._seen, None
            if ids is None:
                return found
            balancer.train(trainer.model.training)
            if not (trainer.model.training and torch.is_grad_enabled()):
                with torch.no_grad():
                    self._total(seen, inputs, ids)
                return found
            total = self._total(seen, inputs, ids)
            return (total, found[1]) if return_outputs else total

        trainer.compute_loss = compute_loss

    def _recorded(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            outputs = inner(*args, **kwargs)
            if self._seen is not None and kwargs.get("fused_lm_head"):
                self._seen.append(outputs.log_probs)
            return outputs

        return forward

    def _total(self, seen: Sequence[Tensor], inputs: Mapping[str, Any], ids: Tensor) -> Tensor:
        policy = _of_answers(seen[0], inputs)
        if "ref_chosen_logps" in inputs:
            reference = torch.stack([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]], 1)
        else:
            reference = _of_answers(seen[1], inputs)
        beta, (weight,) = self._trainer.beta, self._trainer.loss_weights

        def losses(policy: Tensor) -> Tensor:
            chosen, rejected = (policy - reference).unbind(1)
            found: Tensor = -weight * logsigmoid(beta * (chosen - rejected))
            return found

        if self._balancer.measures:
            total: Tensor = self._balancer(policy, losses, task_ids=ids)
        else:
            total = self._balancer(losses(policy), task_ids=ids)
        return total


def _of_answers(log_probs: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """`[B, 2]`: the log-probability of the chosen and the rejected answer."""
    tokens = inputs["completion_mask"].shape[1] - 1  # prompt tuning puts others before them
    return log_probs[:, -tokens:].sum(1).view(2, -1).T
