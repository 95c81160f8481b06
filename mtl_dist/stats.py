"""Task statistics: what one rank measures, what every rank then knows, and what the user reads.

The central idea of the library is here. Let `l_i` be the local mean loss of task i over `c_i` samples, and
`g_i = ∂l_i/∂z` its gradient at the shared features. Then the three quantities of `LocalStats` *add*: over
ranks, over micro-batches, over virtual ranks. One sum gives every rank the exact global statistics,

    C_i  = Σ_r c_i^r
    L_i  = Σ_r c_i^r l_i^r / C_i
    G_ij = Σ_r c_i^r c_j^r ⟨g_i^r, g_j^r⟩ / (C_i C_j)

which is what one process would measure on the concatenated batch. Averages of local Gram matrices or norms
are not offered, because they are wrong: the Gram matrix of an average is not the average of Gram matrices.

Statistics are float64 (float32 where the device has no float64). They are only n² numbers, so precision costs
nothing, and the square of a gradient norm of 1e-20 does not underflow.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

HOST = "cpu"  # the type of devices whose values the host reads without waiting
Lap = float | tuple[torch.Event, torch.Event]


def stats_dtype(device: torch.device) -> torch.dtype:
    """Precision of statistics on `device`: float64, or float32 on Apple's MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(frozen=True)
class LocalStats:
    """What one rank measured on its own samples. Instances can be added.

    Attributes:
        loss_sums: `[n]`, `c_i l_i`; 0 where the task is absent.
        counts: `[n]`, `c_i`, samples (or tokens) behind each local mean; 0 where the task is absent.
        gram: `[n, n]`, `c_i c_j ⟨g_i, g_j⟩`; None where gradients were not measured, which adds as zeros.
        known: the counts as numbers, where the host knows them; None: only the device does.
    """

    loss_sums: Tensor
    counts: Tensor
    gram: Tensor | None = None
    known: tuple[float, ...] | None = None

    def __add__(self, other: LocalStats) -> LocalStats:
        grams = [gram for gram in (self.gram, other.gram) if gram is not None]
        return LocalStats(
            self.loss_sums + other.loss_sums,
            self.counts + other.counts,
            grams[0] + grams[1] if len(grams) == 2 else next(iter(grams), None),
        )

    def with_gram(self, gram: Tensor) -> LocalStats:
        """These losses and counts, with a Gram."""
        return replace(self, gram=gram)

    @classmethod
    def zeros(cls, num_tasks: int, device: torch.device) -> LocalStats:
        """The statistics of a rank that saw no sample: the neutral element of `+`."""
        zeros = torch.zeros(num_tasks, dtype=stats_dtype(device), device=device)
        return cls(zeros, zeros, None, (0.0,) * num_tasks)


@dataclass(frozen=True)
class TaskStats:
    """Global statistics of one step, the same on every rank. The only input of a rule besides its state.

    Attributes:
        losses: `[n]`, global mean losses. Entries of absent tasks hold 1 and carry no information.
        present: `[n]` bool, whether any rank had a sample of the task.
        gram: `[n, n]`, inner products of the tasks' gradients, true values (loss scale and accumulation
            divided out); zero rows and columns for absent tasks. None where the rule asked for no gradients.
        counts: `[n]`, global numbers of samples. Where the engine knows those of the whole optimizer step
            (`Engine.counts`), they stand here, also for tasks that are absent in this micro-batch.
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

    def guarded(self, bad: Tensor) -> TaskStats:
        """These statistics, but harmless ones where `bad` (scalar bool) holds: losses 1, Gram identity.

        So a rule never sees NaN or infinity, and the host does not have to wait for the decision.
        """
        losses = self.losses.masked_fill(bad, 1)
        if self.gram is None:
            return replace(self, losses=losses)
        eye = _identity(len(losses), self.gram.dtype, self.gram.device)
        return replace(self, losses=losses, gram=torch.where(bad, eye, self.gram))


@lru_cache(maxsize=64)
def _identity(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.eye(n, dtype=dtype, device=device)


def global_stats(total: LocalStats, step: int, *, with_gram: bool) -> TaskStats:
    """Statistics of the concatenated batch from the sum over ranks: the equations at the top of this file."""
    absent = total.counts <= 0
    counts = total.counts.masked_fill(absent, 1)
    # L_i = Σ c_i l_i / C_i
    losses = (total.loss_sums / counts).masked_fill(absent, 1)
    gram = None
    if with_gram:
        # G_ij = Σ c_i c_j <g_i, g_j> / (C_i C_j)
        pairs = torch.outer(counts, counts)
        gram = torch.zeros_like(pairs) if total.gram is None else total.gram / pairs
    return TaskStats(losses, ~absent, gram, total.counts, step)


@dataclass(frozen=True)
class Elapsed:
    """A measured time.

    Attributes:
        laps: each lap is a number of seconds on the host, or the two events before and after it on an
            accelerator's stream.
    """

    laps: tuple[Lap, ...] = ()

    def seconds(self) -> float:
        """The sum of all laps. It waits for their events, so read it long after the step."""
        return sum(map(_seconds, self.laps))


@dataclass(frozen=True)
class StepReport:
    """What happened in one step, for people and trackers. Tensors stay on the device until they are read.

    Attributes:
        tasks: task names, in the order of every vector here.
        stats: the global statistics the weights came from.
        weight_vector: `[n]`, the weights; 0 for tasks absent on all ranks.
        held: scalar bool, whether a non-finite statistic made the balancer keep the previous weights.
        sync: time spent in collectives since the previous report.
    """

    tasks: tuple[str, ...]
    stats: TaskStats
    weight_vector: Tensor
    held: Tensor
    sync: Elapsed = field(default_factory=Elapsed)

    @property
    def step(self) -> int:
        """Number of updates of the rule before this one; 0 in the first report."""
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


def _seconds(lap: Lap) -> float:
    if isinstance(lap, float):
        return lap
    before, after = lap
    after.synchronize()
    return float(before.elapsed_time(after)) / 1e3
