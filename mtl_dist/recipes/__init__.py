"""The shipped trainings. `RECIPES` is the one list that configuration, CLI and tests read."""

from __future__ import annotations

from mtl_dist.recipes._base import Batch, BatchData, Metric, Recipe
from mtl_dist.recipes.multi_digits import MultiDigits
from mtl_dist.recipes.side_tuning import SideTuning
from mtl_dist.recipes.text_mixture import TextMixture

RECIPES: dict[str, type[Recipe]] = {
    "multi_digits": MultiDigits,
    "side_tuning": SideTuning,
    "text_mixture": TextMixture,
}

__all__ = ["RECIPES", "Batch", "BatchData", "Metric", "MultiDigits", "Recipe", "SideTuning", "TextMixture"]
