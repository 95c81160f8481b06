"""Errors about the statistics of a step, in words: which task, which value, which rank, what to do."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.sync import Bad, Faults, Summed
from mtl_dist.weighting import Rule


class PeerFailed(RuntimeError):
    """Another rank failed; the error of that rank says why."""


def explain_failure(step: int, faults: Faults) -> PeerFailed:
    """The error of a rank whose peer failed."""
    return PeerFailed(
        f"mtl_dist, step {step}: {faults.failure} failed before it had its statistics; "
        "the error printed there says why"
    )


def explain_split(error: Exception) -> ValueError | None:
    """The error where plain tensors meet tensors that tensor parallelism splits; None: it is another one."""
    if "mixed torch.Tensor and DTensor" not in str(error):
        return None
    return ValueError(
        "mtl_dist: tensors that tensor parallelism splits (DTensor) meet plain ones. In heads, give "
        "x.full_tensor() of what is split. ParameterProbe and SharedLayerProbe do not measure parameters "
        f"that are split: use FeatureProbe() or FeatureTap(). torch says: {str(error).splitlines()[0]}"
    )


def explain_nonfinite(
    tasks: Sequence[str],
    step: int,
    summed: Sequence[Summed],
    *,
    losses_only: bool,
    scale: Tensor | None = None,
    late: bool = False,
) -> ValueError | None:
    """The error for a NaN or infinity: which task, which rank; None: there is none.

    Args:
        tasks: names of the n tasks.
        step: of the balancer.
        summed: what was reduced in this step. The first fault of a task is the cause, a later one only its
            consequence.
        losses_only: whether gradients may be infinite.
        scale: what the step's scalar was differentiated with; None: not measured so.
        late: whether the step cannot be skipped any more.
    """
    faults = [one.faults for one in summed]
    if all(one.losses_are_finite() if losses_only else one.all_finite() for one in faults):
        return None
    bad: dict[str, Bad] = {}
    for one in faults:
        for task, ranks in zip(tasks, one.by_task(), strict=True):
            if ranks.number:
                bad.setdefault(task, ranks)
    if not bad or (scale is not None and not scale):
        return ValueError(
            f"mtl_dist, step {step}: the scalar was differentiated with the factor 0 on a rank, as in "
            "(0 * loss).backward(), and no gradient is seen then. To leave a batch out, return None "
            'from its heads; or give on_nonfinite="hold", which keeps the weights, or use FeatureProbe()'
        )
    where = ", ".join(f"task {task!r} on {bad[task]}" for task in tasks if task in bad)
    return ValueError(
        f"mtl_dist, step {step}: a loss or its gradient at the features is NaN or infinite: "
        f"{where}. Look at that task's data and learning rate, or give "
        + ('on_nonfinite="hold"' if late else 'on_nonfinite="skip" or "hold"')
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
