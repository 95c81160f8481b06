"""Hierarchical VAE: a reconstruction term, and one KL term for each group of latents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mtl_dist.recipes._base import BatchData, Metric, Recipe, SumsMetric, TensorData
from mtl_dist.recipes.hierarchical_vae.network import SIDE, TASKS, HierarchicalVAE, num_noise
from mtl_dist.recipes.multi_digits import source_digits

_ACTIVE = 0.01  # nats: a latent that carries less is not in use


def bits_per_dim(nats: float) -> float:
    """Bits per pixel, from nats per image."""
    return nats / (SIDE * SIDE * math.log(2))


def active_units(sums: Sequence[float]) -> float:
    """How many latents have a mean KL above 0.01 nats; from the number of samples, and the sums of KL."""
    count, *units = sums
    return float(sum(unit / count > _ACTIVE for unit in units)) if count else math.nan


@dataclass(frozen=True)
class DigitsVAE(Recipe):
    """A VAE of the 8x8 digits of scikit-learn, with four groups of latents at two scales.

    The tasks are the terms of the bound: `pixels`, the cross-entropy of the image given the latents, and
    `kl_0` to `kl_3`, from the coarsest group to the finest. All are nats per image. Their plain sum is the
    negative ELBO. Weights other than 1 train a model for another bound.

    Every training sample is an image with its own noise, so a run does not depend on how many ranks share it.

    Attributes:
        num_train: number of training samples: draws from 1438 images, each with noise of its own.
        num_validation: number of validation images, at most 359, with fixed noise.
        channels: number of features.
        latents: channels of the latents of each group, which are 2x2 or 4x4 images.
        spectral: factor of the spectral regularisation; 0: none.
    """

    num_train: int = 8192
    num_validation: int = 359
    channels: int = 32
    latents: int = 4
    spectral: float = 0.01

    metrics: ClassVar = {
        "pixels": Metric("bits_per_dim", bits_per_dim),
        **{task: SumsMetric("active_units", active_units) for task in TASKS[1:]},
    }
    packages: ClassVar = {"sklearn": 'pip install "mtl-dist[recipes]"'}

    def __post_init__(self) -> None:
        for name in ("num_train", "num_validation", "channels", "latents"):
            if getattr(self, name) < 1:
                raise ValueError(f"DigitsVAE: {name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.spectral < math.inf:
            raise ValueError(f"DigitsVAE: spectral must be at least 0 and finite, got {self.spectral}")

    def data(self, seed: int) -> tuple[BatchData, BatchData]:
        """Training and validation samples, of different images.

        Raises:
            ImportError: scikit-learn is not installed.
        """
        scans, _, training, held_out = source_digits()
        levels = (16 * scans).round().long()
        draw = torch.Generator().manual_seed(seed)
        chosen = training[torch.randint(len(training), (self.num_train,), generator=draw)]
        fixed = torch.Generator().manual_seed(0)
        return (
            self._samples(levels[chosen], draw),
            self._samples(levels[held_out[: self.num_validation]], fixed),
        )

    def _samples(self, images: Tensor, generator: torch.Generator) -> TensorData:
        noise = torch.randn(len(images), num_noise(self.latents), generator=generator)
        return TensorData({"image": images, "noise": noise})

    def model(self, balancer: nn.Module) -> nn.Module:
        """The network."""
        return HierarchicalVAE(balancer, self.channels, self.latents, self.spectral)


__all__ = ["DigitsVAE", "HierarchicalVAE"]
