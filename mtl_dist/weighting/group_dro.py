"""GroupDRO: more weight, multiplicatively, for tasks whose loss is far above a reference loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Rule, State
from mtl_dist.weighting.checks import check_choice, check_fraction, check_positive
from mtl_dist.weighting.helpers import constant, per_task

Source = Literal["training", "validation"]


@dataclass(frozen=True)
class GroupDRO(Rule):
    """Distributionally robust: `α ← (1 - c) norm(α exp(ηe)) + c/n`, `eᵢ = max(Lᵢ - Lᵢʳᵉᶠ, 0)`, `Σ αᵢ = 1`.

    Sagawa et al., ICLR 2020: without references, this is exponentiated gradient ascent on the worst loss
    (η = 0.01, c = 0 there). DoReMi (Xie et al., NeurIPS 2023) subtracts the losses of a small reference model
    (η = 1, c = 1e-3 or 1e-4), and takes the mean of α over the run as the mixture of the main model. It cuts
    at 0 token by token. A mean loss does not show single tokens, so here the mean is cut. Sheared LLaMA (Xia
    et al., ICLR 2024) takes the excess of validation losses, and changes the sampling instead of the weights.

    `norm` is over the tasks present: they share the weight that they had together, and the weight of an
    absent task waits for it. The losses are those of the global batch.

    Attributes:
        references: Lᵣₑf, by task name or in task order, in the unit of the losses; None is 0.
        lr: η, in 1/unit of the losses.
        smoothing: c, in [0, 1).
        source: "training": the losses of the step. "validation": pass the validation losses to `observe`
            each time you measure them; α changes only there.
    """

    name = "group_dro"
    paper = "Sagawa et al., ICLR 2020"
    cost = "O(n)"

    references: Mapping[str, float] | Sequence[float] | None = None
    lr: float = 1.0
    smoothing: float = 1e-3
    source: Source = "training"

    def __post_init__(self) -> None:
        check_positive(self, "lr", self.lr)
        check_fraction(self, "smoothing", self.smoothing, one=False)
        check_choice(self, "source", self.source, get_args(Source))

    @property
    def observes(self) -> bool:  # type: ignore[override]  # depends on a setting
        """Whether validation losses must be passed to `observe`."""
        return self.source == "validation"

    def init(self, tasks: Sequence[str], device: torch.device) -> State:
        """Reference losses, and `log α` up to a common constant."""
        references = per_task(self.references, tasks, device, "GroupDRO: references", default=0.0)
        return {"references": references, "log_weights": constant(0.0, len(tasks), device)}

    def observe(self, stats: TaskStats, state: State) -> State:
        """Moves α by validation losses. Absent tasks are those whose loss was not measured."""
        if self.source != "validation":
            return super().observe(stats, state)
        return self._ascend(stats, state)

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """α of the tasks present, after this step's losses have moved it (`source="training"`)."""
        if self.source == "training":
            state = self._ascend(stats, state)
        return _log_share(state["log_weights"], stats.present).exp(), state

    def _ascend(self, stats: TaskStats, state: State) -> State:
        present, log_weights = stats.present, state["log_weights"]
        excess = (stats.losses - state["references"]).clamp(min=0)
        # log α ← log((1 - c) norm(α exp(ηe)) + c/n), and the tasks present keep their total
        moved = _log_share(log_weights + self.lr * excess, present) + math.log1p(-self.smoothing)
        if self.smoothing > 0:
            floor = math.log(self.smoothing) - stats.num_present.to(moved.dtype).log()
            moved = torch.logaddexp(moved, floor)
        total = _log_total(log_weights, present)
        return {**state, "log_weights": torch.where(present, total + moved, log_weights)}


def _log_total(log_weights: Tensor, present: Tensor) -> Tensor:
    """Scalar, `log Σ αᵢ` over the tasks present; 0 if none is."""
    total = torch.logsumexp(log_weights.masked_fill(~present, -math.inf), 0)
    return torch.where(present.any(), total, torch.zeros_like(total))


def _log_share(log_weights: Tensor, present: Tensor) -> Tensor:
    """`[n]`, logarithms of shares that sum to 1 over the tasks present; 0 for absent tasks."""
    return torch.where(present, log_weights - _log_total(log_weights, present), 0.0)
