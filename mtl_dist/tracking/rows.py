"""StepReport -> one flat row of numbers. The keys are a contract that every tracker and dashboard reads.

    train/global_step        optimizer steps done, from 1; the x axis of every chart
    train/loss               the weighted total, over all ranks
    mtl/weight/<task>        0 where the task was absent on all ranks
    mtl/loss/<task>          global mean loss
    mtl/grad_norm/<task>     norm of the task's gradient at the shared features
    mtl/contribution/<task>  |weight| · grad_norm: the length of what the task adds to the update
    mtl/cosine/<a>__<b>      between the gradients of two tasks, a before b in task order
    mtl/conflict_rate        share of those pairs with a negative cosine
    mtl/weight_entropy       of the normalised weights, in nats; log n when all are equal
    mtl/held                 1 at steps whose statistics were not finite; the key is absent otherwise

The program that measures time adds `perf/step_ms`, the wall time of the step in milliseconds.
A key whose value does not exist at a step (an absent task, gradients not measured, a zero gradient's angle)
is left out of the row.
"""

from __future__ import annotations

import math
from itertools import combinations

from mtl_dist.stats import StepReport

Row = dict[str, float]


def step_row(report: StepReport, global_step: int) -> Row:
    """The row of one optimizer step. Moves the report's tensors to the host.

    Args:
        report: what the balancer reports of the step.
        global_step: optimizer steps done, this one included.
    """
    weights, losses = report.weights, report.losses
    present = {task: loss for task, loss in losses.items() if not math.isnan(loss)}
    row: Row = {
        "train/global_step": global_step,
        "train/loss": sum(weights[task] * loss for task, loss in present.items()),
    }
    row |= {f"mtl/weight/{task}": weight for task, weight in weights.items()}
    row |= {f"mtl/loss/{task}": loss for task, loss in present.items()}
    row |= _gradient_columns(report)
    row["mtl/weight_entropy"] = entropy(list(weights.values()))
    if bool(report.held):
        row["mtl/held"] = 1
    return row


def entropy(weights: list[float]) -> float:
    """Entropy in nats of `|w| / Σ|w|`; 0 where one task has everything, or none has anything."""
    total = math.fsum(abs(weight) for weight in weights)
    if not 0 < total < math.inf:
        return 0.0
    shares = [abs(weight) / total for weight in weights if weight]
    return -math.fsum(share * math.log(share) for share in shares if share > 0)


def _gradient_columns(report: StepReport) -> Row:
    if report.cosines is None:
        return {}
    norms = {task: norm for task, norm in report.grad_norms.items() if not math.isnan(norm)}
    row: Row = {f"mtl/grad_norm/{task}": norm for task, norm in norms.items()}
    row |= {f"mtl/contribution/{task}": abs(report.weights[task]) * norm for task, norm in norms.items()}
    matrix = report.cosines.tolist()
    pairs = {
        f"mtl/cosine/{a}__{b}": matrix[i][j] for (i, a), (j, b) in combinations(enumerate(report.tasks), 2)
    }
    angles = {key: cosine for key, cosine in pairs.items() if not math.isnan(cosine)}
    row |= angles
    if angles:
        row["mtl/conflict_rate"] = sum(cosine < 0 for cosine in angles.values()) / len(angles)
    return row
