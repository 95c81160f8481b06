"""The facade: probe -> one all-reduce -> rule -> one scalar."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mtl_dist._alarm import Alarm
from mtl_dist._explain import explain_failure, explain_refusal
from mtl_dist._quench import Quench
from mtl_dist._validate import (
    OnNonfinite,
    check_same_state,
    checked_losses,
    checked_policy,
    checked_tasks,
)
from mtl_dist.probes import Counts, FeatureProbe, Heads, Losses, Probe, Reduced, TaskLosses
from mtl_dist.probes._losses import collect, evaluate
from mtl_dist.stats import LocalStats, StepReport, TaskStats, global_stats, stats_dtype
from mtl_dist.sync import Synchronizer
from mtl_dist.weighting import Needs, Rule, State

_STATE_PREFIX = "rule."


class Balancer(nn.Module):
    """Turns task losses into one scalar loss with weights that all ranks agree on.

    Call it in the model's forward, on the shared features and the tasks' heads, or on losses alone:

        loss = balancer(z, {"depth": lambda z: depth_loss(z, y), "normal": lambda z: normal_loss(z, y)})
        loss = balancer(z, lambda z: decode(z, y))           # one function, a mapping of losses
        loss = balancer({"depth": l1, "normal": l2})         # rules that read losses only

    With local mean losses `l_i` over `c_i` samples, rank r of W returns `Σ α_i (W c_i / C_i) l_i`. An engine
    that averages gradients over ranks then computes the gradient of `Σ α_i L_i` on the concatenated batch.

    It holds no parameters and no buffers. As a submodule it follows `model.train()` and `model.eval()` and
    adds nothing to `model.state_dict()`; its own state is read and set with `state_dict` and
    `load_state_dict`. In eval mode or under `torch.no_grad()` it measures nothing, updates nothing, and
    returns the local total with the current weights.

    Args:
        tasks: names of the n tasks, unique, the same on every rank and in the same order.
        weighting: the rule.
        probe: how gradients are measured. None: `FeatureProbe()` for rules that read gradients, nothing for
            the others. A probe given beside a losses-only rule measures for the report.
        group: ranks that hold different samples. None: all ranks. Tensor-parallel ranks must not be counted
            twice.
        on_nonfinite: what all ranks do about a NaN or infinite loss or gradient. "raise": `ValueError` naming
            task and rank (at the next call on an accelerator, so that the host never waits). "hold": keep the
            rule's state, use the previous weights, return the total as it is (for engines that skip such
            steps themselves, as loss scalers do). "skip": the same, and all gradients of this step are zero;
            the host waits for the flag.

    Raises:
        ValueError: task names empty or repeated, or a combination that cannot work.

    Attributes:
        report: `StepReport` of the last training step; None before the first.
        step: number of training steps taken.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        weighting: Rule,
        *,
        probe: Probe | None = None,
        group: dist.ProcessGroup | None = None,
        on_nonfinite: OnNonfinite = "raise",
    ) -> None:
        super().__init__()
        self.tasks = checked_tasks(tasks)
        self.weighting = weighting
        self._probe_given = probe is not None
        self.probe = probe if probe is not None else FeatureProbe()
        self.on_nonfinite = checked_policy(on_nonfinite, self.probe)
        self.step = 0
        self.report: StepReport | None = None
        self._synchronizer = Synchronizer(len(self.tasks), group)
        self._alarm = Alarm()
        self._quench = Quench()
        cpu = torch.device("cpu")
        self._state: State = weighting.init(self.tasks, cpu)
        self._weights = torch.full((len(self.tasks),), 1 / len(self.tasks), dtype=stats_dtype(cpu))

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch 2.13 leaves it unannotated
    def forward(self, features: Any, heads: Heads | None = None, *, counts: Counts | None = None) -> Tensor:
        """One scalar, ready for any engine's backward.

        Args:
            features: shared representation, a tensor or pytree of tensors; or, without `heads`, the losses:
                a mapping from task to scalar mean loss (None or absent: no sample on this rank).
            heads: a mapping from task to a function of the features that returns the scalar mean loss (or
                None), or one function that returns such a mapping.
            counts: samples (or tokens) behind each mean, by task; numbers or scalar tensors. None: 1 for
                each task present.

        Raises:
            ValueError: unknown tasks, losses that are no scalars, losses <= 0 under a rule that takes
                logarithms, a non-finite value (`on_nonfinite="raise"`), or ranks that disagree about tasks
                or rule (on every rank, at the first step).
            RuntimeError: another rank failed before this step.
        """
        if not (self.training and torch.is_grad_enabled()):
            return self._evaluated(features, heads, counts)
        self._quench.release()
        self._alarm.poll()
        self._synchronizer.connect(self._fingerprint())
        step = _Step(self, counts)
        try:
            if heads is not None:
                total = self.probe(features, heads, step)
            else:
                total = self._of_losses(features, step)
        except Exception:
            if not step.reduced:
                self._synchronizer.announce_failure()
            raise
        if self.on_nonfinite == "skip" and self.report is not None and bool(self.report.held):
            total = self._quench(total, features)
        return total

    def observe(self, losses: Losses, *, counts: Counts | None = None) -> None:
        """Hands losses measured outside the step to the rule; all ranks must call it.

        For rules that learn from them (`weighting.observes`): the batch's losses after the optimizer's step
        (FAMO), or validation losses (CoBa). One all-reduce; nothing is returned, weights change at the next
        step.

        Args:
            losses: scalar mean loss by task, of this rank's samples; None or absent where there are none.
            counts: samples behind each mean, as in a training step.

        Raises:
            ValueError: the rule does not learn from such losses, or as in a training step.
        """
        if not self.weighting.observes:
            raise ValueError(f"{self.weighting!r} takes no losses from outside the step: do not call observe")
        self._alarm.poll()
        self._synchronizer.connect(self._fingerprint())
        step = _Step(self, counts)
        with torch.no_grad():
            local = step.collect(checked_losses(losses), self._device_of(losses)).stats()
            reduced = step.reduce(local)
            stats = global_stats(reduced.total, self.step, with_gram=False)
            sound, refused = self._inspected(stats, reduced)
            state = self.weighting.observe(stats.guarded(sound), self._state)
        self._refuse(refused, stats, reduced)
        self._state = _chosen(sound, state, self._state)

    def state_dict(  # type: ignore[override]  # torch's overloads return what they are given
        self, *, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """Everything the next step depends on: tensors, strings and numbers.

        As a submodule's (`destination` given) it adds nothing, so that model checkpoints do not depend on
        how the model was trained.
        """
        if destination is not None:
            return destination
        self._alarm.poll()
        state = {_STATE_PREFIX + key: value.detach().clone() for key, value in self._state.items()}
        header = {"tasks": list(self.tasks), "rule": repr(self.weighting), "step": self.step}
        return {**header, "weights": self._weights.clone(), **state}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> None:
        """Continues from a `state_dict`, bit for bit.

        Raises:
            ValueError: it belongs to other tasks or another rule; nothing is changed then.
        """
        expected = self.state_dict()
        check_same_state(expected, state_dict)
        self.step = int(state_dict["step"])
        self._weights = state_dict["weights"].detach().clone()
        rule_keys = [key for key in expected if key.startswith(_STATE_PREFIX)]
        self._state = {key.removeprefix(_STATE_PREFIX): state_dict[key].detach().clone() for key in rule_keys}
        self.report = None

    def set_group(self, group: dist.ProcessGroup | None) -> None:
        """Sets the data-parallel group before the first step.

        Raises:
            RuntimeError: a step was already taken with another group.
        """
        self._synchronizer.set_group(group)

    @property
    def weights(self) -> dict[str, float]:
        """The current weight of each task: that of the last step it was present in."""
        return dict(zip(self.tasks, self._weights.tolist(), strict=True))

    def extra_repr(self) -> str:
        """Tasks, rule and probe."""
        return f"{list(self.tasks)}, {self.weighting}, probe={self.probe}, on_nonfinite={self.on_nonfinite!r}"

    def measures_at(self, step: int) -> bool:
        """Whether gradients are measured at `step`: where the rule reads them, or for the report alone."""
        if self.weighting.needs > Needs.LOSSES:
            return self.weighting.needs_at(step) > Needs.LOSSES
        return self._probe_given

    def _of_losses(self, losses: Any, step: _Step) -> Tensor:
        if self.weighting.needs > Needs.LOSSES:
            raise ValueError(
                f"{self.weighting!r} reads gradients: call balancer(features, heads), not balancer(losses)"
            )
        step.measure = False
        collected = step.collect(checked_losses(losses), self._device_of(losses))
        reduced = step.reduce(collected.stats())
        weights = step.decide(reduced)
        total = collected.total(weights * reduced.shares)
        return total if collected.any_present else total.requires_grad_()

    def _evaluated(self, features: Any, heads: Heads | None, counts: Counts | None) -> Tensor:
        losses = checked_losses(features) if heads is None else evaluate(heads, features, self.tasks)
        collected = collect(losses, counts, self.tasks, self._device_of(losses))
        self._move_to(collected.counts.device)
        return collected.total(self._weights)

    def _device_of(self, losses: Any) -> torch.device:
        values = losses.values() if isinstance(losses, Mapping) else ()
        return next((value.device for value in values if isinstance(value, Tensor)), self._weights.device)

    def _move_to(self, device: torch.device) -> None:
        if self._weights.device != device:
            dtype = stats_dtype(device)
            self._weights = self._weights.to(device, dtype)
            self._state = {
                key: value.to(device, dtype if value.is_floating_point() else None)
                for key, value in self._state.items()
            }

    def _fingerprint(self) -> str:
        return f"tasks {list(self.tasks)}, rule {self.weighting!r}, probe {self.probe!r}"

    def _take(self, reduced: Reduced, *, measured: bool) -> Tensor:
        """One update of the rule; every decision on the device. Returns the weights used, `[n]`."""
        stats = global_stats(reduced.total, self.step, with_gram=measured)
        present = stats.present
        sound, refused = self._inspected(stats, reduced)
        weights, state = self.weighting.update(stats.guarded(sound), self._state)
        usable = weights.isfinite().all()
        self._refuse(refused | ~usable if self.on_nonfinite == "raise" else refused, stats, reduced)
        sound = sound & usable
        self._weights = torch.where(sound & present, weights, self._weights)
        self._state = _chosen(sound, state, self._state)
        used = torch.where(present, self._weights, torch.zeros_like(self._weights))
        self.report = StepReport(self.tasks, stats, used, ~sound, self._synchronizer.stopwatch.take())
        self.step += 1
        return used

    def _inspected(self, stats: TaskStats, reduced: Reduced) -> tuple[Tensor, Tensor]:
        """Scalar bools: whether the rule may see these statistics, and whether they are an error."""
        finite = stats.losses.isfinite().all() & reduced.total.gram.isfinite().all()
        out_of_domain = (stats.present & (stats.losses <= 0)).any() & self.weighting.positive_losses
        sound = finite & ~out_of_domain & (reduced.faults.failure[0] == 0)
        return sound, out_of_domain | ~finite if self.on_nonfinite == "raise" else out_of_domain

    def _refuse(self, refused: Tensor, stats: TaskStats, reduced: Reduced) -> None:
        explain = partial(explain_refusal, self.tasks, self.weighting, stats, reduced.faults)
        self._alarm.watch(refused, explain)


class _Step:
    """One training step of a balancer, as a probe sees it (`Exchange`)."""

    def __init__(self, balancer: Balancer, counts: Counts | None) -> None:
        self.tasks: Sequence[str] = balancer.tasks
        self.measure = balancer.measures_at(balancer.step)
        self.reduced = False
        self._balancer = balancer
        self._counts = counts

    def collect(self, losses: Losses, device: torch.device) -> TaskLosses:
        """Checks the losses and adds the counts of this call."""
        return collect(losses, self._counts, self.tasks, device)

    def reduce(self, local: LocalStats, faulty: Tensor | None = None) -> Reduced:
        """One all-reduce."""
        balancer = self._balancer
        balancer._move_to(local.counts.device)
        self.reduced = True
        total, faults = balancer._synchronizer.reduce(local, faulty)
        self.watch(faults.failure[0] > 0, partial(explain_failure, balancer.step, faults))
        world_size = balancer._synchronizer.world_size
        # s_i = W c_i / C_i
        shares = world_size * local.counts / torch.where(total.counts > 0, total.counts, 1)
        return Reduced(total, faults, shares, world_size)

    def scatter_sum(self, rows: Tensor) -> Tensor:
        """This rank's piece of a sum over ranks."""
        return self._balancer._synchronizer.scatter_sum(rows)

    def gather_rows(self, rows: Tensor) -> Tensor:
        """The rows of all ranks."""
        return self._balancer._synchronizer.gather_rows(rows)

    def watch(self, flag: Tensor, explain: Callable[[], Exception]) -> None:
        """Raises `explain()` where `flag` holds."""
        self._balancer._alarm.watch(flag, explain)

    def decide(self, reduced: Reduced) -> Tensor:
        """`[n]` weights, the same on every rank."""
        return self._balancer._take(reduced, measured=self.measure)


def _chosen(sound: Tensor, new: State, old: State) -> State:
    """The new state where `sound` holds, else the old one."""
    return {key: torch.where(sound, new[key], value) for key, value in old.items()}
