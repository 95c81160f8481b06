"""Virtual ranks: the same course as real ones, and the same errors, in one process."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from launcher import succeed
from torch import Tensor, nn

from mtl_dist import Balancer, FeatureProbe, FeatureTap
from mtl_dist.stats import TaskStats
from mtl_dist.virtual import VirtualRanks
from mtl_dist.weighting import FAMO, MGDA, Equal, GeometricMean, State

TASKS = ("a", "b")


@pytest.mark.timeout(300)
def test_virtual_ranks_take_the_course_of_real_ones(tmp_path: Path) -> None:
    real, virtual = tmp_path / "real.pt", tmp_path / "virtual.pt"
    succeed("virtual_run.py", 4, str(real), "1", timeout=200)
    succeed("virtual_run.py", 1, str(virtual), "4", timeout=100)
    expected, got = torch.load(real), torch.load(virtual)
    assert expected.keys() == got.keys()
    for cell in expected:
        a, b = expected[cell], got[cell]
        torch.testing.assert_close(b["weights"], a["weights"], rtol=1e-6, atol=1e-6, msg=str(cell))
        assert a["model"].keys() == b["model"].keys()
        for name, value in a["model"].items():
            torch.testing.assert_close(
                b["model"][name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name, c=cell: f"{c} {n}: {m}"
            )


class Net(nn.Module):
    def __init__(self, balancer: Balancer) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.balancer = balancer
        self.trunk = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        z = self.trunk(x)
        return self.balancer(z, {"a": lambda z: (z * z).mean(), "b": lambda z: (z - x.sum()).square().mean()})


def run(net: Net, ranks: VirtualRanks, x: Tensor) -> Tensor:
    shards = ranks.split(x)

    def work(rank: int) -> Tensor:
        loss = net(shards[rank])
        (loss / ranks.number).backward()
        return loss

    return ranks.run(work)


def test_one_virtual_rank_is_a_plain_step() -> None:
    x = torch.randn(6, 3)
    plain, virtual = Net(Balancer(TASKS, MGDA())), Net(Balancer(TASKS, MGDA()))
    loss = plain(x)
    loss.backward()
    assert torch.equal(run(virtual, VirtualRanks(1, virtual.balancer, virtual), x), loss.detach())
    assert torch.equal(virtual.trunk.weight.grad, plain.trunk.weight.grad)


def test_a_fault_names_the_rank_it_came_from() -> None:
    net = Net(Balancer(TASKS, MGDA()))
    x = torch.randn(8, 3)
    x[5] = torch.nan
    with pytest.raises(ValueError, match=r"task 'a' on rank 2, task 'b' on rank 2"):
        run(net, VirtualRanks(4, net.balancer, net), x)


@pytest.mark.parametrize("probe", [FeatureProbe(), FeatureTap()], ids=repr)
def test_the_error_of_one_rank_is_raised_and_the_others_end(probe: object) -> None:
    balancer = Balancer(TASKS, MGDA(), probe=probe)
    ranks = VirtualRanks(3, balancer, nn.Module())

    def work(rank: int) -> Tensor:
        def head(z: Tensor) -> Tensor:
            if rank == 1:
                raise KeyError("label")
            return z.sum()

        loss = balancer(torch.ones(2, requires_grad=True) * 1, {"a": head, "b": lambda z: z.square().sum()})
        loss.backward()
        return loss

    with pytest.raises(KeyError, match="label"):
        ranks.run(work)


def test_ranks_that_do_not_all_come_are_told() -> None:
    balancer = Balancer(TASKS, GeometricMean())
    ranks = VirtualRanks(2, balancer, nn.Module())
    losses = {"a": torch.ones((), requires_grad=True), "b": torch.ones((), requires_grad=True)}
    with pytest.raises(RuntimeError, match=r"virtual ranks \[1\] wait in a collective"):
        ranks.run(lambda rank: balancer(losses) if rank else torch.zeros(()))


def test_outside_of_run_there_are_no_ranks_to_meet() -> None:
    balancer = Balancer(TASKS, Equal())
    VirtualRanks(2, balancer, nn.Module())
    with pytest.raises(RuntimeError, match=r"VirtualRanks\.run"):
        balancer({"a": torch.ones(()), "b": torch.ones(())})
    balancer.eval()
    assert balancer({"a": torch.ones(()), "b": torch.ones(())}) == 1


def test_state_goes_to_every_rank() -> None:
    first, second = Net(Balancer(TASKS, MGDA())), Net(Balancer(TASKS, MGDA()))
    x = torch.randn(8, 3)
    run(first, VirtualRanks(2, first.balancer, first), x)
    ranks = VirtualRanks(2, second.balancer, second)
    second.balancer.load_state_dict(first.balancer.state_dict())
    run(second, ranks, x)
    assert second.balancer.step == 2


@pytest.mark.parametrize("number", [0, -1, 2.0, True])
def test_bad_numbers(number: object) -> None:
    with pytest.raises(ValueError, match="virtual ranks must be a number"):
        VirtualRanks(number, Balancer(TASKS, Equal()), nn.Module())


def test_virtual_ranks_come_before_the_first_step() -> None:
    net = Net(Balancer(TASKS, Equal()))
    net(torch.randn(2, 3))
    with pytest.raises(RuntimeError, match="before the balancer's first step"):
        VirtualRanks(2, net.balancer, net)


def test_split_keeps_order_and_passes_the_rest_on() -> None:
    ranks = VirtualRanks(3, Balancer(TASKS, Equal()), nn.Module())
    parts = ranks.split({"x": torch.arange(7), "name": "all", "scalar": torch.tensor(5)})
    assert [part["x"].tolist() for part in parts] == [[0, 1, 2], [3, 4], [5, 6]]
    assert all(part["name"] == "all" and part["scalar"] == 5 for part in parts)


def test_the_buffers_of_the_model_are_those_of_rank_0() -> None:
    x = torch.arange(8.0).reshape(8, 1)
    alone, model = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    ranks = VirtualRanks(2, Balancer(TASKS, Equal()), model)
    for step in range(2):
        alone(x[:4] + step)
        ranks.run(lambda rank, step=step: model(x[4 * rank :][:4] + step).sum())
        assert torch.equal(model.running_mean, alone.running_mean)
        assert model.num_batches_tracked == step + 1


def test_every_rank_has_buffers_of_its_own() -> None:
    model = nn.BatchNorm1d(1)
    ranks = VirtualRanks(3, Balancer(TASKS, Equal()), model)

    def work(rank: int) -> Tensor:
        before = model.running_mean.clone()
        model(torch.full((4, 1), float(rank)))
        return model.running_mean.sum() - before.sum()

    assert ranks.run(work) == pytest.approx(0.1)  # the momentum times 0, 1, 2, from 0 on each rank


def test_losses_from_outside_the_step_are_those_of_all_ranks() -> None:
    """As one process that has seen the mean over all samples."""
    one, several = Balancer(TASKS, FAMO(feedback="after")), Balancer(TASKS, FAMO(feedback="after"))
    ranks = VirtualRanks(2, several, nn.Module())

    def losses(a: float) -> dict[str, Tensor]:
        return {"a": torch.tensor(a, requires_grad=True), "b": torch.ones((), requires_grad=True)}

    def work(rank: int) -> Tensor:
        several(losses(2.0))
        several.observe(losses(0.5 + rank), counts={"a": 3 - 2 * rank, "b": 1})
        return several(losses(2.0))

    ranks.run(work)
    one(losses(2.0))
    one.observe(losses(0.75))
    one(losses(2.0))
    assert several.weights == pytest.approx(one.weights, rel=1e-12)
    assert several.weights["a"] != several.weights["b"]


def test_a_rank_that_is_refused_in_observe_tells_the_others() -> None:
    balancer = Balancer(TASKS, FAMO(feedback="after"))
    ranks = VirtualRanks(2, balancer, nn.Module())
    losses = {task: torch.ones((), requires_grad=True) for task in TASKS}
    heard = []

    def work(rank: int) -> Tensor:
        total = balancer(losses)
        try:
            balancer.observe({"c": losses["a"]} if rank else losses)
        except Exception as error:
            heard.append(str(error))
            raise
        return total

    with pytest.raises(ValueError, match="unknown task"):
        ranks.run(work)
    assert len(heard) == 2
    assert any("rank 1" in text for text in heard)


def test_the_report_says_how_long_the_ranks_waited_for_each_other() -> None:
    alone, net = Net(Balancer(TASKS, MGDA())), Net(Balancer(TASKS, MGDA()))
    alone(torch.randn(6, 3))
    assert alone.balancer.report.sync.seconds() == 0
    begun = time.perf_counter()
    run(net, VirtualRanks(2, net.balancer, net), torch.randn(6, 3))
    assert 0 < net.balancer.report.sync.seconds() < time.perf_counter() - begun


def test_ranks_in_different_calls_are_told_which() -> None:
    balancer = Balancer(TASKS, FAMO(feedback="after"))
    ranks = VirtualRanks(2, balancer, nn.Module())
    losses = {task: torch.ones((), requires_grad=True) for task in TASKS}

    def work(rank: int) -> Tensor:
        balancer(losses)
        if rank:
            balancer.observe(losses)
        return balancer(losses)

    with pytest.raises(
        RuntimeError, match=r"rank 0: a training call at step 1\n  rank 1: observe\(\) at step 1"
    ):
        ranks.run(work)


CALLS: list[int] = []


@dataclass(frozen=True)
class ByTheCall(Equal):
    """A rule that breaks the contract: it gives other weights at each call."""

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        CALLS.append(1)
        weights, state = super().update(stats, state)
        return weights * len(CALLS), state


def test_weights_that_differ_are_told_rank_by_rank() -> None:
    net = Net(Balancer(TASKS, ByTheCall()))
    CALLS.clear()
    with pytest.raises(RuntimeError, match=r"virtual rank 1 has weights .*'a': 1\.0.* rank 0 \{'a': 0\.5"):
        run(net, VirtualRanks(3, net.balancer, net), torch.randn(6, 3))
