"""The trunk stays as it was, the side network learns, and its Gram is exact."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from program import ROOT, train
from torch import nn

from mtl_dist import Balancer, ParameterProbe
from mtl_dist.recipes import SideTuning
from mtl_dist.training.evaluate import eval_row
from mtl_dist.training.settings import load_settings
from mtl_dist.weighting import MGDA, InverseGradNorm

CONFIG = ROOT / "configs" / "recipe" / "side_tuning.yaml"
SMALL = {"num_train": 2048, "num_validation": 301, "pretrain_steps": 40}


class Recorder(nn.Module):
    """Keeps the losses in a balancer's place."""

    def forward(self, z, heads, counts):
        z = z()
        self.losses = [head(z) for head in heads.values()]


def make(rule=None, **fields) -> tuple[SideTuning, nn.Module]:
    recipe = SideTuning(**{**SMALL, **fields})
    torch.manual_seed(0)
    return recipe, recipe.model(Balancer(recipe.tasks, rule or MGDA(), probe=ParameterProbe(bucket=2000)))


def batch(recipe: SideTuning, size: int = 64):
    return recipe.data(0)[0].__getitems__(range(size))


def trained(net: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


def test_only_the_side_network_and_the_heads_are_trained() -> None:
    recipe, net = make()
    net(**batch(recipe)).backward()
    assert all((p.grad is not None) == p.requires_grad for p in net.parameters())
    side = sum(p.numel() for name, p in trained(net).items() if name.startswith("trunk"))
    _, full = make(tune="full")
    assert side < 0.3 * sum(p.numel() for p in full.trunk.parameters())


def test_gram_is_that_of_the_side_networks_parameters() -> None:
    recipe, net = make()
    samples = batch(recipe)
    net(**samples).backward()
    got = net.balancer.report.stats.gram
    shared = [p for name, p in trained(net).items() if name.startswith("trunk")]
    net.balancer = taken = Recorder()
    net(**samples)
    found = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in taken.losses]
    rows = [torch.cat([g.flatten() for g in gradients]) for gradients in found]
    matrix = torch.stack(rows).double()
    norms = matrix.norm(dim=1)
    assert ((got - matrix @ matrix.T) / torch.outer(norms, norms)).abs().max() < 1e-6


def test_it_learns_and_the_trunk_stays() -> None:
    recipe, net = make(InverseGradNorm())
    train, validation = recipe.data(0)
    frozen = {name: p.clone() for name, p in net.named_parameters() if not p.requires_grad}
    assert frozen

    def score() -> dict:
        with torch.no_grad():
            return eval_row(net.eval()(**validation.__getitems__(range(len(validation)))), recipe)

    before = score()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    net.train()
    for step in range(120):
        optimizer.zero_grad()
        net(**train.__getitems__(range(step % 32 * 64, (step % 32 + 1) * 64))).backward()
        optimizer.step()
    after = score()
    assert after["eval/left/accuracy"] > before["eval/left/accuracy"] + 0.2
    assert after["eval/sum/mae"] < before["eval/sum/mae"]
    assert after["eval/image/psnr"] > before["eval/image/psnr"] + 3
    for name, value in frozen.items():
        assert torch.equal(net.get_parameter(name), value), name


def test_a_pretrained_trunk_knows_its_own_task() -> None:
    """The left digit is learned sooner from its features than from a random trunk's."""
    losses = []
    for steps in (0, 150):
        recipe, net = make(pretrain_steps=steps)
        optimizer = torch.optim.Adam(net.left.parameters(), 1e-2)
        samples = batch(recipe, 512)
        for _ in range(30):
            loss = nn.functional.cross_entropy(
                net.left(net.trunk(samples["image"]).detach()), samples["left"]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[1] < 0.7 * losses[0]


def test_the_configuration_trains_on_two_processes(tmp_path: Path) -> None:
    assert load_settings(CONFIG).probe.spec == "parameter"
    settings = ["steps=3", "recipe.pretrain_steps=5", "eval_every=0", "checkpoint_every=0"]
    train(tmp_path, 2, *settings, config=CONFIG, timeout=200)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert sum(any("grad_norm/" in key for key in row) for row in rows) == 3, rows


def test_what_is_wrong_is_refused() -> None:
    with pytest.raises(ValueError, match="tune must be"):
        SideTuning(tune="half")
    with pytest.raises(ValueError, match="side_channels must be at least 1, got 0"):
        SideTuning(side_channels=0)
