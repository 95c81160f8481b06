"""What a model hands over: features and losses, in any form, read into one contract."""

from __future__ import annotations

from mtl_dist.losses.base import Counts, Head, HeadFunctions, Heads, LocalLosses, Losses, Refuse
from mtl_dist.losses.chunked import cross_entropy_in_chunks
from mtl_dist.losses.features import (
    CHANGED,
    Branches,
    Called,
    Features,
    LayerInput,
    Views,
    anchored,
    split,
    unchanged,
)
from mtl_dist.losses.gradients import FeatureGradients, Gradients, gradient_gram, real
from mtl_dist.losses.read import read_heads
from mtl_dist.losses.samples import GivenSampleLosses, SampleHeads, SampleLosses
from mtl_dist.losses.tasks import (
    GivenLosses,
    HeadMapping,
    JointHeads,
    TaskLosses,
    check_names,
    collect,
    nan_and_empty,
    told_counts,
)

__all__ = [
    "CHANGED",
    "Branches",
    "Called",
    "Counts",
    "FeatureGradients",
    "Features",
    "GivenLosses",
    "GivenSampleLosses",
    "Gradients",
    "Head",
    "HeadFunctions",
    "HeadMapping",
    "Heads",
    "JointHeads",
    "LayerInput",
    "LocalLosses",
    "Losses",
    "Refuse",
    "SampleHeads",
    "SampleLosses",
    "TaskLosses",
    "Views",
    "anchored",
    "check_names",
    "collect",
    "cross_entropy_in_chunks",
    "gradient_gram",
    "nan_and_empty",
    "read_heads",
    "real",
    "split",
    "told_counts",
    "unchanged",
]
