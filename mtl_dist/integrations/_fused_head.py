"""TRL's SFTTrainer: losses from its fused output head, its metrics, and its packed data sets."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from mtl_dist.integrations._columns import task_index
from mtl_dist.integrations._row_losses import Targets

_CHUNK = 1024  # tokens whose probabilities exist at a time, for the metrics


def is_sft(trainer: Trainer) -> bool:
    """Whether it is TRL's SFTTrainer, or a subclass with the same loss."""
    own = next(kind for kind in type(trainer).__mro__ if "compute_loss" in vars(kind))
    return own.__name__ == "SFTTrainer" and own.__module__.startswith("trl.")


class FusedHead:
    """The losses of SFTTrainer, which never makes all logits at once, unless a probe needs them."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._discounts = trainer.args.loss_type == "dft"
        self._totals: list[Tensor] = []

    def returns_total(self) -> None:
        """`compute_loss` returns the balancer's scalar in training; its own loss is for its metrics."""
        trainer = self._trainer
        inner = trainer.compute_loss

        @wraps(inner)
        def compute_loss(model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            self._totals.clear()
            found = inner(model, inputs, return_outputs, **kwargs)
            if not self._totals:  # in evaluation
                return found
            total = self._totals.pop()
            return (total, found[1]) if return_outputs else total

        trainer.compute_loss = compute_loss

    def take(self, total: Tensor) -> None:
        """Takes the balancer's scalar of a forward, for `compute_loss`."""
        self._totals.append(total)

    def losses(self, outputs: Any, targets: Targets) -> Tensor:
        """`[B, T]`: the loss of every token; the last column has no label where they are shifted here."""
        losses = self._of(outputs["log_probs"])
        missing = targets.mask.shape[1] - losses.shape[1]
        return torch.nn.functional.pad(losses, (0, missing))

    def of_rows(self, losses: Tensor) -> Tensor:
        """The losses of the tokens, as `loss_type` wants them."""
        return self._of(-losses)

    def outputs(self, outputs: Any, targets: Targets) -> Any:
        """The outputs that SFTTrainer reads its metrics from, made of whole logits."""
        from trl.trainer.utils import FusedCausalLMOutput  # TRL is there, or this would not run

        logits, labels = outputs["logits"].detach(), targets.labels
        rows = logits.reshape(-1, logits.shape[-1])
        wanted = labels.clamp(min=0).reshape(-1)
        chunks = zip(torch.split(rows, _CHUNK), torch.split(wanted, _CHUNK), strict=True)
        parts = [_metrics(*chunk) for chunk in chunks]
        found = [torch.cat(part).view(labels.shape) for part in zip(*parts, strict=True)]
        log_probs, entropy, is_top1 = (one.masked_fill(~targets.mask, 0) for one in found)
        return FusedCausalLMOutput(
            log_probs=log_probs,
            entropy=entropy,
            is_top1=is_top1,
            label_mask=targets.mask,
            aux_loss=outputs.get("aux_loss"),
        )

    def _of(self, log_probs: Tensor) -> Tensor:
        losses = -log_probs
        # DFT, https://arxiv.org/abs/2508.05629
        return losses * log_probs.exp().detach() if self._discounts else losses


def _metrics(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of each label, entropy, and whether the label is the most likely one."""
    log_probs = logits.float().log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return log_probs.gather(-1, labels[:, None])[:, 0], entropy, logits.argmax(-1) == labels


def repacked(trainer: Any, dataset: Any, column: str, tasks: Sequence[str]) -> Any:
    """The packed training data set of SFTTrainer, with the task of each token as another column.

    The rows are packed once more, with task ids in the place of labels: packing depends on lengths alone.

    Raises:
        ValueError: the trainer does not pack, or packs a stream, or packed something else.
    """
    args = trainer.args
    if not is_sft(trainer) or not args.packing:
        raise ValueError("dataset= is for SFTTrainer with packing=True: other trainers keep the column")
    if getattr(trainer.train_dataset, "column_names", None) is None or not hasattr(dataset, "__len__"):
        raise ValueError(
            "dataset= is packed once more, and a stream is read only once: give SFTTrainer a data set in "
            "memory or on disk, or packing=False"
        )
    whole = copy.copy(args)
    whole.max_length, whole.shuffle_dataset = None, False
    prepare = trainer._prepare_dataset
    rows = prepare(dataset, trainer.processing_class, whole, False, None, "train")
    if column not in rows.column_names:
        raise ValueError(f"dataset= has columns {list(rows.column_names)}, and no {column!r}")

    def with_ids(row: Any) -> dict[str, Any]:
        return {"labels": [task_index(row[column], column, tasks)] * len(row["input_ids"])}

    ids = rows.map(with_ids).select_columns(["input_ids", "labels"])
    packed = prepare(ids, trainer.processing_class, args, True, None, "train")
    own = trainer.train_dataset
    if packed["input_ids"][:] != own["input_ids"][:]:
        raise ValueError(
            "dataset= packs into other rows than the trainer has: give the data set that the trainer was "
            "given, after your formatting_func if it has one"
        )
    return own.add_column(column, packed["labels"][:])
