"""HF Trainer, TRL's SFTTrainer and DPOTrainer: tasks are the values of a column of the data set.

    trainer = Trainer(AutoModelForCausalLM.from_pretrained(...), args, train_dataset=table)
    balancer = Balancer(["code", "prose"], InverseGradNorm())
    balance_by_column(trainer, balancer, column="domain")
    trainer.train()

The model stays as it is. Its own forward runs without labels. The losses of its tokens (or rows) are computed
from its logits, and the balancer's scalar takes the place of the model's loss. With `TokenShare()` this is
the model's own loss, the mean over all tokens. In evaluation the model computes its own loss, and each task's
loss is logged beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.modeling_outputs import CausalLMOutput

from mtl_dist.balancer import Balancer
from mtl_dist.integrations import accelerate
from mtl_dist.integrations._attached import check_given
from mtl_dist.integrations._columns import TASK_IDS, ColumnCollator
from mtl_dist.integrations._evaluation_rows import Weights
from mtl_dist.integrations._fused_head import FusedHead, is_sft, repacked
from mtl_dist.integrations._output_head import check_chunked, output_head, whole_head
from mtl_dist.integrations._own_loss import check_own_loss, router_coefficient
from mtl_dist.integrations._pairs import Pairs, check_pairs, count_pairs, is_dpo
from mtl_dist.integrations._row_losses import IGNORED, RowLosses, Targets
from mtl_dist.integrations._sequences import split_sequences
from mtl_dist.integrations._step_counts import StepCounts
from mtl_dist.integrations._trainer import attach, base_model, check_alone, evaluates_as_before, take
from mtl_dist.losses import Called, cross_entropy_in_chunks
from mtl_dist.probes import FeatureTap, ParameterProbe


def balance_by_column(
    trainer: Trainer,
    balancer: Balancer,
    *,
    column: str = "domain",
    dataset: Any = None,
    chunk: int | None = None,
    name: str = "balancer",
    eval_weights: Weights | None = None,
) -> Balancer:
    """Balances the training of a language model or classifier by a column of its data set, before `train`.

    Every row belongs to one task: `column` holds its name, or its index in the balancer's tasks. Batches may
    be padded, padding-free or packed. The losses of all micro-batches of an optimizer step are divided by the
    number of labels in the whole step, over all ranks; labels of -100 do not count. Where the model has a
    router (mixture of experts), its loss is added with the model's own coefficient, as a mean over ranks and
    micro-batches.

    Gradients are measured at the logits (`FeatureProbe()`, the default of rules that read gradients), at the
    weight of the output head (`SharedLayerProbe()`: only there tasks can conflict, because no token belongs
    to two of them), or at parameters (`ParameterProbe()`). A head that is tied to the embeddings counts with
    its own use, and one with LoRA with its base layer.

    With TRL's `DPOTrainer`, there is one loss for each pair of answers, and gradients are measured at the
    log-probabilities of the answers, or at parameters.

    Args:
        trainer: a `Trainer` of a causal or masked language model, of one with an encoder and a decoder, or of
            a model for sequence or token classification; or TRL's `SFTTrainer` or `DPOTrainer`. PEFT models
            too.
        balancer: its tasks are the values of the column. It is not a part of the model; the trainer holds it.
        column: of the training data set. Evaluations of data sets without it are as before.
        dataset: the training data set as it was given to the trainer, where `SFTTrainer` packs it: packing
            drops the column, so it is found again.
        chunk: for a causal language model with a large vocabulary: the number of tokens whose logits exist at
            a time in training. Gradients are then measured at the input of the output head
            (`FeatureProbe`), or at parameters (`ParameterProbe`). None: the model makes all logits.
        name: as for `attach`.
        eval_weights: as for `attach`.

    Returns:
        The same balancer.

    Raises:
        TypeError: a trainer or model whose losses by row are not known.
        ValueError: no such column, or a combination that does not work; the message says what to change.
    """
    check_given(balancer)
    _check(trainer)
    if isinstance(balancer.probe, FeatureTap):
        raise ValueError(
            "FeatureTap needs one function per task, and here one gives the losses of all rows: use "
            "FeatureProbe()"
        )
    model = base_model(trainer.model)
    rows = RowLosses.of(model)
    pairs = is_dpo(trainer)
    if pairs:
        check_pairs(trainer, balancer)
    if dataset is not None:
        trainer.train_dataset = repacked(trainer, dataset, column, balancer.tasks)
    _check_column(trainer, column)
    if chunk is not None:
        check_chunked(trainer, model, balancer, rows, chunk)
    if not (pairs or is_sft(trainer)):  # TRL's trainers compute the loss themselves
        says = trainer.args.process_index == 0
        check_own_loss(model, rows, chunked=chunk is not None, says=says)
    check_alone(model.forward, trainer)
    own_flag = trainer.model_accepts_loss_kwargs
    attach(balancer, trainer, name=name, eval_weights=eval_weights)
    evaluates_as_before(trainer, own_flag)
    _keeps_column(trainer, column, balancer)
    step_counts = StepCounts(count_pairs if pairs else rows.counts, balancer, column)
    step_counts.read_ahead(trainer)
    facts = accelerate.engine_of(trainer.accelerator, trainer.args.gradient_accumulation_steps)
    balancer.set_engine(replace(facts, counts=step_counts))
    if pairs:
        Pairs(trainer, model, balancer).install()
        return balancer
    forward = _Forward(model, balancer, rows, chunk)
    if is_sft(trainer):
        forward.fused = FusedHead(trainer)
        forward.fused.returns_total()
    forward.install()
    return balancer


class _Forward:
    """The forward of a model, with the balancer's scalar as its loss.

    It is the model's own method until a batch has task ids, so generation and other calls are as before.
    """

    def __init__(self, model: Any, balancer: Balancer, rows: RowLosses, chunk: int | None) -> None:
        self._model, self._balancer, self._rows, self._chunk = model, balancer, rows, chunk
        self._inner: Callable[..., Any] = model.forward
        self._of_head: tuple[Tensor, Any] | None = None  # what the output head read, and wrote
        self.fused: FusedHead | None = None

    def install(self) -> None:
        """Takes the place of `model.forward`."""
        if self._balancer.probe.takes_layers:
            output_head(self._model).register_forward_hook(self._note)

        @wraps(self._inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            ids = kwargs.pop(TASK_IDS, None)
            if ids is None or kwargs.get("labels") is None:
                return self._inner(*args, **kwargs)
            targets = self._rows.targets({**kwargs, TASK_IDS: ids})
            self._balancer.train(self._model.training)
            if self._model.training and torch.is_grad_enabled():
                return self._trained(targets, args, kwargs)
            outputs = self._inner(*args, **kwargs)
            with torch.no_grad():
                self._balance_losses(self._losses_of(outputs, targets), targets)
            return outputs

        take(forward, self._balancer)
        self._model.forward = forward
        if callable(generate := getattr(self._model, "generate", None)):
            self._model.generate = _without_ids(generate)

    def _trained(self, targets: Targets, args: Any, kwargs: dict[str, Any]) -> Any:
        if self._chunk is not None:
            return self._in_chunks(targets, args, kwargs, self._chunk)
        measures = self._balancer.measures
        if self.fused is not None and kwargs.get("fused_lm_head") and not measures:
            outputs = self._inner(*args, **kwargs)
            total = self._balance_losses(self._losses_of(outputs, targets), targets)
        else:
            fused = kwargs.pop("fused_lm_head", False)
            for key in ("labels", "shift_labels", "num_items_in_batch"):
                kwargs.pop(key, None)
            kwargs |= self._rows.inputs(self._model, targets.labels, kwargs)
            self._of_head = None
            outputs = self._inner(*args, **kwargs)
            if not isinstance(outputs, Mapping):
                raise TypeError(
                    f"balance_by_column: {type(self._model).__name__} returned a "
                    f"{type(outputs).__name__} instead of named outputs: leave return_dict as it is"
                )
            total = self._balance(outputs["logits"], targets)
            if fused and self.fused is not None:
                outputs = self.fused.outputs(outputs, targets)
        if (router := outputs.get("aux_loss")) is not None:
            total = total + router_coefficient(self._model) * router.to(total.device)
        if self.fused is not None:
            self.fused.take(total)
        return type(outputs)(**{**outputs, "loss": total})

    def _in_chunks(self, targets: Targets, args: Any, kwargs: dict[str, Any], chunk: int) -> Any:
        """Without the model's output head, whose logits would exist as a whole."""
        for key in ("labels", "shift_labels", "num_items_in_batch", "logits_to_keep"):
            kwargs.pop(key, None)
        hidden = self._model.base_model(*args, **kwargs).last_hidden_state
        head = whole_head(self._model)

        def losses(hidden: Tensor) -> Tensor:
            return cross_entropy_in_chunks(
                hidden, head.weight, targets.labels, bias=head.bias, ignored=IGNORED, chunk=chunk
            )

        ids, mask, balancer = targets.task_ids, targets.mask, self._balancer
        if isinstance(balancer.probe, ParameterProbe):  # it counts the head too, which lies behind `hidden`
            wanted = balancer.probe.parameters
            trained = [p for p in self._model.parameters() if p.requires_grad] if wanted is None else wanted()
            total = balancer(losses(hidden), task_ids=ids, mask=mask, parameters=trained)
        elif balancer.measures:
            total = balancer(hidden, losses, task_ids=ids, mask=mask)
        else:
            total = self._balance_losses(losses(hidden), targets)
        return CausalLMOutput(loss=total)

    def _balance(self, logits: Tensor, targets: Targets) -> Tensor:
        """The balancer's scalar, with the gradients where the probe measures."""
        balancer, mask = self._balancer, targets.mask
        if not balancer.measures:
            return self._balance_losses(self._rows.losses(logits, targets), targets)
        features, layer = logits, None
        if balancer.probe.takes_layers:
            features, layer = self._layer_of(logits)

        def losses(logits: Tensor) -> Tensor:
            found = self._rows.losses(logits, targets)
            return found if self.fused is None else self.fused.of_rows(found)

        return balancer(features, losses, layer=layer, task_ids=targets.task_ids, mask=mask)

    def _balance_losses(self, losses: Tensor, targets: Targets) -> Tensor:
        return self._balancer(losses, task_ids=targets.task_ids, mask=targets.mask)

    def _losses_of(self, outputs: Any, targets: Targets) -> Tensor:
        if self.fused is not None and outputs.get("log_probs") is not None:
            return self.fused.losses(outputs, targets)
        return self._rows.losses(outputs["logits"], targets)

    def _layer_of(self, logits: Tensor) -> tuple[Tensor, Any]:
        """Input of the output head, and the head as a layer that was called already."""
        found, self._of_head = self._of_head, None
        if found is None or found[1] != _numbers(logits):
            raise ValueError(
                f"SharedLayerProbe: {type(self._model).__name__} changes the output of its head (a scale, a "
                "soft cap, a choice of tokens, a copy under torch_compile) before the loss, so the gradient "
                "of the head's weight is not known from the logits: use FeatureProbe(), or "
                "ParameterProbe(parameters=...)"
            )
        return found[0], Called(logits)

    def _note(self, _: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Hook of the output head: what it read and wrote last."""
        if self._model.training and torch.is_grad_enabled():
            self._of_head = (inputs[0], _numbers(output))


def _without_ids(generate: Callable[..., Any]) -> Callable[..., Any]:
    """`Seq2SeqTrainer` gives whole batches to `generate`, which refuses what it does not know."""

    @wraps(generate)
    def without_ids(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop(TASK_IDS, None)
        return generate(*args, **kwargs)

    return without_ids


def _numbers(tensor: Tensor) -> Any:
    """The same for two tensors that are the same numbers in memory, as where ZeRO-3 passes an output on."""
    return tensor.data_ptr(), tuple(tensor.shape), tensor.dtype, tensor._version


def _check(trainer: Any) -> None:
    """Raises for trainers whose loss is not that of the model."""
    if trainer.model is None or trainer.model_init is not None:
        raise ValueError(
            "balance_by_column changes the model of the trainer, and model_init makes a new one in each "
            "train(): give the trainer a model"
        )
    own = next(kind for kind in type(trainer).__mro__ if "compute_loss" in vars(kind))
    if own.__module__.startswith("trl.") and not (is_sft(trainer) or is_dpo(trainer)):
        raise TypeError(
            "balance_by_column knows the losses of Trainer, SFTTrainer and DPOTrainer, and "
            f"{own.__name__} has its own: train it without a balancer, or write its compute_loss with "
            "balancer(losses, task_ids=...)"
        )
    if trainer.args.use_liger_kernel:
        raise ValueError(
            "use_liger_kernel=True computes the loss inside a kernel, where no loss of a token is seen: set "
            "it to False"
        )
    split = {name: split_sequences(trainer.accelerator, name) for name in ("cp_size", "sp_size")}
    if max(split.values()) > 1:
        raise ValueError(
            "balance_by_column finds the targets of whole sequences, and context parallelism splits them "
            f"over ranks, {split}: set both to 1, or call balancer(losses, task_ids=...) in the model, with "
            "the targets of this rank"
        )


def _check_column(trainer: Trainer, column: str) -> None:
    names = getattr(trainer.train_dataset, "column_names", None)
    if names is None or column in names:
        return
    packs = getattr(trainer.args, "packing", False)
    remedy = (
        "packing drops it, so give the data set as it was before: balance_by_column(..., dataset=...)"
        if packs
        else "add it, with the name or the index of each row's task"
    )
    raise ValueError(f"the training data set has columns {list(names)}, and no {column!r}: {remedy}")


def _keeps_column(trainer: Trainer, column: str, balancer: Balancer) -> None:
    """The column reaches the collator, and the collator turns it into task ids."""
    trainer._set_signature_columns_if_needed()  # no public name for this yet
    names: Any = trainer._signature_columns
    names.append(column)
    trainer.data_collator = ColumnCollator(trainer.data_collator, column, balancer.tasks)
