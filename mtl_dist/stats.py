"""Task statistics: what one rank measures, what every rank then knows, what the user reads.

The one idea of the library lives here. With `l_i` the local mean loss of task i over `c_i` samples and
`g_i = ∂l_i/∂z` its gradient at the shared features, the three quantities of `LocalStats` *add*: over ranks,
over micro-batches, over virtual ranks. One sum therefore gives every rank the exact global statistics,

    C_i  = Σ_r c_i^r
    L_i  = Σ_r c_i^r l_i^r / C_i
    G_ij = Σ_r c_i^r c_j^r ⟨g_i^r, g_j^r⟩ / (C_i C_j)

which is what one process would have measured on the concatenated batch. Means of local Grams or norms are
not offered, because they are wrong: a Gram does not commute with an average.

Statistics are float64 (float32 where the device has no float64): they are n² numbers, so precision is free,
and gradient norms of 1e-20 neither underflow when squared nor change a rule's decision.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from mtl_dist._stopwatch import Elapsed


def stats_dtype(device: torch.device) -> torch.dtype:
    """Precision of statistics on `device`: float64, or float32 on Apple's MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(frozen=True)
class LocalStats:
    """What one rank measured on its own samples. Instances add.

    Attributes:
        loss_sums: `[n]`, `c_i l_i`; 0 where the task is absent.
        counts: `[n]`, `c_i`, samples (or tokens) behind each local mean; 0 where the task is absent.
        gram: `[n, n]`, `c_i c_j ⟨g_i, g_j⟩`; zeros where gradients were not measured.
    """

    loss_sums: Tensor
    counts: Tensor
    gram: Tensor

    def __add__(self, other: LocalStats) -> LocalStats:
        return LocalStats(
            self.loss_sums + other.loss_sums, self.counts + other.counts, self.gram + other.gram
        )

    @classmethod
    def zeros(cls, num_tasks: int, device: torch.device) -> LocalStats:
        """The neutral element: a rank that saw nothing."""
        n, dtype = num_tasks, stats_dtype(device)
        return cls(*(torch.zeros(shape, dtype=dtype, device=device) for shape in ((n,), (n,), (n, n))))


@dataclass(frozen=True)
class TaskStats:
    """Global statistics of one step, the same on every rank. The only input of a rule besides its state.

    Attributes:
        losses: `[n]`, global mean losses. Entries of absent tasks hold 1 and carry no information.
        present: `[n]` bool, whether any rank had a sample of the task.
        gram: `[n, n]`, inner products of the tasks' gradients, true values (loss scale and accumulation
            divided out); zero rows and columns for absent tasks. None where the rule asked for no gradients.
        counts: `[n]`, global numbers of samples.
        step: how many times the rule was updated before; a host integer, the same on every rank.
    """

    losses: Tensor
    present: Tensor
    gram: Tensor | None
    counts: Tensor
    step: int = 0

    @property
    def num_present(self) -> Tensor:
        """Scalar, number of tasks present; at least 1, so that it can be divided by."""
        return self.present.sum().clamp(min=1)

    @property
    def grad_norms(self) -> Tensor:
        """`[n]`, Euclidean norms of the tasks' gradients, the square roots of the Gram's diagonal.

        Raises:
            ValueError: no gradients were measured.
        """
        return self.require_gram().diagonal().clamp(min=0).sqrt()

    def require_gram(self) -> Tensor:
        """`gram`, `[n, n]`.

        Raises:
            ValueError: no gradients were measured.
        """
        if self.gram is None:
            raise ValueError(
                "this rule needs gradients, and none were measured: call `balancer(features, heads)` "
                "instead of `balancer(losses)`"
            )
        return self.gram

    def guarded(self, ok: Tensor) -> TaskStats:
        """These statistics where `ok` (scalar bool) holds, else harmless ones (losses 1, Gram identity).

        A rule then never sees NaN or infinity, and the decision needs no host.
        """
        losses = torch.where(ok, self.losses, torch.ones_like(self.losses))
        if self.gram is None:
            return replace(self, losses=losses)
        eye = torch.eye(len(losses), dtype=self.gram.dtype, device=self.gram.device)
        return replace(self, losses=losses, gram=torch.where(ok, self.gram, eye))


def global_stats(total: LocalStats, step: int, *, with_gram: bool) -> TaskStats:
    """Statistics of the concatenated batch from the sum over ranks: the equations at the top of this file."""
    present = total.counts > 0
    counts = torch.where(present, total.counts, torch.ones_like(total.counts))
    # L_i = Σ c_i l_i / C_i
    losses = torch.where(present, total.loss_sums / counts, torch.ones_like(counts))
    # G_ij = Σ c_i c_j <g_i, g_j> / (C_i C_j)
    gram = total.gram / torch.outer(counts, counts) if with_gram else None
    return TaskStats(losses, present, gram, total.counts, step)


@dataclass(frozen=True)
class StepReport:
    """What happened in one step, for people and trackers. Tensors stay on the device until they are read.

    Attributes:
        tasks: task names, in the order of every vector here.
        stats: the global statistics the weights came from.
        weight_vector: `[n]`, the weights; 0 for tasks absent on all ranks.
        held: scalar bool, whether a non-finite statistic made the balancer keep the previous weights.
        sync: time spent in collectives since the report before.
    """

    tasks: tuple[str, ...]
    stats: TaskStats
    weight_vector: Tensor
    held: Tensor
    sync: Elapsed = field(default_factory=Elapsed)

    @property
    def step(self) -> int:
        """Index of the balancer call this report is of, from 0."""
        return self.stats.step

    @cached_property
    def weights(self) -> dict[str, float]:
        """Weight of each task in the weighted total; 0 for a task absent on all ranks."""
        return self._named(self.weight_vector)

    @cached_property
    def losses(self) -> dict[str, float]:
        """Global mean loss of each task; NaN for a task absent on all ranks."""
        return self._named(self.stats.losses.masked_fill(~self.stats.present, torch.nan))

    @cached_property
    def grad_norms(self) -> dict[str, float]:
        """Gradient norm of each task (NaN where absent); empty where no gradients were measured."""
        if self.stats.gram is None:
            return {}
        return self._named(self.stats.grad_norms.masked_fill(~self.stats.present, torch.nan))

    @cached_property
    def cosines(self) -> Tensor | None:
        """`[n, n]` on the host, cosines between the tasks' gradients; None where none were measured.

        NaN where a task is absent or has a zero gradient, because no angle exists there.
        """
        if self.stats.gram is None:
            return None
        norms = self.stats.grad_norms
        return (self.stats.gram / torch.outer(norms, norms)).clamp(-1, 1).cpu()

    def _named(self, values: Tensor) -> dict[str, float]:
        return dict(zip(self.tasks, values.tolist(), strict=True))
