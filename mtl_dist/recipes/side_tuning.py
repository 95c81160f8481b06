"""Ladder side-tuning: the pretrained trunk is frozen, and a small side network beside it learns the tasks.

The trunk runs under `no_grad`. Each of its stages passes its activations through a rung to the side network.
Only the side network is shared and trained (Sung, Cho and Bansal, "LST: Ladder Side-Tuning for Parameter and
Memory Efficient Transfer Learning", NeurIPS 2022). No gradient passes through the trunk. One gradient per
task of all shared parameters, and their exact Gram matrix (`ParameterProbe`), therefore cost little.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtl_dist.recipes.multi_digits import HEIGHT, WIDTH, MultiDigits, MultiDigitsNet, compose, source_digits

_PRETRAIN_SAMPLES, _PRETRAIN_BATCH, _PRETRAIN_RATE = 4096, 64, 3e-3
_CLASSES = 10


class Ladder(nn.Module):
    """A frozen convolutional trunk with a side network. It replaces the trunk.

    Args:
        trunk: the trunk of `MultiDigitsNet`: two convolutions and a linear layer, each with its activation.
        channels: channels of the side network.
    """

    def __init__(self, trunk: nn.Sequential, channels: int) -> None:
        super().__init__()
        # conv, relu, pool | conv, relu | flatten, linear, relu
        self.stages = nn.ModuleList([trunk[:3], trunk[3:5], trunk[5:]])
        self.stages.requires_grad_(False)
        first, second, last = trunk[0], trunk[3], trunk[6]
        assert isinstance(first, nn.Conv2d)
        assert isinstance(second, nn.Conv2d)
        assert isinstance(last, nn.Linear)
        rungs = (nn.Conv2d(layer.out_channels, channels, 1) for layer in (first, second))
        self.rungs = nn.ModuleList(rungs)
        self.gates = nn.Parameter(torch.zeros(2))
        self.steps = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.side = nn.Linear(channels * (HEIGHT // 2) * (WIDTH // 2), last.out_features)

    def forward(self, image: Tensor) -> Tensor:
        """From `[B, 1, 12, 16]` to `[B, features]`: the features of trunk and side network, added."""
        side: Tensor | None = None
        h = image
        for stage, rung, step, gate in zip(self.stages, self.rungs, self.steps, self.gates, strict=False):
            with torch.no_grad():
                h = stage(h)
            entry = rung(h)
            mu = gate.sigmoid()
            # s_k = f_k(μ_k rung_k(h_k) + (1 - μ_k) s_{k-1})
            side = step(entry if side is None else mu * entry + (1 - mu) * side).relu()
        assert side is not None
        with torch.no_grad():
            h = self.stages[2](h)
        features: Tensor = h + self.side(side.flatten(1))
        return features


@dataclass(frozen=True)
class SideTuning(MultiDigits):
    """Multi-Digits with a trunk that was pretrained to classify only the left digit.

    Attributes:
        tune: "side": the trunk is frozen and a side network is trained. "full": the whole trunk is trained,
            for comparison.
        side_channels: channels of the side network.
        pretrain_steps: optimizer steps of the pretraining, on batches of 64. 0: a random trunk.
    """

    tune: Literal["side", "full"] = "side"
    side_channels: int = 8
    pretrain_steps: int = 150

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tune not in ("side", "full"):
            raise ValueError(f'SideTuning: tune must be "side" or "full", got {self.tune!r}')
        for name, least in (("side_channels", 1), ("pretrain_steps", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"SideTuning: {name} must be at least {least}, got {getattr(self, name)}")

    def model(self, balancer: nn.Module) -> nn.Module:
        """The network of Multi-Digits, with a pretrained trunk and a ladder."""
        net = MultiDigitsNet(balancer, self.channels, self.features)
        pretrain(net.trunk, self.features, self.pretrain_steps)
        if self.tune == "side":
            assert isinstance(net.trunk, nn.Sequential)
            net.trunk = Ladder(net.trunk, self.side_channels)
        return net


def pretrain(trunk: nn.Module, features: int, steps: int) -> None:
    """Trains `trunk` in place to classify the left digit of canvases. Takes seconds on a CPU.

    Args:
        trunk: a module from images to `[B, features]`.
        features: number of features.
        steps: optimizer steps.
    """
    if steps == 0:
        return
    scans, labels, training, _ = source_digits()
    seed = int(torch.randint(2**31, ()))  # from the global generator, like the parameters
    samples = compose(scans, labels, training, _PRETRAIN_SAMPLES, torch.Generator().manual_seed(seed))
    net = nn.Sequential(trunk, nn.Linear(features, _CLASSES))
    optimizer = torch.optim.AdamW(net.parameters(), lr=_PRETRAIN_RATE)
    for step in range(steps):
        start = step * _PRETRAIN_BATCH % _PRETRAIN_SAMPLES
        rows = slice(start, start + _PRETRAIN_BATCH)
        optimizer.zero_grad()
        loss = F.cross_entropy(net(samples.images[rows]), samples.digits[rows, 0])
        loss.backward()  # type: ignore[no-untyped-call]  # torch 2.13 leaves it unannotated
        optimizer.step()
    net.zero_grad()
