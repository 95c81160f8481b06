"""FeatureProbe: every task's gradient at the shared features, before the backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mtl_dist.probes._base import Exchange, Probe
from mtl_dist.probes._branches import branch, entangled, gradients_in_one_pass, losses_of_branches
from mtl_dist.probes._features import Features, anchored, gradient_gram, split
from mtl_dist.probes._losses import Heads, Mixture, TaskLosses, evaluate
from mtl_dist.probes._mixture import SampleLosses, sample_losses
from mtl_dist.probes._partitioned import ZERO_3, find_partitioned
from mtl_dist.probes._replay import replayed
from mtl_dist.probes._units import Fsdp


@dataclass(frozen=True)
class FeatureProbe(Probe):
    """Measures `g_i = ∂l_i/∂z` inside the forward, by one activation-only pass back through the heads.

    The weights are known before the backward and reach heads and trunk alike: the engine differentiates
    `Σ α_i s_i l_i`. Gradients are taken of the unscaled local losses, so loss scale and gradient
    accumulation never enter. The Gram at z is that of the representation (the "UB" of Sener and Koltun,
    NeurIPS 2018), not of the parameters: it leaves out the trunk's Jacobian.

    One function for all tasks takes a pass a task instead of one; so do heads that share what one of them
    computed from the features, which is noticed.

    Attributes:
        reevaluate: evaluate the heads a second time for the backward, on the same random state, instead of
            keeping their graph. For engines that free parameters after their first use (ZeRO-3). Buffers of
            modules (batch statistics) are put back between the two, so they change once; other state that a
            head keeps in Python attributes changes twice. Losses that differ between the two evaluations
            are refused. None: where the engine needs it, found out at the first step.

    Raises:
        ValueError: `reevaluate=False`, and the engine partitions parameters (on every rank, before any
            collective of the step); a head that changes the features in place, or reads them past its
            argument.
    """

    reevaluate: bool | None = None

    def __call__(self, features: Any, heads: Heads, exchange: Exchange) -> Tensor:
        """`Σ α_i s_i l_i`, one collective."""
        reevaluate = exchange.measure and reevaluates(self, self.reevaluate, features, heads, exchange)
        measured = self._measured_apart(features, heads, exchange) if reevaluate else None
        shared = split(features, detach=False)
        losses = losses_at(shared, heads, exchange)
        gram: Tensor | None = None
        if measured is not None:
            first, gram = measured
            check_same(first, losses, exchange)
        elif exchange.measure:
            gram = _gram(shared, losses, exchange)
        reduced = exchange.reduce(losses.stats(gram))
        weights = exchange.decide(reduced)
        total = losses.total(weights * reduced.shares)
        return total if losses.any_present else anchored(total, shared.leaves)

    def _measured_apart(
        self, features: Any, heads: Heads, exchange: Exchange
    ) -> tuple[TaskLosses | SampleLosses, Tensor]:
        """Losses and Gram of an evaluation that leaves no trace."""
        probe = split(features, detach=True)
        with replayed(leaf.device for leaf in probe.leaves):
            losses = losses_at(probe, heads, exchange)
            return losses, _gram(probe, losses, exchange)


def reevaluates(probe: Probe, wanted: bool | None, features: Any, heads: Heads, exchange: Exchange) -> bool:
    """Whether the heads are evaluated a second time: as wanted, else where the engine needs it.

    Raises:
        ValueError: not wanted, and needed.
    """
    if wanted:
        return True
    partitioned = exchange.partitioned(
        lambda: find_partitioned(split(features, detach=False), heads, exchange.tasks)
    )
    if partitioned and wanted is False:
        name = type(probe).__name__
        raise ValueError(
            f"{name}(reevaluate=False): {ZERO_3}. Use {name}(), which then evaluates the heads a second "
            "time, or FeatureTap()"
        )
    return partitioned


def losses_at(shared: Features, heads: Heads, exchange: Exchange) -> TaskLosses | SampleLosses:
    """The heads' losses on the features.

    Raises:
        ValueError: a head changed the features in place.
    """
    exchange.once("fsdp", Fsdp).release()
    before = shared.versions
    losses = _evaluated(shared, heads, exchange)
    if shared.versions != before:
        raise ValueError(
            "a head changed the features in place (nn.ReLU(inplace=True) first?): the other heads would read "
            "what it left, and no gradient at the features is that of one task; use the form out of place"
        )
    return losses


def _evaluated(shared: Features, heads: Heads, exchange: Exchange) -> TaskLosses | SampleLosses:
    if isinstance(heads, Mixture):
        losses_of_samples = heads(shared.rebuild(shared.leaves))
        return sample_losses(losses_of_samples, heads, exchange.tasks, exchange.refuse)
    if isinstance(heads, Mapping) and exchange.measure:
        views = branch(shared, len(exchange.tasks))
        losses = losses_of_branches(shared, views, heads, exchange)
        apart = entangled(losses, views, shared, exchange.tasks) is None
        return replace(losses, views=views) if apart else losses
    values = evaluate(heads, shared.rebuild(shared.leaves), exchange.tasks)
    return exchange.collect(values, shared.leaves[0].device)


def _gram(shared: Features, losses: TaskLosses | SampleLosses, exchange: Exchange) -> Tensor:
    """`[n, n]`, the Gram that `losses.stats` takes; zero rows for tasks absent or apart from the features."""
    device = losses.counts.device
    if isinstance(losses, SampleLosses):
        with undisturbed(shared.leaves, losses, exchange):
            return losses.gram(shared.leaves, exchange.loss_scale(device))
    gram = gradient_gram(head_gradients(shared, losses, exchange), device)
    scale = exchange.loss_scale(device)
    return gram if scale is None else gram / scale.to(gram.dtype).square()


def head_gradients(
    shared: Features, losses: TaskLosses | SampleLosses, exchange: Exchange
) -> Sequence[Sequence[Tensor | None]]:
    """`∂l_i/∂z` of each task, times the loss scale where there is one; None for a zero."""
    # gradients in float16 need the loss scale to be seen at all; it is divided out of the Gram in float64
    scale = exchange.loss_scale(losses.counts.device)
    with undisturbed(shared.leaves, losses, exchange):
        if isinstance(losses, SampleLosses):
            return losses.gradients_by_task(shared.leaves, scale)
        scaled = [_scaled(loss, scale) for loss in losses.values]
        if losses.views is not None:
            return gradients_in_one_pass(scaled, losses.views)
        return [gradients_in_one_pass([loss], [shared.leaves])[0] for loss in scaled]


def undisturbed(
    leaves: Sequence[Tensor], losses: TaskLosses | SampleLosses, exchange: Exchange
) -> AbstractContextManager[None]:
    """For gradients of these losses before the backward: FSDP2 is told that it is still to come.

    Args:
        leaves: of the features.
        losses: of the heads on these features.
        exchange: of this step.
    """
    outputs = (losses.losses,) if isinstance(losses, SampleLosses) else losses.values
    present = [output for output in outputs if output is not None and output.requires_grad]
    return exchange.once("fsdp", Fsdp).undisturbed(present, leaves)


def _scaled(loss: Tensor | None, scale: Tensor | None) -> Tensor | None:
    if loss is None or scale is None:
        return loss
    # the product, not a scaled gradient of the loss: a float16 loss takes scales up to 65504 only
    return scale.to(torch.float32) * loss.to(torch.float32)


def check_same(
    first: TaskLosses | SampleLosses, second: TaskLosses | SampleLosses, exchange: Exchange
) -> None:
    """Both evaluations must give the same losses, up to the reordering of sums on accelerators."""
    pairs = list(zip(first.values, second.values, strict=True))
    differ = [_differ(a, b, second.counts.device) for a, b in pairs]
    exchange.refuse(torch.stack(differ).any(), partial(_not_reproducible, exchange.tasks, pairs, differ))


def _differ(first: Tensor | None, second: Tensor | None, device: torch.device) -> Tensor:
    if first is None or second is None:
        return torch.tensor(first is not second, device=device)
    tolerance = torch.finfo(second.dtype).eps ** 0.5
    error = (first.detach() - second.detach()).abs()
    differ: Tensor = error > tolerance * first.detach().abs()
    return differ.to(device)


def _not_reproducible(
    tasks: Sequence[str], pairs: Sequence[tuple[Tensor | None, Tensor | None]], differ: Sequence[Tensor]
) -> RuntimeError:
    task, pair = next((t, p) for t, p, d in zip(tasks, pairs, differ, strict=True) if d)
    values = [None if loss is None else loss.item() for loss in pair]
    return RuntimeError(
        f"FeatureProbe evaluates the heads twice here, and the head of task {task!r} gave {values[0]} and "
        f"then {values[1]} on the same features and random state; it must not depend on state that changes "
        "from call to call. Use FeatureTap(), or FeatureProbe(reevaluate=False) where the engine allows it"
    )
