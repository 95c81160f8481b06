"""What `attach` for Sentence Transformers refuses. Its trainings are in tests/gallery/sentences.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from mtl_dist import Balancer
from mtl_dist.integrations.sentence_transformers import attach
from mtl_dist.weighting import InverseGradNorm, LastSeen, TokenShare

CachedLoss = type("CachedMultipleNegativesRankingLoss", (nn.Module,), {})
TASKS = ("nli", "sts")


def trainer(**others: Any) -> SimpleNamespace:
    both = {task: nn.Module() for task in TASKS}
    return SimpleNamespace(**{"train_dataset": dict.fromkeys(TASKS), "loss": both, **others})


@pytest.mark.parametrize(
    ("rule", "client", "message"),
    [
        (TokenShare(), trainer(loss=nn.Module()), "names the data set of a batch only where both are dict"),
        (TokenShare(), trainer(train_dataset=[1]), "names the data set of a batch only where both are dict"),
        (TokenShare(), trainer(train_dataset={"nli": 1}), r"tasks are \['nli', 'sts'\], and the data sets"),
        (InverseGradNorm(), trainer(), r"compares the tasks of one batch: give Balancer\(tasks, LastSeen"),
        (
            LastSeen(InverseGradNorm()),
            trainer(loss={"nli": CachedLoss(), "sts": nn.Module()}),
            r"the losses of \['nli'\] are cached",
        ),
        (
            LastSeen(InverseGradNorm()),
            trainer(loss={"nli": nn.Module(), "sts": nn.Sequential(CachedLoss())}),
            r"the losses of \['sts'\] are cached",
        ),
    ],
)
def test_what_cannot_work_is_refused(rule: Any, client: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attach(Balancer(TASKS, rule), client)
