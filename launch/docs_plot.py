"""A small picture of a rule's weights on the toy problem, as SVG inside a page."""

from __future__ import annotations

import torch

from benchmarks.toy import LOWER_BOUNDS, TASKS, losses_and_gradients
from mtl_dist.stats import TaskStats
from mtl_dist.weighting import Rule

START, STEPS, LR = (-8.5, 7.5), 400, 0.05
WIDTH, HEIGHT, PAD = 480, 150, 28


def shares(rule: Rule) -> torch.Tensor:
    """`[STEPS, 2]`, `αᵢ / Σ|αⱼ|` while the rule itself descends with Adam."""
    x = torch.tensor([START], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([x], lr=LR)
    state = rule.init(TASKS, torch.device("cpu"))
    bounds = torch.tensor(LOWER_BOUNDS, dtype=torch.float64)
    present, counts = torch.ones(2, dtype=torch.bool), torch.ones(2, dtype=torch.float64)
    rows = []
    for step in range(STEPS):
        losses, gradients = losses_and_gradients(x)
        gram = gradients[0] @ gradients[0].T
        weights, state = rule.update(TaskStats(losses[0] - bounds, present, gram, counts, step), state)
        x.grad = (weights @ gradients[0])[None]
        optimizer.step()
        total = weights.abs().sum()
        rows.append(weights / torch.where(total > 0, total, torch.ones_like(total)))
    return torch.stack(rows)


def weights_plot(rule: Rule, title: str) -> str:
    """The picture with a sentence about it, as Markdown."""
    values = shares(rule)
    low = min(0.0, float(values.min()))
    wide, high = WIDTH - 2 * PAD, HEIGHT - 2 * PAD

    def line(column: int) -> str:
        points = (
            f"{PAD + wide * step / (STEPS - 1):.1f},{PAD + high * (1 - (float(v) - low) / (1 - low)):.1f}"
            for step, v in enumerate(values[:, column])
            if step % 2 == 0 or step == STEPS - 1
        )
        return f'<polyline class="toy-{column}" points="{" ".join(points)}"/>'

    zero = PAD + high * (1 - (0 - low) / (1 - low))
    label = f"Shares of the weights of L1 and L2 for {title} over {STEPS} steps on the toy problem"
    svg = (
        f'<svg class="toy" role="img" aria-label="{label}" viewBox="0 0 {WIDTH} {HEIGHT}">'
        f'<path class="toy-axis" d="M{PAD},{PAD}V{HEIGHT - PAD}M{PAD},{zero:.1f}H{WIDTH - PAD}"/>'
        f'<text x="{PAD - 4}" y="{PAD + 4}" text-anchor="end">1</text>'
        f'<text x="{PAD - 4}" y="{zero + 4:.1f}" text-anchor="end">0</text>'
        f'<text x="{WIDTH - PAD}" y="{HEIGHT - 8}" text-anchor="end">step {STEPS}</text>'
        f'<text class="toy-0" x="{PAD + 8}" y="14">L1</text>'
        f'<text class="toy-1" x="{PAD + 36}" y="14">L2</text>'
        f"{line(0)}{line(1)}</svg>"
    )
    return (
        f"{svg}\n\n`αᵢ / Σ|αⱼ|` of the two objectives of the [toy problem](../results.md), whose scales "
        f"differ by a factor of 10, while the rule descends from {START} with Adam.\n"
    )
