"""The trainings that come with the library. Configuration, CLI and tests all read `RECIPES`."""

from __future__ import annotations

from mtl_dist.recipes._base import (
    Batch,
    BatchData,
    Metric,
    Recipe,
    SumsMetric,
    TensorData,
    eval_rows,
    eval_sums,
)
from mtl_dist.recipes.census import Census
from mtl_dist.recipes.hierarchical_vae import ImageVAE
from mtl_dist.recipes.multi_digits import MultiDigits
from mtl_dist.recipes.multi_fashion import MultiFashion
from mtl_dist.recipes.sequence_labelling import SequenceLabelling
from mtl_dist.recipes.side_tuning import SideTuning
from mtl_dist.recipes.side_tuning_text import SideTuningText
from mtl_dist.recipes.text_mixture import TextMixture

RECIPES: dict[str, type[Recipe]] = {
    "census": Census,
    "hierarchical_vae": ImageVAE,
    "multi_digits": MultiDigits,
    "multi_fashion": MultiFashion,
    "sequence_labelling": SequenceLabelling,
    "side_tuning": SideTuning,
    "side_tuning_text": SideTuningText,
    "text_mixture": TextMixture,
}

__all__ = [
    "RECIPES",
    "Batch",
    "BatchData",
    "Census",
    "ImageVAE",
    "Metric",
    "MultiDigits",
    "MultiFashion",
    "Recipe",
    "SequenceLabelling",
    "SideTuning",
    "SideTuningText",
    "SumsMetric",
    "TensorData",
    "TextMixture",
    "eval_rows",
    "eval_sums",
]
