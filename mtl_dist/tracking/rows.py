"""Turns a StepReport into one flat row of numbers per optimizer step.

    train/global_step        number of optimizer steps done, from 1; the x axis of every chart
    train/loss               the weighted total, over all ranks
    mtl/weight/<task>        weight; 0 if the task was absent on all ranks
    mtl/loss/<task>          global mean loss
    mtl/grad_norm/<task>     norm of the gradient of the task, where the probe measures it
    mtl/contribution/<task>  part of the update that the task makes: |αᵢ|‖gᵢ‖ / Σⱼ |αⱼ|‖gⱼ‖
    mtl/cosine/<a>__<b>      cosine between the gradients of two tasks, a before b in task order
    mtl/conflict_rate        fraction of those pairs with a negative cosine
    mtl/weight_entropy       entropy of the normalised weights, in nats; log n if all weights are equal
    mtl/held                 1 at held steps (NaN or infinite statistics); the key is absent otherwise
    perf/sync_ms             time in the collectives, including the wait for the slowest rank

A program that measures time adds `perf/step_ms`, the wall time of the step in milliseconds.
If a value does not exist at a step (an absent task, gradients that were not measured, the cosine of a zero
gradient), the row does not have its key.

If a step has several micro-batches, one row describes all of them. With the counts cᵏ of micro-batch k, as in
`mtl_dist.stats`,

    Lᵢ = Σₖ cᵢᵏ Lᵢᵏ / Cᵢ,    Gᵢⱼ = Σₖ cᵢᵏ cⱼᵏ Gᵢⱼᵏ / (Cᵢ Cⱼ),    Cᵢ = Σₖ cᵢᵏ

The weight is the mean over the micro-batches in which the task was present. `train/loss` is the mean of the
totals of the micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtl_dist.stats import StepReport
from mtl_dist.tracking._merge import Array, MicroBatch, merged
from mtl_dist.tracking.keys import STEP_KEY, keys_of

Row = dict[str, float]


def step_row(report: StepReport, global_step: int) -> Row:
    """The row of one optimizer step. Copies the report to the host once, and waits for the copy.

    Args:
        report: the balancer's report of the step.
        global_step: number of optimizer steps done, including this one.

    Raises:
        ValueError: a task name cannot be part of a key.
    """
    return Snapshot([report]).row(global_step)


class Snapshot:
    """The numbers of one optimizer step, while they are copied to the host.

    There is one copy. On an accelerator it runs during the next step, and `row` waits for it.

    Args:
        reports: one report per micro-batch of the step.

    Raises:
        ValueError: there is no report, or a task name cannot be part of a key.
    """

    def __init__(self, reports: Sequence[StepReport]) -> None:
        if not reports:
            raise ValueError("a row needs at least one report: the model's forward did not call the balancer")
        self._keys = keys_of(reports[0].tasks)
        self._has_gram = [report.stats.gram is not None for report in reports]
        self._elapsed = [report.sync for report in reports]
        flat = torch.cat([part for report in reports for part in _parts(report)])
        self._event: torch.Event | None = None
        self._host = flat
        if flat.device.type != "cpu":
            self._host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
            self._host.copy_(flat, non_blocking=True)
            self._event = torch.Event(flat.device)
            self._event.record()

    @property
    def ready(self) -> bool:
        """Whether `row` returns without waiting."""
        return self._event is None or self._event.query()

    def row(self, global_step: int) -> Row:
        """The row. Waits until the copy has finished."""
        if self._event is not None:
            self._event.synchronize()
        step = merged(list(self._micro_batches()))
        keys = self._keys
        row: Row = {STEP_KEY: global_step, "train/loss": step.total}
        row.update(zip(keys.weight, step.weights.tolist(), strict=True))
        row.update(_there(keys.loss, step.losses, step.present))
        if step.gram is not None:
            norms = np.sqrt(np.maximum(step.gram.diagonal(), 0))
            row.update(_there(keys.grad_norm, norms, step.present))
            row.update(_there(keys.contribution, _shares(np.abs(step.weights) * norms), step.present))
            row.update(_angles(keys.cosine, step.gram, norms))
        row["mtl/weight_entropy"] = entropy(step.weights.tolist())
        if step.held:
            row["mtl/held"] = 1
        row["perf/sync_ms"] = 1e3 * sum(elapsed.seconds() for elapsed in self._elapsed)
        return row

    def _micro_batches(self) -> Iterator[MicroBatch]:
        n = len(self._keys.weight)
        numbers = self._host.double().numpy()
        for has_gram in self._has_gram:
            size = 3 * n + 1 + (n * n if has_gram else 0)
            part, numbers = numbers[:size], numbers[size:]
            gram = part[3 * n + 1 :].reshape(n, n) if has_gram else None
            yield MicroBatch(part[:n], part[n : 2 * n], part[2 * n : 3 * n], bool(part[3 * n]), gram)


def entropy(weights: list[float]) -> float:
    """Entropy in nats of `|w| / Σ|w|`; 0 if one task has all the weight, or if all weights are 0."""
    total = math.fsum(abs(weight) for weight in weights)
    if not 0 < total < math.inf:
        return 0.0
    shares = [abs(weight) / total for weight in weights if weight]
    return -math.fsum(share * math.log(share) for share in shares if share > 0)


def _parts(report: StepReport) -> Iterator[Tensor]:
    stats = report.stats
    yield from (report.weight_vector, stats.losses, stats.counts, report.held.reshape(1))
    if stats.gram is not None:
        yield stats.gram.flatten()


def _there(keys: tuple[str, ...], values: Array, present: NDArray[np.bool_]) -> Row:
    """The values of the tasks that were present, without NaN."""
    found = zip(keys, values.tolist(), present.tolist(), strict=True)
    return {key: value for key, value, there in found if there and not math.isnan(value)}


def _shares(lengths: Array) -> Array:
    total = lengths.sum()
    return lengths / total if 0 < total < math.inf else np.full_like(lengths, np.nan)


def _angles(keys: tuple[str, ...], gram: Array, norms: Array) -> Row:
    a, b = _pairs(len(norms))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        cosines = np.clip(gram[a, b] / (norms[a] * norms[b]), -1, 1)
    found = zip(keys, cosines.tolist(), strict=True)
    row: Row = {key: cosine for key, cosine in found if not math.isnan(cosine)}
    if row:
        row["mtl/conflict_rate"] = sum(cosine < 0 for cosine in row.values()) / len(row)
    return row


@lru_cache(maxsize=64)
def _pairs(n: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    a, b = np.triu_indices(n, 1)
    return a, b
