"""Views of the features, a set for each task: one backward pass then has the gradients of all n losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mtl_dist._graph import edge_of, reached
from mtl_dist.probes._base import Exchange
from mtl_dist.probes._features import Features, Gradients
from mtl_dist.probes._losses import Head, TaskLosses, check_names

Views = Sequence[Sequence[Tensor]]  # [task][leaf of the features]


def branch(shared: Features, num_tasks: int) -> Views:
    """A view of every leaf for every task."""
    return tuple(tuple(leaf.view_as(leaf) for leaf in shared.leaves) for _ in range(num_tasks))


def losses_of_branches(
    shared: Features, views: Views, heads: Mapping[str, Head], exchange: Exchange
) -> TaskLosses:
    """The loss of each head on its own views.

    Raises:
        ValueError: an unknown task, found before any head is evaluated.
    """
    check_names(heads, "heads", exchange.tasks)
    values = {
        task: heads[task](shared.rebuild(own))
        for task, own in zip(exchange.tasks, views, strict=True)
        if task in heads
    }
    return exchange.collect(values, shared.leaves[0].device)


def entangled(
    losses: TaskLosses, views: Views, shared: Features, tasks: Sequence[str]
) -> tuple[str, str] | None:
    """A task whose loss depends on another one's views, and that other one; None where there is none.

    Heads are that do what a decoder of all tasks does at its first call only, and keep the result.

    Raises:
        ValueError: a loss depends on the features past its views, where no gradient would be seen.
    """
    outside = len(tasks)
    marks = {edge_of(view): task for task, own in enumerate(views) for view in own if view.requires_grad}
    marks |= {edge_of(leaf): outside for leaf in shared.originals if leaf.requires_grad}
    for task, loss in enumerate(losses.values):
        others = set() if loss is None else reached(loss, marks) - {task}
        if outside in others:
            raise ValueError(
                f"the loss of task {tasks[task]!r} depends on the features other than through the argument "
                "of its function, so its gradient there cannot be measured: write "
                "balancer(z, {task: lambda z: ...}) and use that z"
            )
        if others:
            return tasks[task], tasks[min(others)]
    return None


def gradients_in_one_pass(losses: Sequence[Tensor | None], views: Views) -> Sequence[Gradients]:
    """`∂l_i/∂z` of each task, None for a zero, where no loss depends on the views of another.

    Engines with hooks in the heads (FSDP2) then see one backward of the heads, not n.
    """
    present = [i for i, loss in enumerate(losses) if loss is not None and loss.requires_grad]
    rows: list[Gradients] = [[None] * len(own) for own in views]
    if not present:
        return rows
    # the graph is kept for the engine's backward, and ends at the views: the trunk is not entered
    found = torch.autograd.grad(
        [loss for loss in losses if loss is not None and loss.requires_grad],
        [view for i in present for view in views[i]],
        retain_graph=True,
        allow_unused=True,
    )
    width = len(views[0])
    for number, i in enumerate(present):
        rows[i] = found[number * width : (number + 1) * width]
    return rows
