"""Uncertainty: learned noise variances of the tasks."""

from __future__ import annotations

from dataclasses import dataclass

from mtl_dist.weighting.learned_scale import LearnedScale


@dataclass(frozen=True)
class Uncertainty(LearnedScale):
    """`αᵢ = ½e⁻ˢⁱ`, where the model and s together minimise `S = Σ ½(e⁻ˢⁱ Lᵢ + sᵢ)`.

    Kendall, Gal and Cipolla, CVPR 2018, with `s = log σ²`, σ² the noise variance. Here a separate Adam
    updates s with `∂S/∂sᵢ = ½(1 - e⁻ˢⁱ Lᵢ)` at the global losses; in the paper the model's optimizer does.
    The learning rate 0.025 is that of the Nash-MTL and FAMO repositories. LibMTL starts at s = -0.5. At the
    minimum over s, `αᵢ = 1/(2Lᵢ)`. If a loss stays negative there is no minimum, and its weight grows without
    limit.

    Attributes:
        lr: Adam's learning rate for s.
        start: s before the first step.
    """

    name = "uncertainty"
    paper = "Kendall, Gal and Cipolla, CVPR 2018"
    cost = "O(n)"

    sign = -1
    factor = 0.5
