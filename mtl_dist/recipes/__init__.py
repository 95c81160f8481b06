"""The trainings that come with the library. Configuration, CLI and tests all read `RECIPES`."""

from __future__ import annotations

from mtl_dist.recipes._base import Batch, BatchData, Metric, Recipe, TensorData, eval_sums
from mtl_dist.recipes.multi_digits import MultiDigits
from mtl_dist.recipes.side_tuning import SideTuning
from mtl_dist.recipes.text_mixture import TextMixture

RECIPES: dict[str, type[Recipe]] = {
    "multi_digits": MultiDigits,
    "side_tuning": SideTuning,
    "text_mixture": TextMixture,
}

__all__ = [
    "RECIPES",
    "Batch",
    "BatchData",
    "Metric",
    "MultiDigits",
    "Recipe",
    "SideTuning",
    "TensorData",
    "TextMixture",
    "eval_sums",
]
