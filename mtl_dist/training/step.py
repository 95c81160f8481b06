"""One batch of a run: learning rate, forward, backward, clipping, and the optimizer step if it is due."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from mtl_dist.stats import StepReport
from mtl_dist.training.debug import forward_backward
from mtl_dist.training.optimizer import learning_rate_factor, set_learning_rate
from mtl_dist.training.setup import Run


def train_batch(run: Run, batch: dict[str, Any], done: int) -> StepReport | None:
    """Trains with one batch, or with one micro-batch of an optimizer step.

    Args:
        run: the prepared run.
        batch: this rank's samples.
        done: number of optimizer steps done.

    Returns:
        what the balancer reports.
    """
    settings, accelerator = run.settings, run.accelerator
    if settings.schedule != "constant" or settings.warmup_steps:
        factor = learning_rate_factor(settings.schedule, done, settings.steps, settings.warmup_steps)
        set_learning_rate(run.optimizer, factor * settings.learning_rate)
    with accelerator.accumulate(run.model) if settings.accumulation > 1 else nullcontext():
        forward_backward(run, batch)
        if settings.clip_norm is not None and accelerator.sync_gradients:
            accelerator.clip_grad_norm_(run.model.parameters(), settings.clip_norm)
        run.optimizer.step()
        run.optimizer.zero_grad()
    return run.balancer.report
