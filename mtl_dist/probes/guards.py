"""What a probe refuses, says once, or keeps out of the trunk."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from mtl_dist.losses import FeatureGradients, LocalLosses, TaskLosses, Views, nan_and_empty
from mtl_dist.probes.base import StepContext
from mtl_dist.stats import HOST

_LOGGER = logging.getLogger("mtl_dist")

FREED = "storage of size 0"  # what torch says of memory that an engine took away
DERIVATIVE_OF_FREED = (
    "a head takes a derivative through parameters that the engine freed after their forward (FSDP2): use DDP "
    "or ZeRO 0-2 for PDE residuals and gradient penalties"
)
PARAMETERS = (
    "features hold a parameter. All ranks have the same one, so gradients there do not add over ranks as "
    "those at the samples' features do: use ParameterProbe(), or give the features that the samples have"
)


@contextmanager
def in_words() -> Iterator[None]:
    """Heads that run on detached features: a derivative past these is not there, which torch says otherwise.

    Raises:
        ValueError: a head takes such a derivative.
    """
    try:
        yield
    except RuntimeError as error:
        if "appears to not have been used in the graph" not in str(error):
            raise
        raise ValueError(
            "a head takes a derivative with respect to something before the features (a PDE residual, a "
            "gradient penalty), and here the heads are evaluated on features that are cut off from it "
            "(reevaluate, ZeRO-3, or check=True). Use ParameterProbe() without these, or a rule that reads "
            "losses only"
        ) from error


def differentiates(whose: str) -> str:
    """Why a loss that holds a derivative past the features is refused."""
    return (
        f"{whose} holds a derivative with respect to something before the features (a PDE residual, a "
        "gradient penalty), so it reaches the trunk past them, and its gradient at the features is only a "
        "part. Use ParameterProbe(), which takes the gradient of the loss itself, or a rule that reads "
        "losses only"
    )


def reads_inside(whose: str) -> str:
    """Why a loss that reads what the trunk computed on its way is refused."""
    return (
        f"{whose} depends on something that the trunk computed before the features, so its gradient at the "
        "features is only a part: compute it from the argument of its function, make what it reads one of "
        "the features, balancer((z, h), heads), or use ParameterProbe()"
    )


def tell_unconnected(
    whose: str, task: int, output: Tensor | None, losses: LocalLosses, step: StepContext
) -> None:
    """Rank 0 says once that a loss which counts has no gradient."""
    if output is None or (isinstance(losses, TaskLosses) and task in losses.empty):
        return
    if step.rank == 0 and ("unconnected", task) not in step.engine.told:
        step.engine.told.add(("unconnected", task))
        _LOGGER.warning(
            "mtl_dist: %s has no gradient at the shared features. Rules that read gradients see 0 there, and "
            "min-norm rules such as MGDA then give it all weight. If it should read the features, compute it "
            "from the argument of its function; if it trains the trunk in another way (a commitment loss, a "
            "regulariser), take it out of the tasks and add it to the result, loss = balancer(...) + 0.1 * "
            "term, or use ParameterProbe(); if it stands for a batch without samples of the task, return "
            "None",
            whose,
        )


def without_graph(total: Tensor, losses: LocalLosses, step: StepContext) -> Tensor:
    """A total that nothing behind it is trained by, ready for a backward. Each rank says so once.

    A rank without samples has such a total too, and nothing is said of it.
    """
    counts = not isinstance(losses, TaskLosses) or any(
        value is not None and task not in losses.empty for task, value in enumerate(losses.values)
    )
    if counts and "without graph" not in step.engine.told:
        step.engine.told.add("without graph")
        _LOGGER.warning(
            "mtl_dist, rank %d: no loss has a graph, so this rank trains nothing at this step: were they "
            "detached, or computed under no_grad? For a batch without samples give None, or counts={task: 0}",
            step.rank,
        )
    return total.requires_grad_()


def tell_detached(losses: LocalLosses, step: StepContext) -> None:
    """Each rank says once of a loss that it trains nothing, where others do. A loss of exactly 0 may.

    Such a 0 stands for a batch without samples of the task in many models.
    """
    if not isinstance(losses, TaskLosses) or not losses.outputs:
        return
    for task, value in enumerate(losses.values):
        if value is None or value.requires_grad or task in losses.empty:
            continue
        if ("detached", task) not in step.engine.told and (value.device.type != HOST or value != 0):
            step.engine.told.add(("detached", task))
            _LOGGER.warning(
                "mtl_dist, rank %d: the loss of task %r has no graph, so it trains nothing: was it detached, "
                "or computed under no_grad? For a batch without samples give None, or counts={task: 0}",
                step.rank,
                step.tasks[task],
            )


def guard(losses: TaskLosses, gradients: FeatureGradients, step: StepContext) -> None:
    """Where only the device knows which losses count, the others are kept out of the trunk, and reported."""
    counts = losses.counts
    bad = [_any_not_finite(own, counts) for own in gradients.sets]
    hollow = (counts == 0) & torch.stack(bad)
    step.refuse(hollow.any(), partial(nan_and_empty, step.tasks, hollow))
    protect(losses, losses.views or ())


def _any_not_finite(gradients: Sequence[Tensor | None], counts: Tensor) -> Tensor:
    found = torch.zeros((), dtype=torch.bool, device=counts.device)
    for gradient in gradients:
        if gradient is not None:
            found = found | ~gradient.isfinite().all()
    return found


def protect(losses: TaskLosses, views: Views) -> None:
    """The gradients of losses with count 0 end at the views, as zeros, also where they are NaN."""
    for count, own in zip(losses.counts, views, strict=False):
        for view in own:
            if view.requires_grad:
                view.register_hook(partial(_where_counted, count))  # type: ignore[no-untyped-call]


def _where_counted(count: Tensor, gradient: Tensor) -> Tensor:
    return torch.where(count > 0, gradient, torch.zeros_like(gradient))
