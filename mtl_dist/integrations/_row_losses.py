"""The loss of every token or row of a `transformers` model, as the model's own loss averages it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtl_dist.integrations._columns import TASK_IDS
from mtl_dist.stats import stats_dtype

IGNORED = -100  # label of what does not count
# by the end of a class's name: whether its loss is over tokens, and whether token t predicts token t + 1
_KINDS = {
    "ForCausalLM": (True, True),
    "LMHeadModel": (True, True),
    "ForMaskedLM": (True, False),
    "ForTokenClassification": (True, False),
    "ForSequenceClassification": (False, False),
}
# of encoders with a decoder, whose token t is predicted from the labels before it
_DECODERS = ("ForConditionalGeneration", "MTModel")
_OF_DECODER = ("decoder_input_ids", "decoder_inputs_embeds")


@dataclass(frozen=True)
class Targets:
    """What the losses of one batch are computed from.

    Attributes:
        labels: of tokens `[B, T]` (shifted where token t predicts token t + 1), or of rows `[B, ...]`.
        task_ids: `[B]`, or `[B, T]` in the order of the labels.
        mask: which labels count, `[B, T]` or `[B]`.
    """

    labels: Tensor
    task_ids: Tensor
    mask: Tensor

    def counts(self, num_tasks: int) -> Tensor:
        """`[n]`, number of labels of each task that count."""
        ids = self.task_ids.reshape(*self.task_ids.shape, *[1] * (self.mask.dim() - self.task_ids.dim()))
        ids = ids.expand(self.mask.shape).flatten().to(self.mask.device)
        dtype = stats_dtype(self.mask.device)
        counts = torch.zeros(num_tasks, dtype=dtype, device=self.mask.device)
        return counts.index_add_(0, ids, self.mask.flatten().to(dtype))


@dataclass(frozen=True)
class RowLosses:
    """The losses of one kind of model.

    Attributes:
        tokens: whether there is one loss for each token; otherwise one for each row.
        shifted: whether token t predicts token t + 1.
        config: of the model.
        decodes: whether labels are the tokens of a decoder, and the inputs those of an encoder.
    """

    tokens: bool
    shifted: bool
    config: Any
    decodes: bool = False

    @classmethod
    def of(cls, model: nn.Module) -> RowLosses:
        """The losses of `model`.

        Raises:
            TypeError: a model whose losses by row are not known here.
        """
        for kind in type(model).__mro__:
            for ending, (tokens, shifted) in _KINDS.items():
                if kind.__name__.endswith(ending):
                    return cls(tokens, shifted, model.config)
            if kind.__name__.endswith(_DECODERS) and getattr(model.config, "is_encoder_decoder", False):
                return cls(True, False, model.config, decodes=True)
        raise TypeError(
            f"balance_by_column knows the losses of models ...{', ...'.join(_KINDS)}, and of encoders with a "
            f"decoder ...{', ...'.join(_DECODERS)}, got "
            f"{type(model).__name__}: call the balancer in the model's forward instead, with task_ids="
        )

    def targets(self, batch: Mapping[str, Any]) -> Targets:
        """Labels, task ids and mask of a batch that the collator made."""
        ids, labels, shift_labels = batch[TASK_IDS], batch["labels"], batch.get("shift_labels")
        if self.shifted:
            # as ForCausalLMLoss of transformers
            labels = F.pad(labels, (0, 1), value=IGNORED)[..., 1:] if shift_labels is None else shift_labels
            ids = F.pad(ids, (0, 1))[..., 1:] if ids.dim() > 1 else ids
        if self.decodes and ids.dim() > 1:
            raise ValueError(
                "balance_by_column: a model with an encoder and a decoder has one task for each row, and the "
                f"batch has one for each of {ids.shape[1]} input tokens: neither pack nor flatten its rows"
            )
        if self.tokens or not labels.is_floating_point():
            return Targets(labels, ids, labels != IGNORED)
        return Targets(labels, ids, torch.ones(len(labels), dtype=torch.bool, device=labels.device))

    def counts(self, batch: Mapping[str, Any], num_tasks: int) -> Tensor:
        """`[n]`, number of labels of each task that count; zeros for a batch without labels."""
        if batch.get("labels") is None:
            return torch.zeros(num_tasks)
        return self.targets(batch).counts(num_tasks)

    def inputs(self, model: Any, labels: Tensor, given: Mapping[str, Any]) -> dict[str, Any]:
        """What stands in the place of `labels` where the model makes the decoder's inputs from them."""
        if not self.decodes or any(given.get(key) is not None for key in _OF_DECODER):
            return {}
        prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        if prepare is None:  # only the model's forward knows how; its loss is not used
            return {"labels": labels}
        return {_OF_DECODER[0]: prepare(labels=labels)}

    def losses(self, logits: Tensor, targets: Targets) -> Tensor:
        """`[B, T]` or `[B]`, float32: the loss of every token or row; 0 where the label does not count."""
        labels = targets.labels.to(logits.device)
        if self.tokens:
            if logits.shape[:-1] != labels.shape:
                raise ValueError(
                    "balance_by_column needs logits for each label, and the model made logits of shape "
                    f"{list(logits.shape)} for labels of shape {list(labels.shape)}: call the balancer in "
                    "the model's forward, with task_ids="
                )
            flat = logits.float().reshape(-1, logits.shape[-1])
            found = F.cross_entropy(flat, labels.reshape(-1), ignore_index=IGNORED, reduction="none")
            return found.view(labels.shape)
        kind, logits = self._problem(labels), logits.float()
        if kind == "single_label_classification":
            labels = labels.view(-1)
            return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
        labels = labels.reshape(logits.shape).float()
        if kind == "regression":
            return F.mse_loss(logits, labels, reduction="none").mean(1)
        return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1)

    def _problem(self, labels: Tensor) -> str:
        """As the models of transformers choose their loss."""
        if self.config.problem_type is not None:
            return str(self.config.problem_type)
        if self.config.num_labels == 1:
            return "regression"
        return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
