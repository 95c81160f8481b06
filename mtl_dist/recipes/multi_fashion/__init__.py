"""MultiMNIST, MultiFashion and Fashion+MNIST: two images on one canvas, two tasks that conflict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtl_dist.recipes._base import Batch, BatchData, Metric, Recipe, eval_sums
from mtl_dist.recipes.multi_fashion.sources import CLASSES, SIDE, load, missing_in_words

CANVAS = 36  # side of a sample, pixels
KINDS = {
    "multi_mnist": ("digits", "digits"),
    "multi_fashion": ("garments", "garments"),
    "fashion_and_mnist": ("garments", "digits"),
}


@dataclass(frozen=True)
class ComposedPairs:
    """Pairs of source images, composed when they are asked for: `[36, 36]`, the brighter pixel wins.

    Attributes:
        images: source images of the upper left and of the lower right corner, `[M, 28, 28]` uint8 each.
        labels: their classes, `[M]` int64 each.
        pairs: `[N, 2]` int64: the source images of each sample.
    """

    images: tuple[Tensor, Tensor]
    labels: tuple[Tensor, Tensor]
    pairs: Tensor

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.pairs)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Images and both classes of the samples at `indices`."""
        left, right = self.pairs[torch.as_tensor(indices, dtype=torch.int64)].unbind(1)
        canvas = torch.zeros(len(left), 1, CANVAS, CANVAS, dtype=torch.uint8)
        canvas[:, 0, :SIDE, :SIDE] = self.images[0][left]
        corner = canvas[:, 0, -SIDE:, -SIDE:]
        corner.copy_(torch.maximum(corner, self.images[1][right]))
        return {"image": canvas.float() / 255, "left": self.labels[0][left], "right": self.labels[1][right]}


class LeNet(nn.Module):
    """The network of the published comparisons on these data: two convolutions and a linear layer are shared.

    Args:
        balancer: turns features and heads into the scalar loss.
    """

    def __init__(self, balancer: nn.Module) -> None:
        super().__init__()
        self.balancer = balancer
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 10, 9), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(10, 20, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(500, 50), nn.ReLU(),
        )  # fmt: skip
        self.left = nn.Linear(50, CLASSES)
        self.right = nn.Linear(50, CLASSES)

    def forward(self, image: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """In training mode the balancer's scalar, in eval mode the sums that `Recipe.model` describes.

        Args:
            image: `[B, 1, 36, 36]` in [0, 1].
            left: `[B]` int64, the class of the upper left image.
            right: `[B]` int64, the class of the lower right image.
        """
        if not self.training:
            z = self.trunk(image)
            pairs = ((self.left(z), left), (self.right(z), right))
            return eval_sums(
                (F.cross_entropy(logits, label, reduction="none"), logits.argmax(1) == label)
                for logits, label in pairs
            )
        heads = {
            "left": lambda z: F.cross_entropy(self.left(z), left),
            "right": lambda z: F.cross_entropy(self.right(z), right),
        }
        scalar: Tensor = self.balancer(
            lambda: self.trunk(image), heads, counts=dict.fromkeys(heads, len(image))
        )
        return scalar


@dataclass(frozen=True)
class MultiFashion(Recipe):
    """Classifies the image in the upper left corner, and that in the lower right one. The two overlap.

    The data sets of Lin et al., "Pareto Multi-Task Learning", NeurIPS 2019, composed anew: 28x28 images in
    two corners of a 36x36 canvas. The source images of training and validation are different.

    Attributes:
        kind: "multi_mnist" (two digits), "multi_fashion" (two garments), or "fashion_and_mnist" (a garment
            and a digit).
        folder: where the archives of `npm pack` are, relative to the working folder.
        num_train: number of training samples, drawn by the seed.
        num_validation: number of validation samples, the same for every seed.
    """

    kind: Literal["multi_mnist", "multi_fashion", "fashion_and_mnist"] = "multi_fashion"
    folder: str = "data"
    num_train: int = 60_000
    num_validation: int = 10_000

    metrics: ClassVar = {"left": Metric("accuracy"), "right": Metric("accuracy")}

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"MultiFashion: kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        for name in ("num_train", "num_validation"):
            if getattr(self, name) < 1:
                raise ValueError(f"MultiFashion: {name} must be at least 1, got {getattr(self, name)}")

    def check_installed(self) -> None:
        """Looks whether the archives are there.

        Raises:
            ImportError: they are not. One sentence says how to get them.
        """
        if gone := missing_in_words(Path(self.folder), KINDS[self.kind]):
            raise ImportError(f"MultiFashion needs more packages: {gone}")

    def data(self, seed: int) -> tuple[BatchData, BatchData]:
        """Training and validation samples.

        Raises:
            ImportError: the archives are not there.
        """
        self.check_installed()
        return (
            self._pairs(0, self.num_train, torch.Generator().manual_seed(seed)),
            self._pairs(1, self.num_validation, torch.Generator().manual_seed(0)),
        )

    def _pairs(self, part: int, size: int, generator: torch.Generator) -> ComposedPairs:
        left, right = (load(Path(self.folder), kind) for kind in KINDS[self.kind])
        draws = [
            torch.randint(len(source.labels[part]), (size,), generator=generator) for source in (left, right)
        ]
        images, labels = (left.images[part], right.images[part]), (left.labels[part], right.labels[part])
        return ComposedPairs(images, labels, torch.stack(draws, 1))

    def model(self, balancer: nn.Module) -> nn.Module:
        """LeNet."""
        return LeNet(balancer)


__all__ = ["LeNet", "MultiFashion"]
