"""Grouped: one rule weighs the tasks of each group, another one the groups."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Combinator, Needs, Rule, State, nest, unnest
from mtl_dist.weighting.checks import check_inner


@dataclass(frozen=True)
class Grouped(Combinator):
    """`αᵢ = βₖ aᵢ` for task i of group k: a from `rule` inside the group, β from `between` over the groups.

    Each group has its own `rule`, which sees the tasks of that group alone. The groups are tasks for
    `between`: with the weights a, group k has the loss `Σ aᵢLᵢ`, the gradient `Σ aᵢgᵢ`, and the counts of its
    tasks. So the loss of a group is weighted already, and does not fall because its tasks do if `rule` is,
    for example, `InverseLoss`. `Grouped(MGDA(), Equal(), groups)` resolves conflicts inside groups, and
    `Grouped(Equal(), MGDA(), groups)` conflicts between them. Groups come from knowledge of the tasks, or
    from `mtl_dist.grouping.find_groups`.

    Attributes:
        rule: the rule inside every group.
        between: the rule over the groups, whose names it may use.
        groups: group name -> its tasks; every task is in one group.
    """

    name = "grouped"
    paper = "combinator"
    cost = "rule of each group + rule between"

    between: Rule
    groups: Mapping[str, Sequence[str]]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_inner(self, "between", self.between)
        if not isinstance(self.groups, Mapping) or any(map(_is_name, self.groups.values())):
            raise ValueError(
                "Grouped: groups must be a mapping from the name of a group to a list of its tasks, got "
                f"{self.groups!r}"
            )
        tasks = [task for group in self.groups.values() for task in group]
        if not tasks or not all(self.groups.values()) or len(set(tasks)) < len(tasks):
            raise ValueError(f"Grouped: groups must each have tasks of their own, got {dict(self.groups)}")
        if self.between.observes:
            raise ValueError(
                f"Grouped: between must learn from the step alone, because a group has no loss outside it; "
                f"got {self.between!r}"
            )

    @property
    def needs(self) -> Needs:  # type: ignore[override]  # as in Combinator
        """The whole Gram matrix if `between` reads gradients: a sum of them has products."""
        return Needs.GRAM if self.between.needs else self.rule.needs

    @property
    def positive_losses(self) -> bool:  # type: ignore[override]  # as in Combinator
        """Whether one of the rules takes logarithms or powers of losses."""
        return self.rule.positive_losses or self.between.positive_losses

    @property
    def observes(self) -> bool:  # type: ignore[override]  # as in Combinator
        """Whether the rule inside the groups learns from losses outside the step."""
        return self.rule.observes

    @property
    def compares(self) -> bool:  # type: ignore[override]  # as in Combinator
        """Whether one of the rules compares tasks."""
        return self.rule.compares or self.between.compares

    @property
    def own_batch(self) -> bool:  # type: ignore[override]  # as in Combinator
        """Whether the weights of one of the rules are about their batch."""
        return self.rule.own_batch or self.between.own_batch

    @property
    def degrees(self) -> tuple[float, float] | None:  # type: ignore[override]  # as in Combinator
        """`(a + c(1 + a) + da, b + cb + d(1 + b))` for `(a, b)` inside and `(c, d)` between."""
        if self.rule.degrees is None or self.between.degrees is None:
            return None
        (a, b), (c, d) = self.rule.degrees, self.between.degrees
        return a + c * (1 + a) + d * a, b + c * b + d * (1 + b)

    @property
    def breaks(self) -> Mapping[str, str]:  # type: ignore[override]  # as in Combinator
        """The laws that one of the rules does not keep."""
        return {**self.between.breaks, **self.rule.breaks}

    def needs_at(self, step: int) -> Needs:
        """The statistics that the rules read at `step`."""
        return Needs.GRAM if self.between.needs_at(step) else self.rule.needs_at(step)

    def init(self, tasks: Sequence[str], device: torch.device) -> State:
        """Members of the groups, and the states of the rule in each group and of the rule between them.

        Raises:
            ValueError: a task is in no group, or a group has an unknown task; and as the rules.
        """
        named = [task for group in self.groups.values() for task in group]
        if sorted(named) != sorted(tasks):
            raise ValueError(
                f"Grouped: groups must have each of the tasks {list(tasks)} once, got {dict(self.groups)}"
            )
        rows = [[task in group for task in tasks] for group in self.groups.values()]
        state = {"members": torch.tensor(rows, device=device)}
        for number in range(len(self.groups)):
            state |= nest(f"rule{number}", self.rule.init(tasks, device))
        return state | nest("between", self.between.init(list(self.groups), device))

    def observe(self, stats: TaskStats, state: State) -> State:
        """Passes the losses of each group to its rule."""
        state = dict(state)
        for number, members in enumerate(state["members"].unbind()):
            inner = self.rule.observe(_only(stats, members), unnest(f"rule{number}", state))
            state |= nest(f"rule{number}", inner)
        return state

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`αᵢ = βₖ aᵢ`."""
        state, rows = dict(state), []
        for number, members in enumerate(state["members"].unbind()):
            # for the rule of a group, the tasks of other groups are absent
            a, inner = self.rule.update(_only(stats, members), unnest(f"rule{number}", state))
            rows.append(torch.where(members & stats.present, a, 0.0))
            state |= nest(f"rule{number}", inner)
        a = torch.stack(rows)  # [k, n]
        beta, outer = self.between.update(self._of_groups(stats, a, state), unnest("between", state))
        return beta @ a, state | nest("between", outer)

    def _of_groups(self, stats: TaskStats, a: Tensor, state: State) -> TaskStats:
        """The statistics of the groups, with the weights a `[k, n]` inside them."""
        present = (state["members"] & stats.present).any(1)
        losses = a @ stats.losses
        if self.between.positive_losses:
            # the balancer refused losses <= 0, and refuses the weights that follow from NaN
            losses = torch.where(losses > 0, losses, torch.nan)
        return replace(
            stats,
            losses=torch.where(present, losses, 1.0),
            present=present,
            gram=None if stats.gram is None else a @ stats.gram @ a.T,
            counts=state["members"].to(stats.counts.dtype) @ stats.counts,
        )


def _only(stats: TaskStats, members: Tensor) -> TaskStats:
    """The statistics of a step in which all other tasks are absent."""
    return replace(
        stats,
        losses=torch.where(members, stats.losses, 1.0),
        present=stats.present & members,
        gram=None if stats.gram is None else stats.gram * torch.outer(members, members),
        counts=stats.counts * members,
    )


def _is_name(group: object) -> bool:
    return isinstance(group, str) or not isinstance(group, Collection)
