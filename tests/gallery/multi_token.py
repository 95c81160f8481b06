"""Multi-token prediction: heads predict the next tokens 1, 2 and 3 places ahead, each a task of its own.

Texts have different lengths, so every head has its own number of tokens on every rank: counts make the means
exact. A mean over ranks of local means is not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaModel

from mtl_dist import Balancer, Rule
from mtl_dist.weighting import MGDA, Fixed, KeepNorm
from tests.gallery.causal_lm import config
from tests.gallery.loop import generator, train_loop
from tests.gallery.run import STEPS

AHEAD = {"next": 1, "second": 2, "third": 3}
WEIGHTS = {"next": 1.0, "second": 0.3, "third": 0.1}
PLAIN, RULE = Fixed([1.0, 1.0, 1.0]), KeepNorm(MGDA())
LINES = 3


class MultiToken(nn.Module):
    def __init__(self, rule: Rule | None) -> None:
        super().__init__()
        self.trunk = LlamaModel(config())
        self.outputs = nn.ModuleDict({task: nn.Linear(16, 40) for task in AHEAD})
        self.balancer = None
        if rule is not None:
            self.balancer = Balancer(list(AHEAD), rule, base=WEIGHTS)  # +

    def loss(self, task: str, z: Tensor, labels: Tensor) -> Tensor:
        ahead = AHEAD[task]
        return cross_entropy(self.outputs[task](z[:, :-ahead]).flatten(0, 1), labels[:, ahead:].flatten())

    def forward(self, labels: Tensor) -> Tensor:
        z = self.trunk(input_ids=labels.clamp(min=0), use_cache=False).last_hidden_state
        heads = {task: lambda z, task=task: self.loss(task, z, labels) for task in AHEAD}
        if self.balancer is None:
            return sum(WEIGHTS[task] * head(z) for task, head in heads.items())
        counts = {task: (labels[:, ahead:] != -100).sum() for task, ahead in AHEAD.items()}  # +
        return self.balancer(z, heads, counts=counts)  # +


def train(rule: Rule | None, folder: Path, steps: int, resume: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    draw = generator()
    labels = torch.randint(1, 40, (STEPS, 8, 12), generator=draw)
    lengths = torch.randint(5, 13, (STEPS, 8, 1), generator=draw)
    labels[torch.arange(12) >= lengths] = -100
    return train_loop(MultiToken(rule), labels[:steps], folder, resume, lr=0.3)
