"""HF Trainer with a model whose loss function returns a dictionary of losses, as detectors have."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial, wraps
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import Trainer
from transformers.loss import loss_for_object_detection

from mtl_dist.balancer import Balancer
from mtl_dist.integrations._attached import check_given
from mtl_dist.integrations._evaluation_rows import Weights
from mtl_dist.integrations._trainer import attach, base_model, check_alone, evaluates_as_before, take
from mtl_dist.stats import stats_dtype
from mtl_dist.sync import all_reduce_sum, collective_device

_LOGGER = logging.getLogger("mtl_dist")
# loss functions of transformers whose divisors are those of DETR
_DETR = ("ForObjectDetectionLoss", "ForSegmentationLoss")
# those of its relatives that divide all losses by the boxes
_BY_BOXES = tuple(
    f"{kind}Loss"
    for kind in (
        "DeformableDetrForObjectDetection",
        "DeformableDetrForSegmentation",
        "GroundingDinoForObjectDetection",
    )
)
# by the boxes of their own rank
_BY_OWN_BOXES = ("RTDetrForObjectDetectionLoss", "DFineForObjectDetectionLoss")
# by the mean of the boxes over ranks, as it should be
_BY_MEAN_BOXES = ("LwDetrForObjectDetectionLoss", "RfDetrForSegmentationLoss")
_DISTILLED = "loss_ddf"  # of D-FINE: a ratio of sums that is no mean over boxes


def balance_loss_dict(
    trainer: Trainer,
    balancer: Balancer,
    *,
    parameters: nn.Module | Tensor | Iterable[Tensor] | None = None,
    counts: Callable[..., Mapping[str, Any]] | None = None,
    name: str = "balancer",
    eval_weights: Weights | None = None,
) -> Balancer:
    """Balances the losses that `model.loss_function` returns beside their total (DETR and its relatives).

        tasks = {"loss_ce": 1, "loss_bbox": 5, "loss_giou": 2}  # the model's own weights
        balancer = Balancer(list(tasks), rule, base=tasks, ignore=["cardinality_error"])
        balance_loss_dict(trainer, balancer, parameters=trainer.model.model.decoder.layers[-1])

    In evaluation the model computes its own total, and each task's loss is logged beside it.

    DETR's own losses on W ranks are not those of one process: that of the classes is divided by a number of
    the rank, and those of the boxes are W times too large (transformers 5.23). Here, both are means over this
    rank with their counts, and ranks equal one process. The boxes of Deformable DETR and its relatives are
    W times too large too; here they are summed over the ranks. RT-DETR and D-FINE divide by the boxes of
    their own rank, and here by those of all ranks. Only `loss_ddf` of D-FINE is no mean over boxes: its mean
    over ranks is trained, and a warning says so.

    Args:
        trainer: its model has a `loss_function` that returns `(loss, loss_dict, ...)`.
        balancer: its tasks are names in `loss_dict`. It is not a part of the model; the trainer holds it.
        parameters: where rules that read gradients measure them.
        counts: called with what the loss function is called with; returns, by task, what each loss was
            divided by on this rank. Tasks that it leaves out count 1: they are divided by a number that is
            the same on all ranks. None: a model named above, or LW-DETR or RF-DETR; or a single process.
        name: as for `attach`.
        eval_weights: as for `attach`.

    Returns:
        The same balancer.

    Raises:
        ValueError: a rule that reads gradients without `parameters`; several ranks, and it is not known what
            the losses of the model are divided by; or as `attach`.
        TypeError: a model without such a loss function; some only show it at the first batch.
    """
    check_given(balancer)
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
    if counts is not None and not callable(counts):
        raise TypeError(
            "balance_loss_dict: counts= is a function of what the loss function is called with, got "
            f"{type(counts).__name__}"
        )
    check_alone(inner, trainer)
    kind = getattr(inner, "__name__", "")
    if counts is None and kind in _DETR:
        counts = partial(_of_detr, balancer.tasks, model.config.eos_coefficient)
        by_rank = partial(_reducing, _this_rank, inner)
    elif counts is None and kind in _BY_BOXES:
        by_rank = partial(_reducing, _all_ranks, inner)
    elif counts is None and kind in _BY_OWN_BOXES:
        by_rank = partial(_by_all_boxes, balancer, inner)
        _warn_of_distillation(trainer, balancer.tasks)
    else:
        by_rank = inner
        if counts is None and kind not in _BY_MEAN_BOXES:
            _check_alone_in_the_world(trainer, model)
    own_flag = trainer.model_accepts_loss_kwargs
    attach(balancer, trainer, name=name, eval_weights=eval_weights)
    evaluates_as_before(trainer, own_flag)

    @wraps(inner)
    def loss_function(*args: Any, **kwargs: Any) -> Any:
        trains = model.training and torch.is_grad_enabled()
        found = own = by_rank(*args, **kwargs)
        if not trains and by_rank is not inner:  # the model's total in evaluation is its own
            found = inner(*args, **kwargs)
        if not isinstance(found, tuple) or len(found) < 2 or not isinstance(found[1], Mapping):
            raise TypeError(
                f"balance_loss_dict: the loss function of {type(model).__name__} returned no dictionary of "
                "losses beside the total: call the balancer in the model's forward"
            )
        balancer.train(model.training)
        divided: dict[str, Any] = dict.fromkeys(balancer.tasks, 1)
        if counts is not None:
            divided |= _checked_counts(counts(*args, **kwargs))
        if trains:
            _check_trained(type(model).__name__, balancer.tasks, *found[:2])
            return (balancer(found[1], counts=divided, parameters=parameters), *found[1:])
        with torch.no_grad():
            balancer(own[1], counts=divided)
        return found

    take(loss_function, balancer)
    model.loss_function = loss_function
    return balancer


def _check_alone_in_the_world(trainer: Trainer, model: nn.Module) -> None:
    """Raises `ValueError` where a loss may be divided by a number that differs between ranks."""
    if (ranks := trainer.accelerator.num_processes) > 1:
        raise ValueError(
            f"balance_loss_dict does not know what the losses of {type(model).__name__} are divided by, and "
            f"{ranks} ranks may divide by different numbers: give counts=, a function of what the loss "
            "function is called with, that returns for each task what its loss was divided by on this rank "
            "(boxes, samples); or counts=lambda *_, **__: {}, if this number is the same on all ranks"
        )


def _warn_of_distillation(trainer: Trainer, tasks: Sequence[str]) -> None:
    found = [task for task in tasks if task.startswith(_DISTILLED)]
    if found and trainer.accelerator.num_processes > 1 and trainer.args.process_index == 0:
        _LOGGER.warning(
            "mtl_dist: balance_loss_dict: %s of D-FINE is no mean over boxes, so its mean over ranks is "
            "trained, as without a balancer; here alone, ranks differ from one process on the whole batch",
            found[0] if len(found) == 1 else f"each of {found}",
        )


def _check_trained(model: str, tasks: Sequence[str], total: Any, losses: Mapping[str, Any]) -> None:
    """Raises `ValueError` where the total can be trained, and no loss of the dictionary can."""
    found = [losses[task] for task in tasks if isinstance(losses.get(task), Tensor)]
    trains = isinstance(total, Tensor) and total.requires_grad
    if trains and found and not any(loss.requires_grad for loss in found):
        raise ValueError(
            f"balance_loss_dict: the losses that {model} returns in its dictionary were detached from the "
            "graph (for logs), so they train nothing: call the balancer in the model's forward, with the "
            "losses before that"
        )


def _checked_counts(found: Any) -> Mapping[str, Any]:
    if not isinstance(found, Mapping):
        raise TypeError(
            "balance_loss_dict: counts= must return a number for each task that it names, as a mapping; got "
            f"{type(found).__name__}"
        )
    return found


def _of_detr(
    tasks: Sequence[str],
    no_object: float,
    logits: Tensor,
    labels: Sequence[Mapping[str, Any]],
    *_: Any,
    **__: Any,
) -> dict[str, float]:
    """What DETR's losses are divided by: boxes, and for classes also the weights of queries without a box."""
    batch, queries = logits.shape[:2]
    boxes = sum(len(one["class_labels"]) for one in labels)
    matched = sum(min(queries, len(one["class_labels"])) for one in labels)
    of_classes = matched + no_object * (batch * queries - matched)
    return {task: of_classes if task.startswith("loss_ce") else boxes for task in tasks}  # auxiliary ones too


def _reducing(
    boxes_of: Callable[[Any, Tensor], Tensor], inner: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """A loss function of `transformers` with another number of boxes, which it divides by the world size."""
    module: Any = loss_for_object_detection
    own = module.reduce
    module.reduce = partial(boxes_of, own)
    try:
        return inner(*args, **kwargs)
    finally:
        module.reduce = own


def _this_rank(_: Any, boxes: Tensor) -> Tensor:
    """Those of this rank, whose division by the boxes of all ranks is the balancer's."""
    own: Tensor = boxes * PartialState().num_processes
    return own


def _all_ranks(reduce: Any, boxes: Tensor) -> Tensor:
    """The sum over ranks; transformers 5.23 takes their mean, so its losses are W times too large."""
    summed: Tensor = reduce(boxes, reduction="sum")
    return summed


def _by_all_boxes(
    balancer: Balancer,
    inner: Callable[..., Any],
    logits: Tensor,
    labels: Sequence[Mapping[str, Any]],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """A loss function that divides by max(1, boxes of this rank), with the mean over ranks as the divisor.

    Denoising losses are also divided by the number of groups of the rank, which stays. Without a box there
    are none, and their sum over this rank is 0.
    """
    total, losses, *rest = inner(logits, labels, *args, **kwargs)
    own, device = sum(len(one["class_labels"]) for one in labels), collective_device(balancer.group)
    sums = torch.tensor([own, 1], dtype=stats_dtype(device), device=device)
    boxes, ranks = all_reduce_sum(sums, balancer.group).tolist()
    factor = max(1, own) * ranks / max(1, boxes)
    scaled = {key: loss if key.startswith(_DISTILLED) else loss * factor for key, loss in losses.items()}
    if not own and boxes:
        scaled = {task: 0 * total for task in balancer.tasks if "_dn_" in task} | scaled
    return total, scaled, *rest
