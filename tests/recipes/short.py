"""Short runs of the recipes: settings, and what is compared of two of them."""

from __future__ import annotations

from pathlib import Path

from standins import archives

from mtl_dist.tracking import read_rows

# recipe -> settings. SGD, because the first steps of Adam take the sign of rounding errors
SHORT = {
    "census": ("recipe.num_train=96", "batch_size=16", "weighting=mgda", "learning_rate=0.1"),
    "hierarchical_vae": ("recipe.num_train=96", "batch_size=16", "recipe.channels=8", "learning_rate=1e-5"),
    "multi_fashion": ("recipe.num_train=96", "batch_size=16", "recipe.kind=fashion_and_mnist"),
    "sequence_labelling": ("recipe.num_train=96", "batch_size=16", "recipe.width=16"),
    "side_tuning": (
        *("recipe.num_train=96", "batch_size=16", "recipe.channels=4", "recipe.features=16"),
        *("recipe.pretrain_steps=2", "learning_rate=0.01"),
    ),
    "side_tuning_text": (
        *("recipe.num_train=96", "batch_size=16", "recipe.width=16", "recipe.length=24"),
        *("recipe.layers=2", "recipe.pretrain_steps=2"),
    ),
}
STEPS = ("steps=4", "checkpoint_every=2", "eval_every=0", "optimizer=sgd", "recipe.num_validation=33")
LAST = "checkpoints/step_00000004"


def settings_of(name: str, folder: Path) -> tuple[str, ...]:
    """The settings of the short run; the archives of `multi_fashion` are found by a setting."""
    return SHORT[name] + ((f"recipe.folder={archives(folder)}",) if name == "multi_fashion" else ())


def rows(folder: Path) -> list[dict]:
    """The rows of a run, without times."""
    return [
        {key: value for key, value in row.items() if not key.startswith("perf/")}
        for row in read_rows(folder / "metrics.jsonl")
    ]


def weights_of(row: dict) -> dict[str, float]:
    """Task -> weight of a row."""
    found = {key: value for key, value in row.items() if "/weight/" in key}
    assert found
    return found
