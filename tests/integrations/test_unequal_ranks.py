"""Ranks with different numbers of batches under HF Trainer: refused before they wait for each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mtl_dist import Balancer
from mtl_dist.integrations import _step_counts
from mtl_dist.integrations._columns import ColumnCollator
from mtl_dist.integrations._row_losses import RowLosses
from mtl_dist.integrations._step_counts import StepCounts
from mtl_dist.integrations.transformers import balance_by_column
from mtl_dist.weighting import TokenShare
from tests.gallery.causal_lm import DOMAINS, padded, table
from tests.integrations.test_by_column import llama, made


@pytest.mark.parametrize(
    ("others", "message"),
    [(2, None), (1, "2 ranks have 3 micro-batches together in this .* not equally many")],
)
def test_ranks_with_different_numbers_of_micro_batches_are_refused(
    others: int, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the shards of a stream end at different places: they would wait for each other."""
    batch = ColumnCollator(padded, "domain", DOMAINS)([table()[0]])
    balancer = Balancer(DOMAINS, TokenShare())
    counts = StepCounts(RowLosses.of(llama()).counts, balancer, "domain")
    other = torch.tensor([0.0, 0, 0, 0, others, others**2, 1], dtype=torch.float64)
    monkeypatch.setattr(_step_counts, "all_reduce_sum", lambda mine, _: mine + other)
    if message is None:
        counts.read([batch, batch])
        assert counts().sum() > 0
    else:
        with pytest.raises(ValueError, match=message):
            counts.read([batch, batch])


@pytest.mark.parametrize(("rows", "refused"), [(9, True), (8, False), (7, False)])
def test_a_trainer_that_gives_some_ranks_one_batch_more_is_refused(
    tmp_path: Path, rows: int, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = made(
        data=table(rows),
        folder=tmp_path,
        per_device_train_batch_size=2,
        accelerator_config={"even_batches": False},
    )
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    if refused:
        with pytest.raises(ValueError, match="even_batches=False: 2 ranks share 5 batches, so some have one"):
            balance_by_column(trainer, Balancer(DOMAINS, TokenShare()))
    else:
        balance_by_column(trainer, Balancer(DOMAINS, TokenShare()))
