"""Multi-Digits: two handwritten digits on one canvas, four tasks whose losses differ by orders of magnitude.

The images are the digits of scikit-learn (1797 real scans of 8x8 pixels), which its package contains. Every
sample has one digit in the left half and one in the right half of a 12x16 canvas, each at a random offset.
The two digits may overlap by up to four columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtl_dist.recipes._base import Batch, BatchData, Metric, Recipe, eval_sums

DIGIT = 8  # side of a source image, pixels
HEIGHT, WIDTH = 12, 16  # of the canvas, pixels
_LEFT_OFFSETS, _RIGHT_OFFSETS = (0, 2), (6, 8)  # inclusive ranges of a digit's first column
_SPLIT_SEED = 20180207  # fixed: the validation digits do not depend on the seed of a run


def psnr(mean_squared_error: float) -> float:
    """Peak signal-to-noise ratio in decibels, for pixels in [0, 1]."""
    return -10 * math.log10(mean_squared_error) if mean_squared_error > 0 else math.inf


@dataclass(frozen=True)
class ComposedDigits:
    """Samples, each composed of two source digits.

    Attributes:
        images: `[N, 1, 12, 16]` float32 in [0, 1].
        digits: `[N, 2]` int64: left and right digit.
        sources: `[N, 2]` int64: indices of their images in scikit-learn.
    """

    images: Tensor
    digits: Tensor
    sources: Tensor

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.images)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Images, left digits and right digits of the samples at `indices`."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        left, right = self.digits[index].unbind(1)
        return {"image": self.images[index], "left": left, "right": right}


def source_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The digits of scikit-learn, `[1797, 8, 8]` in [0, 1], their labels, training and validation indices.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits  # an optional dependency, for recipes only
    except ImportError as error:
        raise ImportError(
            'the recipes multi_digits and side_tuning need scikit-learn: pip install "mtl-dist[recipes]"'
        ) from error

    digits = load_digits()
    scans = torch.from_numpy(digits.images).float() / 16
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(scans), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    num_held_out = len(scans) // 5
    return scans, labels, order[num_held_out:], order[:num_held_out]


def compose(
    scans: Tensor, labels: Tensor, sources: Tensor, size: int, generator: torch.Generator
) -> ComposedDigits:
    """Draws `size` pairs of source digits and puts each pair on a canvas. The brighter pixel wins.

    Args:
        scans: `[M, 8, 8]`: all source images, in [0, 1].
        labels: `[M]`: their digits.
        sources: `[m]`: indices of the source images to draw from.
        size: number of samples.
        generator: random generator for all draws.
    """

    def draw(low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, (size,), generator=generator)

    pairs = sources[torch.randint(len(sources), (size, 2), generator=generator)]
    canvas = torch.zeros(size, HEIGHT, WIDTH)
    for pair, (low, high) in zip(pairs.unbind(1), (_LEFT_OFFSETS, _RIGHT_OFFSETS), strict=True):
        rows = draw(0, HEIGHT - DIGIT)[:, None] + torch.arange(DIGIT)
        columns = draw(low, high)[:, None] + torch.arange(DIGIT)
        place = (torch.arange(size)[:, None, None], rows[:, :, None], columns[:, None, :])
        canvas[place] = torch.maximum(canvas[place], scans[pair])
    return ComposedDigits(canvas[:, None], labels[pairs], pairs)


class MultiDigitsNet(nn.Module):
    """A small convolutional trunk and one head per task, without dropout and batch statistics.

    Args:
        balancer: turns features and heads into the scalar loss.
        channels: channels of the first convolution; the second has twice as many.
        features: number of shared features.
    """

    def __init__(self, balancer: nn.Module, channels: int, features: int) -> None:
        super().__init__()
        self.balancer = balancer
        self.trunk: nn.Module = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(channels, 2 * channels, 3, padding=1), nn.ReLU(), nn.Flatten(),
            nn.Linear(2 * channels * (HEIGHT // 2) * (WIDTH // 2), features), nn.ReLU(),
        )  # fmt: skip
        self.left = nn.Linear(features, 10)
        self.right = nn.Linear(features, 10)
        self.sum = nn.Linear(features, 1)
        self.image = nn.Linear(features, HEIGHT * WIDTH)

    def forward(self, image: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """In training mode the balancer's scalar, in eval mode the sums that `Recipe.model` describes.

        Args:
            image: `[B, 1, 12, 16]` in [0, 1].
            left: `[B]` int64, the left digit.
            right: `[B]` int64, the right digit.
        """
        total, pixels = (left + right).to(image.dtype), image.flatten(1)
        if not self.training:
            return self._sums(self.trunk(image), left, right, total, pixels)
        heads = {
            "left": lambda z: F.cross_entropy(self.left(z), left),
            "right": lambda z: F.cross_entropy(self.right(z), right),
            "sum": lambda z: F.mse_loss(self.sum(z).squeeze(1), total),
            "image": lambda z: (self.image(z) - pixels).square().sum(1).mean(),
        }
        counts = dict.fromkeys(heads, float(len(image)))
        # a function, which ParameterProbe calls again for each task where an engine frees the parameters
        scalar: Tensor = self.balancer(lambda: self.trunk(image), heads, counts=counts)
        return scalar

    def _sums(self, z: Tensor, left: Tensor, right: Tensor, total: Tensor, pixels: Tensor) -> Tensor:
        """`[4, 3]` in the dtype of statistics: sums of loss and metric, and number of samples."""
        error = self.sum(z).squeeze(1) - total
        pixel_error = (self.image(z) - pixels).square()
        return eval_sums(
            [
                (F.cross_entropy(self.left(z), left, reduction="none"), self.left(z).argmax(1) == left),
                (F.cross_entropy(self.right(z), right, reduction="none"), self.right(z).argmax(1) == right),
                (error.square(), error.abs()),
                (pixel_error.sum(1), pixel_error.mean(1)),
            ]
        )


@dataclass(frozen=True)
class MultiDigits(Recipe):
    """Classifies both digits, regresses their sum, and reconstructs the canvas.

    At the start the losses are about 2.3, 2.3 (cross-entropy), 100 (squared error) and 30 (squared error
    summed over pixels). Their gradients differ even more.

    Attributes:
        num_train: number of training samples, composed of 4/5 of the source digits.
        num_validation: number of validation samples, composed of the other source digits.
        channels: channels of the first convolution.
        features: number of shared features.
    """

    num_train: int = 8192
    num_validation: int = 1000
    channels: int = 16
    features: int = 128

    metrics: ClassVar = {
        "left": Metric("accuracy"),
        "right": Metric("accuracy"),
        "sum": Metric("mae"),
        "image": Metric("psnr", psnr),
    }
    packages: ClassVar = {"sklearn": 'pip install "mtl-dist[recipes]"'}

    def __post_init__(self) -> None:
        for name in ("num_train", "num_validation", "channels", "features"):
            if getattr(self, name) < 1:
                raise ValueError(f"MultiDigits: {name} must be at least 1, got {getattr(self, name)}")

    def data(self, seed: int) -> tuple[BatchData, BatchData]:
        """Training and validation samples. Their source digits are disjoint.

        Raises:
            ImportError: scikit-learn is not installed.
        """
        scans, labels, training, held_out = source_digits()
        generator = torch.Generator().manual_seed(seed)
        validation = compose(scans, labels, held_out, self.num_validation, generator)
        train = compose(scans, labels, training, self.num_train, generator)
        return train, validation

    def model(self, balancer: nn.Module) -> nn.Module:
        """The convolutional network."""
        return MultiDigitsNet(balancer, self.channels, self.features)
