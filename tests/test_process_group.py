"""The balancer's own process group, in a job of one rank."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mtl_dist import Balancer
from mtl_dist.sync.group import _options, make_group, members, timeout_of
from mtl_dist.sync.joins import JoinWatch
from mtl_dist.weighting import Equal

TIMEOUT = datetime.timedelta(seconds=77)
UNSET = -(2**31)  # by NCCL


@pytest.fixture
def job(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1, timeout=TIMEOUT
    )
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("job")
def test_a_group_of_our_own_is_like_its_parent_under_another_name() -> None:
    parent = dist.group.WORLD
    made = [make_group(parent, f"mtl_dist/0/{number}") for number in range(2)]
    assert len({parent, *made}) == 3
    for number, group in enumerate(made):
        assert (group.group_name, group.group_desc) == (f"mtl_dist/0/{number}", "mtl_dist")
        assert list(members(group)) == [0]
        assert timeout_of(group) == TIMEOUT
        assert dist.get_backend_config(group) == dist.get_backend_config(parent)
        assert dist.get_rank(group) == 0
        value = torch.ones(3)
        dist.all_reduce(value, group=group)
        assert value.tolist() == [1, 1, 1]
    dist.destroy_process_group(made[0])
    with pytest.raises(RuntimeError, match="was destroyed"):
        members(made[0])


@pytest.mark.usefixtures("job")
def test_where_torch_has_other_insides_its_own_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("torch.distributed.distributed_c10d._new_process_group_helper")
    asked = []
    monkeypatch.setattr(dist, "new_group", lambda *args, **kwargs: asked.append((args, kwargs)) or "group")
    assert make_group(dist.group.WORLD, "name") == "group"
    ((ranks, timeout, _), options) = asked[0]
    assert (ranks, timeout, options) == ([0], TIMEOUT, {"use_local_synchronization": True})


class NCCLConfig:
    """Settings of a communicator, as NCCL has them: some that nobody set, and one that is read only."""

    def __init__(self) -> None:
        self.blocking, self.max_ctas, self.net_name = UNSET, UNSET, None

    @property
    def unsafe_get_ptr(self) -> int:
        return id(self)


class NCCLOptions:
    def __init__(self) -> None:
        self.is_high_priority_stream, self.config = False, NCCLConfig()
        self._timeout = datetime.timedelta(minutes=10)


class ProcessGroupNCCL:
    def __init__(self) -> None:
        self.options = NCCLOptions()


def test_settings_of_nccl_are_those_of_the_parent() -> None:
    backend = ProcessGroupNCCL()
    given = backend.options
    given.is_high_priority_stream, given._timeout = True, TIMEOUT
    given.config.max_ctas, given.config.net_name = 4, "IB"
    own = _options(SimpleNamespace(_get_backend=lambda device: backend))
    assert own is not given
    assert (own.is_high_priority_stream, own._timeout) == (True, TIMEOUT)
    assert vars(own.config) == {"blocking": UNSET, "max_ctas": 4, "net_name": "IB"}
    assert _options(SimpleNamespace(_get_backend=lambda device: object())) is None


def test_a_group_that_cannot_tell_has_torchs_timeout() -> None:
    silent = SimpleNamespace(_get_backend=lambda device: object())
    assert timeout_of(silent) == dist.default_pg_timeout


@pytest.mark.usefixtures("job")
def test_a_join_is_refused_while_it_lasts() -> None:
    balancer, model = Balancer(["a"], Equal()), DistributedDataParallel(nn.Linear(2, 1))
    other = DistributedDataParallel(nn.Linear(2, 1))
    watch = JoinWatch()
    watch.check()
    with model.join():
        with pytest.raises(RuntimeError, match="cannot be called inside model"):
            watch.check()
        with pytest.raises(RuntimeError, match="cannot be called inside model"):
            balancer({"a": torch.ones((), requires_grad=True)})
    watch.check()
    with model.join(enable=False):
        watch.check()
    with model.join(throw_on_early_termination=True):
        watch.check()
    watch.check()
    with other.join(), pytest.raises(RuntimeError, match="join"):
        watch.check()
    balancer({"a": torch.ones((), requires_grad=True)})
    assert balancer.step == 1


def test_a_balancer_whose_job_has_ended_goes_on_alone_where_it_is_told_to(tmp_path: Path) -> None:
    balancer = Balancer(["a"], Equal())
    losses = {"a": torch.full((), 3.0, requires_grad=True)}
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    balancer.set_group(dist.group.WORLD)
    assert balancer(losses) == 3
    with pytest.raises(RuntimeError, match="the group cannot change after the first step"):
        balancer.set_group(None)
    dist.destroy_process_group()
    with pytest.raises(RuntimeError, match="job that has ended"):
        balancer(losses)
    balancer.set_group(None)
    assert balancer(losses) == 3
    assert balancer.step == 2
