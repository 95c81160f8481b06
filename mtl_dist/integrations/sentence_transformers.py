"""Sentence Transformers: tasks are the data sets of a training, one of which each batch comes from.

    trainer = SentenceTransformerTrainer(model, args, train_dataset={"nli": ..., "sts": ...}, loss={...})
    attach(Balancer(["nli", "sts"], LastSeen(InverseGradNorm())), trainer)
    trainer.train()

The trainer's losses stay as they are, and the balancer's scalar takes their place. A batch has one task, so
rules that compare tasks need `LastSeen`, which keeps the latest statistics of each. Cross encoders and sparse
encoders have the same trainer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import wraps
from typing import Any

from torch import Tensor, nn

from mtl_dist.balancer import Balancer
from mtl_dist.integrations import _trainer

_NAME = "dataset_name"  # where the trainer says which data set a batch is from


def attach(
    balancer: Balancer,
    trainer: Any,
    *,
    parameters: nn.Module | Tensor | Iterable[Tensor] | None = None,
    name: str = "balancer",
) -> Balancer:
    """Connects `balancer` to a trainer with several data sets, before `train`. The trainer holds it.

    Each batch counts with its number of rows. So `TokenShare()` is the training without a balancer, also
    where ranks have batches of different data sets. Evaluations are as before.

    Args:
        balancer: its tasks are the names of the data sets.
        trainer: with a `DatasetDict` and a dictionary of losses.
        parameters: where rules that read gradients measure them; None: all parameters of the model. The last
            layer costs less.
        name: as for `mtl_dist.integrations.transformers.attach`.

    Returns:
        The same balancer.

    Raises:
        RuntimeError: the launch fell back silently.
        ValueError: a combination that does not work; the message says what to change.
    """
    losses = _losses_of(trainer, balancer)
    rule = balancer.weighting
    if rule.compares and len(balancer.tasks) > 1:
        raise ValueError(
            f"each batch comes from one data set, and {rule!r} compares the tasks of one batch: give "
            "Balancer(tasks, LastSeen(rule)), which keeps the latest statistics of each task"
        )
    if balancer.measures:
        cached = sorted(task for task, loss in losses.items() if _is_cached(loss))
        if cached:
            raise ValueError(
                f"the losses of {cached} are cached: their gradients come from hooks in the backward, and "
                "cannot be measured before it. Use the same losses without a cache, or a rule that reads "
                "losses"
            )
    if not isinstance(parameters, (nn.Module, Tensor)):
        parameters = trainer.model if parameters is None else list(parameters)
    _trainer.attach(balancer, trainer, name=name)
    inner = trainer.compute_loss

    @wraps(inner)
    def compute_loss(model: Any, inputs: Any, return_outputs: bool = False, *args: Any, **kwargs: Any) -> Any:
        task = inputs.get(_NAME)
        found = inner(model, inputs, return_outputs, *args, **kwargs)
        if task is None or not trainer.model.training:
            return found
        loss = found[0] if return_outputs else found
        total = balancer({task: loss}, counts={task: _rows(inputs)}, parameters=parameters)
        return (total, *found[1:]) if return_outputs else total

    trainer.compute_loss = compute_loss
    return balancer


def _losses_of(trainer: Any, balancer: Balancer) -> Mapping[str, Any]:
    """The losses of the trainer, by data set.

    Raises:
        ValueError: they have no names, or other names than the tasks.
    """
    data, losses = trainer.train_dataset, trainer.loss
    if not isinstance(data, Mapping) or not isinstance(losses, Mapping):
        raise ValueError(
            "the trainer names the data set of a batch only where both are dictionaries: give train_dataset={"
            '"nli": ..., "sts": ...} and loss={"nli": ..., "sts": ...}'
        )
    if set(data) != set(balancer.tasks):
        raise ValueError(
            f"the balancer's tasks are {list(balancer.tasks)}, and the data sets {sorted(data)}: give the "
            "tasks the names of the data sets"
        )
    return losses


def _is_cached(loss: Any) -> bool:
    """Whether it, or a loss inside it (as in MatryoshkaLoss), computes its gradients in chunks of its own."""
    inside = loss.modules() if isinstance(loss, nn.Module) else [loss]
    return any(type(one).__name__.startswith("Cached") for one in inside)


def _rows(inputs: Mapping[str, Any]) -> int:
    """Number of rows of a batch: the length of its first tensor."""
    return next(len(value) for value in inputs.values() if isinstance(value, Tensor) and value.dim())
