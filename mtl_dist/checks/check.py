"""`Balancer(check=True)`: measures every step a second time, by plain autograd, and looks for faults."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mtl_dist.checks.explicit import Explicit, detached, measure, rows_touched
from mtl_dist.checks.findings import Findings, Streaks
from mtl_dist.engines import ZERO_3, find_partitioned
from mtl_dist.losses import Features, Heads
from mtl_dist.probes import Probe, StepContext
from mtl_dist.stats import LocalStats, TaskStats
from mtl_dist.weighting import Needs, Rule

_TOLERANCE = 1e-4  # of |g_i| |g_j|; both sides are evaluated in the model's precision by the same operations
_SENSITIVE = 1e-3  # of the largest weight
_VANISHED = 1e-6  # of the largest norm of any task
_PATIENCE = 3  # steps in a row until something is called a pattern, not chance
_VERTEX, _VERTEX_PATIENCE = 0.999, 20  # share of one task's weight, and steps in a row


class Check:
    """Checks every step of a balancer. For debugging: it costs a second pass and waits for the device.

    The explicit gradients are taken one task at a time at detached features, in the model's own precision.
    Their products are summed in float64 by one matrix product.

    Attributes:
        findings: all findings so far.
    """

    def __init__(self, tasks: Sequence[str], rule: Rule, probe: Probe) -> None:
        self.findings = Findings()
        self._tasks = tasks
        self._rule = rule
        self._at_features = probe.at_features
        self._probe = probe
        self._streaks = Streaks()

    def measure(self, features: Any, heads: Heads, step: StepContext) -> LocalStats | None:
        """Local statistics to compare with those of the probe; findings about each task.

        Raises:
            ValueError: the engine partitions parameters; on every rank, before any collective of the step.
        """
        if step.engine.find_partitioned(lambda: find_partitioned(detached(features), heads), step.rank):
            raise ValueError(
                f"check=True takes gradients of the heads a second time, and {ZERO_3}. Check the run on one "
                "device: launch/debug.sh, or virtual_ranks"
            )
        shared = detached(features)
        explicit = measure(shared, heads, with_stats=self._at_features)
        self._look_at_values(shared, explicit, step)
        self._look_at_tasks(explicit, step)
        self._look_at_samples(explicit, step)
        return explicit.stats

    def compare(self, explicit: LocalStats, measured: LocalStats, step: int) -> None:
        """Compares global Gram matrices, each entry relative to the norms it is the product of.

        Raises:
            RuntimeError: they differ by more than the model's own rounding can explain.
        """
        gram, found = explicit.gram, measured.gram
        assert gram is not None  # both were measured
        assert found is not None
        norms = gram.diagonal().clamp(min=0).sqrt()
        error = (found - gram).abs() - _TOLERANCE * torch.outer(norms, norms)
        if bool((error > 0).any()) and bool(gram.isfinite().all()):
            raise RuntimeError(
                f"mtl_dist, step {step}: {self._probe!r} measured a Gram matrix that explicit gradients do "
                f"not confirm: {found.tolist()} against {gram.tolist()}. A head that gives "
                "another result each time it is called does this (look for randomness that is not torch's, "
                "or state in Python); otherwise please report it"
            )

    def compare_weights(self, explicit: Tensor, used: Tensor, step: int) -> None:
        """Notices weights that depend on the last digits of the statistics."""
        error = float(
            (explicit - used).abs().max() / used.abs().max().clamp(min=torch.finfo(used.dtype).tiny)
        )
        if error > _SENSITIVE:
            text = (
                f"the weights change by {error:.1e} when the gradients change in their last digits: "
                f"{self._rule!r} stands at a switch between two answers, or the tasks' gradients are nearly "
                "linearly dependent. Smooth, or a rule with a regulariser, steadies it"
            )
            self.findings.add("sensitive", None, None, step, text)

    def look_at_weights(self, stats: TaskStats, weights: Tensor) -> None:
        """Notices weights that stay with one task, and gradients that vanish. The same on every rank."""
        sizes = weights.abs()
        share, winner = (sizes / sizes.sum()).max(0)
        stuck = bool(share > _VERTEX) and int(stats.present.sum()) > 1
        if self._streaks.count(f"vertex {int(winner)}", stuck) >= _VERTEX_PATIENCE:
            self.findings.add("vertex", self._tasks[int(winner)], None, stats.step, self._stuck_text(stats))
        if stats.gram is not None:
            self._look_at_norms(stats)

    def _stuck_text(self, stats: TaskStats) -> str:
        norms = "" if stats.gram is None else f" The gradients' norms are {self._named(stats.grad_norms)}."
        return (
            f"it has had more than {_VERTEX:.1%} of all weight for {_VERTEX_PATIENCE} steps: {self._rule!r} "
            f"trains this task alone.{norms} Min-norm rules go to the task with the shortest gradient: "
            "normalise the gradients (MGDA(normalization=...)), bring the losses to one scale, or use "
            "Clamp or Smooth"
        )

    def _look_at_norms(self, stats: TaskStats) -> None:
        norms = stats.grad_norms
        largest = norms.max()
        for task, norm, present in zip(self._tasks, norms.tolist(), stats.present.tolist(), strict=True):
            vanished = present and bool(largest > 0) and norm <= _VANISHED * float(largest)
            if self._streaks.count(f"vanished {task}", vanished) >= _PATIENCE:
                text = (
                    f"its gradient at the features has vanished (norm {norm:.1e}, the largest is "
                    f"{float(largest):.1e}) for {_PATIENCE} steps. A label that is always the same, a loss "
                    "at its minimum, or a saturated or dead activation does this; look at the task's labels"
                )
                self.findings.add("vanished", task, None, stats.step, text)

    def _look_at_values(self, shared: Features, explicit: Explicit, step: StepContext) -> None:
        if not all(bool(leaf.isfinite().all()) for leaf in shared.leaves):
            text = (
                "the shared features already hold NaN or infinity on this rank, before any head: look at the "
                "trunk and this rank's inputs"
            )
            self.findings.add("features", None, step.rank, step.step, text)
        for task, loss, gradient in zip(self._tasks, explicit.losses, explicit.gradients, strict=True):
            if loss is not None and not bool(loss.isfinite()):
                text = f"its loss is {loss.item()} on this rank: look at its labels and its loss function"
                self.findings.add("loss", task, step.rank, step.step, text)
            elif gradient is not None and not all(bool(g.isfinite().all()) for g in gradient):
                text = (
                    "its loss is finite on this rank and its gradient is not: look for a square root, "
                    "logarithm or division at 0 in its head"
                )
                self.findings.add("gradient", task, step.rank, step.step, text)
            elif loss is not None and self._rule.positive_losses and bool(loss <= 0):
                text = (
                    f"its loss is {loss.item():.4g} on this rank, and {self._rule!r} takes logarithms or "
                    "powers of losses: add a constant that keeps it positive, or use a rule that reads "
                    "gradients"
                )
                self.findings.add("negative", task, step.rank, step.step, text)

    def _look_at_tasks(self, explicit: Explicit, step: StepContext) -> None:
        for task, gradient, present in zip(self._tasks, explicit.gradients, explicit.present, strict=True):
            if present and gradient is None:
                text = (
                    "its loss does not depend on the shared features, so its weight says nothing about the "
                    "trunk. Compute it from the argument that the head is given, not from another or a "
                    "detached tensor"
                )
                self.findings.add("unconnected", task, step.rank, step.step, text)

    def _look_at_samples(self, explicit: Explicit, step: StepContext) -> None:
        if self._rule.needs != Needs.GRAM or not self._at_features:
            return
        rows = [None if g is None else rows_touched(g) for g in explicit.gradients]
        touched = [row for row in rows if row is not None and bool(row.any())]
        disjoint = len(touched) > 1 and bool((torch.stack(touched).sum(0) <= 1).all())
        if self._streaks.count("disjoint", disjoint) >= _PATIENCE:
            text = (
                f"tasks never share a sample: in {_PATIENCE} steps, no row of the features had a gradient of "
                f"two tasks. Their gradients there are orthogonal by construction, and {self._rule!r} sees "
                "no conflict. Use SharedLayerProbe (balancer(x, heads, layer=...)) or ParameterProbe"
            )
            self.findings.add("disjoint", None, step.rank, step.step, text)

    def _named(self, values: Tensor) -> str:
        pairs = zip(self._tasks, values.tolist(), strict=True)
        return "{" + ", ".join(f"{task}: {value:.3g}" for task, value in pairs) + "}"
