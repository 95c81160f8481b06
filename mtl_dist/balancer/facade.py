"""The balancer: heads -> gradients -> one all-reduce -> rule -> one scalar."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mtl_dist.balancer.arguments import (
    PARAMETERS_OF_HEADS,
    CountsOf,
    OnNonfinite,
    check_own_batch,
    checked_component,
    checked_lag,
    checked_policy,
    checked_rule,
    checked_tasks,
    checked_window,
    probe_at_parameters,
)
from mtl_dist.balancer.calls import BalancerCalls, Collector
from mtl_dist.balancer.client_losses import ClientLosses
from mtl_dist.balancer.deferred import DeferredErrors
from mtl_dist.balancer.errors import explain_recomputation, explain_split
from mtl_dist.balancer.identity import identity
from mtl_dist.balancer.lagged_step import Expected, LaggedStep, Underway
from mtl_dist.balancer.progress import RuleProgress
from mtl_dist.balancer.step import Step
from mtl_dist.balancer.uses import Uses
from mtl_dist.balancer.window_guard import WindowGuard
from mtl_dist.balancer.zero_gradients import zeroed
from mtl_dist.checks import Check, DiagonalWatch, OneTaskWatch, Watches
from mtl_dist.engines import EngineView, is_rehearsal, will_run_again
from mtl_dist.losses import Counts, Heads, LayerInput, read_heads, unchanged
from mtl_dist.probes import FeatureProbe, Probe, tell_detached, without_graph
from mtl_dist.sync import Call, Identity, Kind, Synchronizer
from mtl_dist.weighting import Every, Needs, Rule


class Balancer(BalancerCalls):
    """Turns task losses into one scalar loss with weights that all ranks agree on.

    Call it in the model's forward, on the shared features and the tasks' heads, or on losses alone:

        loss = balancer(z, {"depth": lambda z: depth_loss(z, y), "normal": lambda z: normal_loss(z, y)})
        loss = balancer(z, lambda z: decode(z, y))           # one function, a mapping of losses
        loss = balancer({"depth": l1, "normal": l2})         # rules that read losses only
        loss = balancer({"depth": l1, "normal": l2}, parameters=trunk.parameters())

    With local mean losses `l_i` over `c_i` samples, rank r of W returns `Σ α_i (W c_i / C_i) l_i`. An engine
    that averages gradients over ranks then computes the gradient of `Σ α_i L_i` on the concatenated batch.

    It has no parameters and no buffers. As a submodule it follows `model.train()` and `model.eval()`, and
    adds nothing to `model.state_dict()`; `state_dict` reads its own state, and `load_state_dict` sets it.
    In eval mode or under `torch.no_grad()` it measures nothing, updates nothing, and returns the local total
    with the current weights. So it does where a pipeline stage rehearses its first step.

    Args:
        tasks: names of the n tasks, unique, the same on every rank and in the same order.
        weighting: the rule.
        probe: how gradients are measured. None: `FeatureProbe()` for rules that read gradients, nothing for
            the others. A probe that is given together with a losses-only rule measures for the report.
        group: ranks that hold different samples. None: all ranks. Tensor-parallel ranks must not be counted
            twice.
        on_nonfinite: what all ranks do about a NaN or infinite loss or gradient. "raise": `ValueError` naming
            task and rank (at the next call on an accelerator, so that the host never waits). "hold": keep the
            rule's state, use the previous weights, return the total as it is (for engines that skip such
            steps themselves, as loss scalers do). "skip": the same, and all gradients of this step are zero;
            the host waits for the flag. Under a loss scale, infinite gradients are expected now and then and
            are always held; losses are never scaled, so they follow the policy.
        window: how weights and gradient accumulation work together. None: each micro-batch is a step of the
            rule, with its own weights. k: the weights hold for windows of k micro-batches. The weights of a
            window follow from the statistics of the whole window before it, so k micro-batches of equal
            counts train like one batch that is k times as large. The first window has the weights that the
            rule gives to any batch (`Fixed`), else uniform ones.
        lag: 0: the weights of a step follow from its own statistics. 1: from those of the step before (the
            first step as the first window). Then the weights are known before the heads run and reach heads
            and trunk alike, gradients are measured as they pass in the one backward, the all-reduce runs
            beside the backward, and the rule is solved at the next call: there is no second pass and no
            wait. Errors about values come one step later. A weight of zero would hide the gradient of its
            task, so the heads receive at least 2⁻¹⁰ of the largest weight; the trunk receives the weights as
            they are.
        counts: with lag=1, "given": the counts of each step are summed over ranks in the forward. "equal":
            the user promises that all ranks have the same counts in every step, so nothing is awaited in the
            forward; the promise is checked, and a broken one is an error at the next step.
        ignore: names in a client's dictionary of losses that are no losses to train (DETR's
            "cardinality_error"). Other unknown names are refused.
        base: the fixed weight that the client gives each task (its `weight_dict`). Each loss is multiplied by
            it before anything else, so statistics, weights and reports are of base-weighted losses, and equal
            weights are the client's own total.
        check: for debugging: measure every step a second time by plain autograd, compare, and look for what
            makes weights worthless (`findings`). It costs twice as much, and the host waits.

    Raises:
        ValueError: task names empty or repeated, a rule that changes itself or that ranks cannot compare, or
            a combination that cannot work.

    Attributes:
        tasks: the task names.
        weighting: the rule; wrapped in `Every` where the probe measures only every k steps.
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
        lag: int = 0,
        counts: CountsOf = "given",
        ignore: Collection[str] = (),
        base: Mapping[str, float] | None = None,
        check: bool = False,
    ) -> None:
        super().__init__()
        self.tasks = checked_tasks(tasks)
        client = ClientLosses.checked(self.tasks, ignore, base)
        self._client = client if client.ignore or client.base is not None else None
        self._probe_given = probe is not None
        self.probe = probe if probe is not None else FeatureProbe()
        checked_component(self.probe, Probe, "probe", "FeatureProbe()")
        self.weighting = _spaced(checked_rule(weighting, self.tasks), self.probe)
        self.on_nonfinite = checked_policy(on_nonfinite, self.probe)
        self.lag, self.counts = checked_lag(lag, counts, on_nonfinite)
        check_own_batch(self.weighting, lag, window)
        self._strict = on_nonfinite == "raise"
        self._synchronizer = Synchronizer(len(self.tasks), group)
        self._errors = DeferredErrors()
        self._engine = EngineView()
        self._uses = Uses()
        self._progress = RuleProgress(
            self.tasks,
            self.weighting,
            checked_window(window, self.probe),
            self._engine,
            self._synchronizer.stopwatch,
            self._errors,
            self._uses,
            strict=self._strict,
            lag=lag > 0,
        )
        self._underway = Underway()
        self._expected: Expected | None = None
        self._check = Check(self.tasks, self.weighting, self.probe) if check else None
        told = (self.weighting, self.probe)
        self._watches = Watches(
            of_grams=[DiagonalWatch(*told)] if self.weighting.needs == Needs.GRAM else [],
            of_weights=[OneTaskWatch(*told)] if self.weighting.compares and len(self.tasks) > 1 else [],
        )
        self._memory = self.probe.memory()
        self._updates_left: int | None = None  # inside `held`
        self._twins: tuple[Balancer, ...] = ()
        self._guard = WindowGuard()
        self._collector: Collector | None = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch 2.13 leaves it unannotated
    def forward(
        self,
        features: Any,
        heads: Any = None,
        *,
        counts: Counts | None = None,
        layer: nn.Module | None = None,
        task_ids: Tensor | None = None,
        mask: Tensor | None = None,
        parameters: Any = None,
    ) -> Tensor:
        """One scalar, ready for the backward of any engine.

        Args:
            features: shared representation, a tensor or pytree of tensors, or a function without arguments
                that makes it (which `ParameterProbe` needs under ZeRO-3). Without `heads`, the losses stand
                here: a mapping from task to scalar mean loss (None or missing: no sample on this rank).
            heads: a mapping from task to a function of the features that returns the scalar mean loss (or
                None), or one function that returns such a mapping.
            counts: samples (or tokens) behind each mean, by task; numbers or scalar tensors. None: 1 for
                each task present.
            layer: the last shared layer, where `features` is its input: heads receive `layer(features)`.
                `SharedLayerProbe` measures the gradients of its weight.
            task_ids: integers `[B]` (or of the shape of any leading dimensions), the task of every sample, an
                index into `tasks`, for batches in which every sample has one task. `heads` is then one
                function from the features to the loss of every sample, `[B]` or `[B, ...]` (tokens); without
                heads, the tensor of these losses is given first. Samples must not interact in the heads.
            mask: with `task_ids`, of the losses' shape: which of them count, or the weight of each. Counts
                are its sums.
            parameters: without heads, where the gradients of the losses are measured: a module or tensors,
                the same on every rank (a layer, the trunk, a generator's last layer). Settings are those of
                `ParameterProbe`. Not where an engine shards them (FSDP2, ZeRO-3).

        Raises:
            ValueError: unknown tasks, losses that are not scalars, losses <= 0 under a rule that takes
                logarithms, a non-finite value (`on_nonfinite="raise"`), or ranks that disagree about tasks
                or rule (on every rank, at the first step).
            RuntimeError: another rank failed before this step.
        """
        if self._twins and (twin := self._virtual_twin()) is not None:
            total: Tensor = twin.forward(
                features,
                heads,
                counts=counts,
                layer=layer,
                task_ids=task_ids,
                mask=mask,
                parameters=parameters,
            )
            return total
        if self._client is not None:
            features, heads, counts = self._client.read(features, heads, counts, task_ids)
        rehearsed = is_rehearsal()
        if rehearsed or not (self.training and torch.is_grad_enabled()):
            refuse = _ignored if rehearsed else self._errors.watch
            read = read_heads(heads, counts, task_ids, mask, self.tasks, refuse)
            return self._evaluated(features, read, layer)
        return self._trained(features, heads, counts, layer, task_ids, mask, parameters)

    def _trained(
        self,
        features: Any,
        heads: Any,
        counts: Counts | None,
        layer: nn.Module | None,
        task_ids: Tensor | None,
        mask: Tensor | None,
        parameters: Any,
    ) -> Tensor:
        """A call in training mode: one step."""
        step = self._begun_step()
        try:
            if will_run_again():
                raise explain_recomputation()
            read = read_heads(heads, counts, task_ids, mask, self.tasks, step.refuse)
            total = self._total(features, read, layer, parameters, step)
        except Exception as error:
            if not step.reduced:
                self._synchronizer.announce_failure(step.first_call)
            self._underway.forget(step)
            if (split := explain_split(error)) is not None:
                raise split from error
            raise
        self._synchronizer.news = 0  # all ranks have heard of it
        if self._updates_left is not None and not step.held:
            self._updates_left -= 1
        self._uses.calls += 1
        if total.requires_grad:
            total.register_hook(self._uses.note_backward)  # type: ignore[no-untyped-call]
        window = self._progress.window
        if window is not None and window > 1 and self._engine.facts.closes_window is None:
            self._guard.follow(total, window, inside=self._progress.inside_window)
        return zeroed(total) if self.on_nonfinite == "skip" and step.not_finite() else total

    @property
    def measures(self) -> bool:
        """Whether gradients are measured at some steps: for the rule, or for the report alone."""
        return self.weighting.needs > Needs.LOSSES or self._probe_given

    def measures_at(self, step: int) -> bool:
        """Whether gradients are measured at `step`: where the rule reads them, or for the report alone."""
        if self.weighting.needs > Needs.LOSSES:
            return self.weighting.needs_at(step) > Needs.LOSSES
        return self._probe_given and step % self.probe.every == 0

    def _connect(self) -> None:
        """Raises what the step before left, and meets the other ranks where they were not met."""
        if self._errors.pending:
            self._errors.poll()
        if self._synchronizer.connect(self._identity):
            self._engine.learn(self._engine.facts)  # what was found before the ranks met may not hold

    def _begun_step(self) -> Step:
        """Begins a training call, and its step."""
        self._connect()
        if self.lag:
            self._underway.arrive()
            self._synchronizer.notice.settle()
        held = self._updates_left is not None and self._updates_left <= 0
        if not held:
            self._progress.begin()
        return self._new_step(Kind.HELD if held else Kind.TRAINING)

    def _new_call(self, kind: Kind) -> Call:
        counted = self.lag and kind in (Kind.TRAINING, Kind.COUNTS)
        ahead = self._underway.ahead(self._progress) if counted else 0
        return Call(kind, self._progress.step + ahead, self._synchronizer.news)

    def _new_step(self, kind: Kind) -> Step:
        number = self._new_call(kind).step
        parts: dict[str, Any] = {
            "tasks": self.tasks,
            "step": number,
            "rank": self._synchronizer.rank,
            "measure": kind is Kind.TRAINING and self.measures_at(number),
            "engine": self._engine,
            "memory": self._memory,
            "progress": self._progress,
            "synchronizer": self._synchronizer,
            "errors": self._errors,
            "checker": self._check,
            "watches": self._watches,
            "strict": self._strict,
            "held": kind is Kind.HELD,
            "stateful": bool(self._progress.state),
            "kind": kind,
            "counts": None if self._engine.facts.counts is None else self._engine.facts.counts(),
            "news": self._synchronizer.news,
        }
        if self.lag and kind is Kind.TRAINING:
            closed = self._progress.closed_by_engine
            expected, self._expected = self._expected, None
            return self._underway.begin(
                **parts,
                equal_counts=self.counts == "equal",
                expected=expected,
                closed=closed,
                updates=self._underway.updates_next(self._progress, closed),
            )
        return Step(**parts)

    def _total(
        self, features: Any, read: Heads, layer: nn.Module | None, parameters: Any, step: Step
    ) -> Tensor:
        if read.on_losses:
            return self._of_losses(features, read, parameters, step)
        if parameters is not None:
            raise ValueError(PARAMETERS_OF_HEADS)
        shared = self._shared(features, layer)
        if self._check is not None:
            step.check(shared, read)
        if isinstance(step, LaggedStep):
            return self.probe.lagged(shared, read, step)
        return self.probe(shared, read, step)

    def _shared(self, features: Any, layer: nn.Module | None) -> Any:
        """The features in the form that the probe takes."""
        if layer is not None and not callable(layer):
            raise TypeError(f"layer= is the last shared layer, a module, got {type(layer).__name__}")
        probe = self.probe
        if callable(features) and probe.takes_functions:
            return features if layer is None else lambda: layer(features())
        if callable(features):
            features = features()
        if layer is None:
            return features
        return LayerInput(layer, features) if probe.takes_layers else layer(features)

    def _of_losses(self, given: Any, heads: Heads, parameters: Any, step: Step) -> Tensor:
        if parameters is None and self.weighting.needs > Needs.LOSSES:
            raise ValueError(
                f"{self.weighting!r} reads gradients: call balancer(features, heads), or say where they are "
                "measured, balancer(losses, parameters=net.parameters())"
            )
        losses = heads.at(given, self._device_of(given))
        tell_detached(losses, step)
        if parameters is not None and step.measure:
            probe = probe_at_parameters(self.probe, self._probe_given, self.window)
            reduced = probe.of_losses(losses, parameters, step)
        else:
            step.measure = False
            if isinstance(step, LaggedStep):
                total = losses.total(step.coefficients(losses))
                step.send(losses.stats())
                return total if total.requires_grad else without_graph(total, losses, step)
            reduced = step.reduce(losses.stats())
        total = losses.total(step.decide(reduced, losses.dtype) * reduced.shares)
        return total if total.requires_grad else without_graph(total, losses, step)

    def _evaluated(self, given: Any, heads: Heads, layer: nn.Module | None) -> Tensor:
        if not heads.on_losses:
            given = given() if callable(given) else given
            given = given if layer is None else layer(given)
            with unchanged(given):
                losses = heads.at(given)
        else:
            losses = heads.at(given)
        if self._collector is not None:
            self._collector.add(losses.stats())
        self._underway.arrive()
        self._progress.move_to(losses.counts.device)
        return losses.total(self._progress.weights_on(losses.counts))

    def _identity(self) -> Identity:
        """What ranks compare where they meet."""
        settings = {
            "tasks": self.tasks,
            "rule": self.weighting,
            "probe": self.probe,
            "measured for the report": self._probe_given,
            "on_nonfinite": self.on_nonfinite,
            "window": self.window,
            "lag": self.lag,
            "counts": self.counts,
            **({} if self._client is None else {"ignore": self._client.ignore, "base": self._client.base}),
            "check": self._check is not None,
            "loss scale": self._engine.facts.scaled is not None,
        }
        return identity(settings, self._progress)


def _ignored(flag: Tensor, explain: Callable[[], Exception]) -> None:
    """Refuses nothing: the values mean nothing."""


def _spaced(rule: Rule, probe: Probe) -> Rule:
    """The rule, run only at the steps that the probe measures."""
    return Every(rule, probe.every) if probe.every > 1 and rule.needs > Needs.LOSSES else rule
