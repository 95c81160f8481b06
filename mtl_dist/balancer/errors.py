"""Errors about the statistics of a step, in words: which task, which value, which rank, what to do."""

from __future__ import annotations

from collections.abc import Sequence

from mtl_dist.stats import TaskStats
from mtl_dist.sync import Faults
from mtl_dist.weighting import Rule


class PeerFailed(RuntimeError):
    """Another rank failed; the error of that rank says why."""


def explain_failure(step: int, faults: Faults) -> PeerFailed:
    """The error of a rank whose peer failed. Reads values from the device."""
    return PeerFailed(
        f"mtl_dist, step {step}: {_ranks(*faults.failure.tolist())} failed before it had its statistics; "
        "the error printed there says why"
    )


def explain_nonfinite(tasks: Sequence[str], step: int, faults: Faults) -> ValueError:
    """The error for a NaN or infinity: which task, which rank. Reads values from the device."""
    bad = [
        f"task {task!r} on {_ranks(number, ranks)}"
        for task, number, ranks in zip(tasks, faults.counts.tolist(), faults.rank_sums.tolist(), strict=True)
        if number > 0
    ]
    if not bad:
        return ValueError(
            f"mtl_dist, step {step}: the scalar was differentiated with the factor 0 on a rank, as in "
            "(0 * loss).backward(), and FeatureTap sees no gradient then. To leave a batch out, return None "
            'from its heads; or give on_nonfinite="hold", which keeps the weights, or use FeatureProbe()'
        )
    return ValueError(
        f"mtl_dist, step {step}: a loss or its gradient at the features is NaN or infinite: "
        f"{', '.join(bad)}. Look at that task's data and learning rate, or give "
        'on_nonfinite="skip" or "hold"'
    )


def explain_refusal(tasks: Sequence[str], rule: Rule, stats: TaskStats) -> ValueError:
    """The error for finite statistics that a rule cannot take. Reads values from the device."""
    losses = dict(zip(tasks, stats.losses.tolist(), strict=True))
    if rule.positive_losses and min(losses.values()) <= 0:
        low = {task: value for task, value in losses.items() if value <= 0}
        none = (
            " A loss of exactly 0 that stands for a batch without samples of the task is no loss: return "
            "None for it, or give its number of samples, counts={task: 0}."
        )
        return ValueError(
            f"mtl_dist, step {stats.step}: {rule!r} takes logarithms or powers of losses and needs them > 0, "
            f"got {low}.{none if 0 in low.values() else ''} Add a constant that makes the loss positive, or "
            "use a rule that reads gradients"
        )
    return ValueError(
        f"mtl_dist, step {stats.step}: {rule!r} gave weights that are not finite, or too large for the "
        f"precision of the total, for losses {losses}. Bound them with Clamp(rule, low, high), or give "
        'on_nonfinite="hold", which keeps the previous weights'
    )


def explain_recomputation() -> RuntimeError:
    """The error for a call that the backward would run a second time."""
    return RuntimeError(
        "mtl_dist: the balancer is called inside torch.utils.checkpoint(..., use_reentrant=False), which "
        "runs the call again in the backward, as another step with other weights: checkpoint the trunk "
        "and the heads, and call the balancer outside"
    )


def _ranks(number: float, rank_sum: float) -> str:
    return f"rank {int(rank_sum)}" if number == 1 else f"{int(number)} ranks"
