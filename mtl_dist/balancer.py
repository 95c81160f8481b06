"""The facade: probe -> one all-reduce -> rule -> one scalar."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mtl_dist._alarm import Alarm
from mtl_dist._check import Check
from mtl_dist._course import Course
from mtl_dist._engine import Engine
from mtl_dist._explain import explain_refusal
from mtl_dist._findings import Finding
from mtl_dist._quench import Quench
from mtl_dist._step import Session, Step
from mtl_dist._validate import (
    OnNonfinite,
    check_same_state,
    checked_losses,
    checked_policy,
    checked_tasks,
    checked_window,
)
from mtl_dist.probes import Counts, FeatureProbe, Heads, Losses, Probe, TaskLosses
from mtl_dist.probes._layer import LayerInput
from mtl_dist.probes._losses import Mixture, collect, evaluate
from mtl_dist.probes._mixture import SampleLosses, mixed, sample_losses
from mtl_dist.stats import StepReport, TaskStats
from mtl_dist.sync import Synchronizer, Wire, virtual_rank
from mtl_dist.weighting import Every, Needs, Rule

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
            the host waits for the flag. Under a loss scale, infinite gradients are expected now and then and
            are always held; losses, which are never scaled, follow the policy.
        window: how weights and gradient accumulation go together. None: each micro-batch is a step of the
            rule, with its own weights. k: the weights hold for windows of k micro-batches, and each window's
            weights are computed from the statistics of the whole window before (uniform in the first), so
            that k micro-batches of equal counts train like one batch k times as large.
        check: for debugging: measure every step a second time by plain autograd, compare, and look for what
            makes weights worthless (`findings`). Twice the cost, and the host waits.

    Raises:
        ValueError: task names empty or repeated, or a combination that cannot work.

    Attributes:
        tasks: the task names.
        weighting: the rule; held by `Every` where the probe measures each k-th step.
        probe: how gradients are measured.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        weighting: Rule,
        *,
        probe: Probe | None = None,
        group: dist.ProcessGroup | None = None,
        on_nonfinite: OnNonfinite = "raise",
        window: int | None = None,
        check: bool = False,
    ) -> None:
        super().__init__()
        self.tasks = checked_tasks(tasks)
        self._probe_given = probe is not None
        self.probe = probe if probe is not None else FeatureProbe()
        self.weighting = _spaced(weighting, self.probe)
        self.on_nonfinite = checked_policy(on_nonfinite, self.probe)
        strict = on_nonfinite == "raise"
        self._synchronizer = Synchronizer(len(self.tasks), group)
        self._alarm = Alarm()
        self._quench = Quench()
        self._course = Course(
            self.tasks,
            self.weighting,
            checked_window(window, self.probe),
            self._synchronizer.stopwatch,
            strict=strict,
            refuse=self._refuse,
        )
        self._check = Check(self.tasks, self.weighting, self.probe) if check else None
        self._session = Session(
            self.probe, strict, self._synchronizer, self._alarm, self._course, self._check
        )
        self._twins: tuple[Balancer, ...] = ()

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch 2.13 leaves it unannotated
    def forward(
        self,
        features: Any,
        heads: Heads | None = None,
        *,
        counts: Counts | None = None,
        layer: nn.Module | None = None,
        task_ids: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """One scalar, ready for any engine's backward.

        Args:
            features: shared representation, a tensor or pytree of tensors, or a function without arguments
                that makes it (which `ParameterProbe` needs under ZeRO-3); or, without `heads`, the losses: a
                mapping from task to scalar mean loss (None or absent: no sample on this rank).
            heads: a mapping from task to a function of the features that returns the scalar mean loss (or
                None), or one function that returns such a mapping.
            counts: samples (or tokens) behind each mean, by task; numbers or scalar tensors. None: 1 for
                each task present.
            layer: the last shared layer, where `features` is its input: heads are given `layer(features)`.
                `SharedLayerProbe` measures the gradients of its weight.
            task_ids: integers `[B]` (or of the shape of any leading dimensions), the task of every sample, an
                index into `tasks`, for batches in which every sample has one task. `heads` is then one
                function from the features to the loss of every sample, `[B]` or `[B, ...]` (tokens); without
                heads, `features` is that tensor of losses. Samples must not touch each other in the heads.
            mask: with `task_ids`, of the losses' shape: which of them count, or the weight of each. Counts
                are its sums.

        Raises:
            ValueError: unknown tasks, losses that are no scalars, losses <= 0 under a rule that takes
                logarithms, a non-finite value (`on_nonfinite="raise"`), or ranks that disagree about tasks
                or rule (on every rank, at the first step).
            RuntimeError: another rank failed before this step.
        """
        if (twin := self._virtual_twin()) is not None:
            total: Tensor = twin(features, heads, counts=counts, layer=layer, task_ids=task_ids, mask=mask)
            return total
        if not (self.training and torch.is_grad_enabled()):
            return self._evaluated(features, mixed(heads, counts, task_ids, mask), counts, layer)
        self._quench.release()
        self._alarm.poll()
        self._synchronizer.connect(self._fingerprint())
        self._course.begin()
        step = self._session.step(counts, measure=self.measures_at(self.step))
        try:
            heads = mixed(heads, counts, task_ids, mask)
            if heads is None or (isinstance(heads, Mixture) and heads.function is None):
                total = self._of_losses(features, heads, step)
            else:
                shared = self._shared(features, layer)
                step.check(shared, heads)
                total = self.probe(shared, heads, step)
        except Exception:
            if not step.reduced:
                self._synchronizer.announce_failure()
            raise
        return self._quench(total, features) if self.on_nonfinite == "skip" and step.unsound() else total

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
        step = self._session.step(counts, measure=False)
        with torch.no_grad():
            local = step.collect(checked_losses(losses), self._device_of(losses)).stats()
            step.observe(step.reduce(local))

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
        course = self._course
        course.settle()
        state = {_STATE_PREFIX + key: value.detach().clone() for key, value in course.state.items()}
        header = {"tasks": list(self.tasks), "rule": repr(self.weighting), "step": course.step}
        return {**header, "weights": course.weights.clone(), **state}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> None:
        """Continues from a `state_dict`, bit for bit.

        Raises:
            ValueError: it belongs to other tasks or another rule; nothing is changed then.
        """
        expected = self.state_dict()
        check_same_state(expected, state_dict)
        rule_keys = [key for key in expected if key.startswith(_STATE_PREFIX)]
        state = {key.removeprefix(_STATE_PREFIX): state_dict[key].detach().clone() for key in rule_keys}
        self._course.restart(state, state_dict["weights"].detach().clone(), int(state_dict["step"]))
        for twin in self._twins:
            twin.load_state_dict(state_dict)

    def become_virtual(self, wires: Sequence[Wire]) -> None:
        """Becomes rank 0 of several in one process, with a copy of itself for each of the others.

        `mtl_dist.virtual.VirtualRanks` calls it.

        Raises:
            RuntimeError: a step was already taken.
        """
        self._twins = ()
        twins = [copy.deepcopy(self) for _ in wires[1:]]
        for balancer, wire in zip([self, *twins], wires, strict=True):
            balancer._synchronizer.use(wire)
        self._twins = tuple(twins)

    def check_virtual_agreement(self) -> None:
        """Raises `RuntimeError` unless all virtual ranks hold bitwise the same weights."""
        for rank, twin in enumerate(self._twins, start=1):
            if not torch.equal(twin._course.weights, self._course.weights):
                raise RuntimeError(
                    f"mtl_dist: virtual rank {rank} has weights {twin.weights}, rank 0 {self.weights}; "
                    "the rule, the probe or a head takes something that is not the same on all ranks"
                )

    def _virtual_twin(self) -> Balancer | None:
        """The copy that the running virtual rank calls; None for rank 0 and for real ranks."""
        rank = virtual_rank.get()
        if not rank or not self._twins:
            return None
        twin = self._twins[rank - 1]
        return twin.train(self.training)

    def set_group(self, group: dist.ProcessGroup | None) -> None:
        """Sets the data-parallel group before the first step.

        Raises:
            RuntimeError: a step was already taken with another group.
        """
        self._synchronizer.set_group(group)

    def set_engine(self, engine: Engine) -> None:
        """Tells the balancer about the engine: loss scale, skipped steps, accumulation, partitioning.

        The integrations' `attach` calls it; call it before the first step.

        Raises:
            ValueError: the weights hold for another number of micro-batches than the engine accumulates.
        """
        if self.window is not None and engine.accumulation not in (None, self.window):
            raise ValueError(
                f"the balancer holds its weights for window={self.window} micro-batches, and the engine "
                f"accumulates {engine.accumulation}: give both the same number"
            )
        self._course.engine = engine
        self._session.partitioned = None

    @property
    def report(self) -> StepReport | None:
        """What happened in the last training step (the last whole window); None before the first."""
        return self._course.report

    @report.setter
    def report(self, report: StepReport | None) -> None:  # by checkpoints, which bring it back
        self._course.report = report

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What `check=True` found, in the order it was found; virtual ranks after rank 0."""
        checks = [balancer._check for balancer in (self, *self._twins)]
        return tuple(finding for check in checks if check is not None for finding in check.findings.all())

    @property
    def step(self) -> int:
        """Number of training steps (windows, where weights are held) taken and not skipped by the engine."""
        return self._course.step

    @property
    def window(self) -> int | None:
        """Micro-batches for which the weights hold; None where each has its own."""
        return self._course.window

    @property
    def weights(self) -> dict[str, float]:
        """The current weight of each task: that of the last step it was present in."""
        return dict(zip(self.tasks, self._course.weights.tolist(), strict=True))

    def extra_repr(self) -> str:
        """Tasks, rule and probe."""
        window = "" if self.window is None else f", window={self.window}"
        policy = f"on_nonfinite={self.on_nonfinite!r}"
        return f"{list(self.tasks)}, {self.weighting}, probe={self.probe}, {policy}{window}"

    def measures_at(self, step: int) -> bool:
        """Whether gradients are measured at `step`: where the rule reads them, or for the report alone."""
        if self.weighting.needs > Needs.LOSSES:
            return self.weighting.needs_at(step) > Needs.LOSSES
        return self._probe_given and step % self.probe.every == 0

    def _shared(self, features: Any, layer: nn.Module | None) -> Any:
        """The features as the probe wants them."""
        probe = self.probe
        if callable(features) and probe.takes_functions:
            return features if layer is None else lambda: layer(features())
        if callable(features):
            features = features()
        if layer is None:
            return features
        return LayerInput(layer, features) if probe.takes_layers else layer(features)

    def _of_losses(self, losses: Any, mixture: Mixture | None, step: Step) -> Tensor:
        if self.weighting.needs > Needs.LOSSES:
            raise ValueError(
                f"{self.weighting!r} reads gradients: call balancer(features, heads), not balancer(losses)"
            )
        step.measure = False
        collected: TaskLosses | SampleLosses
        if mixture is not None:
            collected = sample_losses(losses, mixture, self.tasks, step.refuse)
        else:
            collected = step.collect(checked_losses(losses), self._device_of(losses))
        reduced = step.reduce(collected.stats())
        weights = step.decide(reduced)
        total = collected.total(weights * reduced.shares)
        return total if collected.any_present else total.requires_grad_()

    def _evaluated(
        self, features: Any, heads: Heads | None, counts: Counts | None, layer: nn.Module | None
    ) -> Tensor:
        if heads is not None:
            features = features() if callable(features) else features
            features = features if layer is None else layer(features)
        collected: TaskLosses | SampleLosses
        if isinstance(heads, Mixture):
            collected = sample_losses(heads(features), heads, self.tasks, self._alarm.watch)
        else:
            losses = checked_losses(features) if heads is None else evaluate(heads, features, self.tasks)
            collected = collect(losses, counts, self.tasks, self._device_of(losses))
        self._course.move_to(collected.counts.device)
        return collected.total(self._course.weights)

    def _device_of(self, losses: Any) -> torch.device:
        values = losses.values() if isinstance(losses, Mapping) else ()
        return next(
            (value.device for value in values if isinstance(value, Tensor)), self._course.weights.device
        )

    def _fingerprint(self) -> str:
        settings = f"tasks {list(self.tasks)}, rule {self.weighting!r}, probe {self.probe!r}"
        return settings if self.window is None else f"{settings}, window {self.window}"

    def _refuse(self, refused: Tensor, stats: TaskStats) -> None:
        self._alarm.watch(refused, partial(explain_refusal, self.tasks, self.weighting, stats))


def _spaced(rule: Rule, probe: Probe) -> Rule:
    """The rule, run at the steps that the probe measures only."""
    return Every(rule, probe.every) if probe.every > 1 and rule.needs > Needs.LOSSES else rule
