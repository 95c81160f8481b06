"""What is frozen stays, no gradient passes through the trunk beside a side network, every choice learns."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import pytest
import torch

from mtl_dist import Balancer, SharedLayerProbe
from mtl_dist.recipes import SideTuningText
from mtl_dist.weighting import InverseGradNorm

CHOICES = ["side", "full", "linear", *(["lora"] if find_spec("peft") else [])]
SMALL = {"num_train": 128, "num_validation": 8, "length": 24, "width": 16, "layers": 2, "side_width": 8}


def make(tune: str, **fields):
    recipe = SideTuningText(**{**SMALL, "tune": tune, "pretrain_steps": 3, **fields})
    torch.manual_seed(0)
    return recipe, recipe.model(Balancer(recipe.tasks, InverseGradNorm(), probe=SharedLayerProbe()))


@pytest.mark.parametrize("tune", CHOICES)
def test_what_is_trained_learns_and_what_is_frozen_stays(tune):
    recipe, net = make(tune)
    train, _ = recipe.data(0)
    batch = train.__getitems__(range(64))
    frozen = {name: p.clone() for name, p in net.named_parameters() if not p.requires_grad}
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-2)
    losses = []
    for _ in range(12):
        net(**batch).backward()
        assert all(p.grad is not None for p in trained), "DDP would wait for a gradient that never comes"
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(net.balancer.report.losses.values()))
    assert losses[-1] < 0.95 * losses[0]
    assert bool(frozen) == (tune != "full")
    for name, value in frozen.items():
        assert torch.equal(net.get_parameter(name), value), name


def test_nothing_of_the_trunk_is_kept_for_the_backward_of_a_side_network():
    kept = {}
    for tune in ("side", "linear", "full"):
        recipe, net = make(tune, layers=4)
        batch = recipe.data(0)[0].__getitems__(range(16))
        own = {p.untyped_storage().data_ptr() for p in net.parameters()}
        stored = {}

        def pack(tensor, own=own, stored=stored):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                stored[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = net(**batch)
        kept[tune] = sum(stored.values())
        del loss
    assert kept["linear"] < kept["side"] < 0.75 * kept["full"]


def test_the_ladder_begins_at_the_pretrained_model_and_is_causal():
    recipe, ladder = make("side")
    _, plain = make("linear")
    tokens = recipe.data(0)[0].__getitems__(range(4))["tokens"][:, :-1]
    with torch.no_grad():
        h, expected = (net.trunk(input_ids=tokens).last_hidden_state for net in (ladder, plain))
        torch.testing.assert_close(h, expected)
        torch.nn.init.normal_(ladder.trunk.up.weight)
        before = ladder.trunk(input_ids=tokens).last_hidden_state
        tokens[:, 12:] = 0
        after = ladder.trunk(input_ids=tokens).last_hidden_state
    torch.testing.assert_close(before[:, :12], after[:, :12])
    assert not torch.equal(before[:, 12:], after[:, 12:])


def test_a_trunk_that_was_pretrained_knows_prose():
    losses = []
    for steps in (0, 40):
        recipe, net = make("linear", pretrain_steps=steps)
        net(**recipe.data(0)[0].__getitems__(range(64)))
        losses.append(net.balancer.report.losses["prose"])
    assert losses[1] < 0.8 * losses[0]


def test_what_is_wrong_is_refused():
    with pytest.raises(ValueError, match="tune must be one of side, full, lora, linear, got 'half'"):
        SideTuningText(tune="half")
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        SideTuningText(rank=0)
    with pytest.raises(ValueError, match="side_width must be even, got 5"):
        SideTuningText(side_width=5)


def test_lora_without_peft_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="pip install peft"):
        make("lora")
