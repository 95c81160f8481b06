"""IMTL-L: learned scales that bring all weighted losses to 1."""

from __future__ import annotations

from dataclasses import dataclass

from mtl_dist.weighting.learned_scale import LearnedScale


@dataclass(frozen=True)
class IMTLL(LearnedScale):
    """`αᵢ = eˢⁱ`, where the model and s together minimise `S = Σ eˢⁱ Lᵢ - sᵢ`.

    Liu et al., "Towards impartial multi-task learning", ICLR 2021. Here a separate Adam updates s with
    `∂S/∂sᵢ = eˢⁱ Lᵢ - 1` at the global losses; in the paper the model's optimizer does. At the minimum over
    s, `αᵢ = 1/Lᵢ`. S is twice the objective of `Uncertainty`, with the other sign of s.

    Attributes:
        lr: Adam's learning rate for s.
        start: s before the first step.
    """

    name = "imtl_l"
    paper = "Liu et al., ICLR 2021"
    cost = "O(n)"

    sign = 1
    factor = 1.0
