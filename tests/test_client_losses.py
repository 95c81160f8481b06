"""A client's dictionary of losses: entries that are no losses (`ignore=`), fixed weights (`base=`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mtl_dist import Balancer, FeatureProbe, FeatureTap, SharedLayerProbe
from mtl_dist.virtual import VirtualRanks
from mtl_dist.weighting import FAMO, MGDA, Equal, Fixed, InverseLoss

TASKS = ("ce", "box")
BASE = {"box": 5.0, "ce": 0.5}
IGNORE = ("cardinality_error",)


def features() -> Tensor:
    return torch.tensor([0.5, -2.0, 1.5], requires_grad=True)


def losses(z: Tensor) -> dict[str, Tensor]:
    """As a detector gives them: one entry is a metric."""
    error = torch.tensor(3.0)
    return {"ce": (z - 1).square().sum(), "cardinality_error": error, "box": (z + z.flip(0)).abs().sum()}


def client(given: dict[str, Tensor]) -> Tensor:
    """The detector's own total."""
    return sum(BASE[name] * loss for name, loss in given.items() if name in BASE)


def as_mapping(z: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    return {name: lambda z, name=name: losses(z)[name] for name in losses(z)}


@pytest.mark.parametrize("form", ["losses", "mapping", "joint"])
def test_fixed_weights_give_the_total_of_the_client(form: str) -> None:
    balancer = Balancer(TASKS, Fixed([1.0, 1.0]), ignore=IGNORE, base=BASE)
    z, own = features(), features()
    arguments = {"losses": (losses(z),), "mapping": (z, as_mapping(z)), "joint": (z, losses)}
    total, expected = balancer(*arguments[form]), client(losses(own))
    total.backward()
    expected.backward()
    assert total.item() == expected.item()
    assert torch.equal(z.grad, own.grad)
    assert balancer.report.losses == {name: BASE[name] * losses(own)[name].item() for name in TASKS}


@pytest.mark.parametrize("probe", [FeatureProbe(), FeatureTap()], ids=repr)
def test_statistics_are_of_base_weighted_losses(probe: Any) -> None:
    based = Balancer(TASKS, MGDA(), probe=probe, ignore=IGNORE, base=BASE)
    by_hand = Balancer(TASKS, MGDA(), probe=probe)
    hand = {name: lambda z, name=name: weighted(losses(z))[name] for name in TASKS}
    for balancer, heads in ((based, as_mapping(features())), (by_hand, hand)):
        balancer(features() * 1, heads).backward()
    assert based.report.weights == by_hand.report.weights
    assert based.report.grad_norms == by_hand.report.grad_norms


def weighted(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: given[name] * BASE[name] for name in TASKS}


def test_counts_of_what_is_ignored_are_left_out() -> None:
    balancer = Balancer(TASKS, Equal(), ignore=IGNORE)
    balancer(losses(features()), counts={"ce": 2, "box": 3, "cardinality_error": 9}).backward()
    assert balancer.report.stats.counts.tolist() == [2, 3]


@pytest.mark.parametrize("given", [True, False])
def test_losses_of_samples_are_multiplied_by_the_weight_of_their_task(given: bool) -> None:
    ids = torch.tensor([0, 1, 1, 0])
    balancer = Balancer(TASKS, InverseLoss(), base=BASE)
    by_hand = Balancer(TASKS, InverseLoss())
    factors = torch.tensor([0.5, 5.0, 5.0, 0.5])
    z = torch.rand(4, 3, requires_grad=True)
    if given:
        a = balancer(z.square(), task_ids=ids)
        b = by_hand(z.square() * factors[:, None], task_ids=ids)
    else:
        a = balancer(z, lambda z: z.square(), task_ids=ids)
        b = by_hand(z, lambda z: z.square() * factors[:, None], task_ids=ids)
    assert a.item() == b.item()
    assert balancer.report.losses == by_hand.report.losses


def test_evaluation_and_observe_read_the_same_losses() -> None:
    balancer = Balancer(TASKS, FAMO(feedback="after"), ignore=IGNORE, base=BASE)
    by_hand = Balancer(TASKS, FAMO(feedback="after"))
    for each, read in ((balancer, lambda z: losses(z)), (by_hand, lambda z: weighted(losses(z)))):
        for _ in range(3):
            each(read(features())).backward()
            each.observe(read(features() + 0.1))
        each.eval()
    assert balancer.weights == by_hand.weights
    assert balancer(losses(features())).item() == by_hand(weighted(losses(features()))).item()


def test_virtual_ranks_read_them_too() -> None:
    balancer = Balancer(TASKS, Fixed([1.0, 1.0]), ignore=IGNORE, base=BASE)
    shards = [features(), features() + 1]
    total = VirtualRanks(2, balancer, balancer).run(lambda rank: balancer(losses(shards[rank])))

    expected = sum(client(losses(z)).item() for z in shards) / 2
    assert total.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ignore": ["box"]}, r"ignore= holds \['box'\], which are tasks"),
        ({"base": {"ce": 1.0}}, r"base= must give one weight for each task \['ce', 'box'\], got \['ce'\]"),
        ({"base": {**BASE, "giou": 2.0}}, "name in ignore= what is no task"),
        ({"base": {"ce": 1.0, "box": 0.0}}, "base= must hold finite numbers > 0"),
        ({"base": {"ce": float("nan"), "box": 1.0}}, "base= must hold finite numbers > 0"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Balancer(TASKS, Equal(), **settings)


def test_other_unknown_names_are_still_refused_and_the_message_names_ignore() -> None:
    with pytest.raises(ValueError, match=r"unknown task \['cardinality_error'\].*ignore="):
        Balancer(TASKS, Equal())(losses(features()))
    based = Balancer(TASKS, Equal(), ignore=IGNORE, base=BASE)
    with pytest.raises(ValueError, match=r"unknown task \['mask'\]"):
        based({**losses(features()), "mask": torch.tensor(1.0)})


def test_ids_that_do_not_fit_are_refused_as_without_base() -> None:
    balancer = Balancer(TASKS, Equal(), base=BASE)
    with pytest.raises(ValueError, match="losses must begin with the shape of task_ids"):
        balancer(torch.rand(3, requires_grad=True), task_ids=torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="task_ids must be in 0"):
        balancer(torch.rand(3, requires_grad=True), task_ids=torch.tensor([0, 1, 7]))


def test_a_shared_layer_is_measured_with_the_weights_of_the_client() -> None:
    layer = torch.nn.Linear(3, 2)
    heads = {"ce": lambda z: z.square().sum(), "box": lambda z: z.abs().sum()}
    x = torch.rand(4, 3)
    norms = []
    for base in (BASE, None):
        balancer = Balancer(TASKS, MGDA(), probe=SharedLayerProbe(), base=base)
        balancer(x, heads, layer=layer).backward()
        norms.append(balancer.report.grad_norms)
    assert norms[0]["box"] == pytest.approx(5 * norms[1]["box"], rel=1e-6)
