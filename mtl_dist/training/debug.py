"""Debug mode: virtual ranks, checks, and a table of every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mtl_dist.stats import StepReport
from mtl_dist.training.contract import check_total
from mtl_dist.training.setup import Run

_HEADER = ("step", "task", "loss", "weight", "grad norm", "contribution", "lowest cosine")
_WIDTHS = (7, 20, 10, 10, 10, 13, 24)


def make_deterministic() -> None:
    """Makes operations repeatable bit for bit where torch can. torch warns about the others."""
    torch.use_deterministic_algorithms(True, warn_only=True)


def forward_backward(run: Run, batch: dict[str, Any]) -> None:
    """Runs forward and backward of one batch: as a whole, or in shards on virtual ranks."""
    ranks, accelerator = run.ranks, run.accelerator
    if ranks is None:
        accelerator.backward(check_total(run.recipe, run.model(**batch)))
        return
    shards = ranks.split(batch)

    def work(rank: int) -> Tensor:
        loss = check_total(run.recipe, run.model(**shards[rank]))
        accelerator.backward(loss / ranks.number)
        return loss

    ranks.run(work)


def step_table(report: StepReport, global_step: int) -> str:
    """One line per task: its weight, its contribution, and the task with which it has the lowest cosine."""
    norms, cosines = report.grad_norms, report.cosines
    sizes = {task: abs(report.weights[task]) * norms.get(task, 0.0) for task in report.tasks}
    whole = sum(size for size in sizes.values() if size == size)  # NaN if a task is absent
    lines = [_line(_HEADER)] if global_step == 1 or global_step % 20 == 0 else []
    for i, task in enumerate(report.tasks):
        lines.append(
            _line(
                (
                    str(global_step) if i == 0 else "",
                    task,
                    f"{report.losses[task]:.4g}",
                    f"{report.weights[task]:.4g}",
                    f"{norms[task]:.3g}" if norms else "-",
                    f"{sizes[task] / whole:.0%}" if norms and whole > 0 else "-",
                    "-" if cosines is None else _lowest(report.tasks, cosines[i], i),
                )
            )
        )
    return "\n".join(lines)


def findings_text(run: Run) -> str:
    """The findings, one per line."""
    findings = run.balancer.findings
    if not findings:
        return "checked every step: no findings"
    return "\n".join([f"checked every step, {len(findings)} finding(s):", *(f"  {f}" for f in findings)])


def _lowest(tasks: Sequence[str], cosines: Tensor, own: int) -> str:
    others = [
        (float(cosine), task)
        for j, (cosine, task) in enumerate(zip(cosines, tasks, strict=True))
        if j != own and not bool(cosine.isnan())
    ]
    if not others:
        return "-"
    cosine, task = min(others)
    return f"{cosine:+.2f} {task}"


def _line(cells: Sequence[str]) -> str:
    return " ".join(f"{cell:<{width}}" for cell, width in zip(cells, _WIDTHS, strict=True)).rstrip()
