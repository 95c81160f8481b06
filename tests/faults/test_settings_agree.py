"""What ranks compare: exact, in one order, and in words."""

from __future__ import annotations

import copy
import importlib
import pickle
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from mtl_dist import Balancer, ParameterProbe
from mtl_dist.balancer.identity import canonical
from mtl_dist.stats import LocalStats
from mtl_dist.sync import Call, Kind, Synchronizer
from mtl_dist.sync.layout import Layout
from mtl_dist.sync.meeting import Arrival, Board
from mtl_dist.tracking import RunInfo, RunLog
from mtl_dist.weighting import Equal, Fixed, Smooth

CALLS = [
    Call(Kind.TRAINING, 7),
    Call(Kind.LATER, 7),
    Call(Kind.OBSERVE, 7),
    Call(Kind.CHECK, 7),
    Call(Kind.TRAINING, 8),
    Call(Kind.TRAINING, 7, news=1),
    Call(Kind.TRAINING, 7, news=0xFFFFFF),
    Call(Kind.TRAINING, 7, news=0xFFF000),
]


def strangers(calls: list[Call], failed: bool = False) -> bool:
    layout, nothing = Layout(2), LocalStats.zeros(2, torch.device("cpu"))
    flag = torch.tensor(failed)
    buffers = [layout.pack(nothing, rank, call, None, flag) for rank, call in enumerate(calls)]
    _, faults = layout.unpack(torch.stack(buffers).sum(0))
    return bool(faults.strangers(len(calls)))


@pytest.mark.parametrize("world_size", [2, 3, 64, 1000])
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_ranks_in_one_call_are_no_strangers(call: Call, world_size: int) -> None:
    assert not strangers([call] * world_size)


@pytest.mark.parametrize("world_size", [2, 3, 64, 1000])
@pytest.mark.parametrize("other", CALLS[1:], ids=str)
def test_one_rank_elsewhere_is_seen_by_the_sums(other: Call, world_size: int) -> None:
    assert strangers([CALLS[0]] * (world_size - 1) + [other])
    assert strangers([other] + [CALLS[0]] * (world_size - 1))


def test_three_ranks_whose_mean_is_one_of_them_are_seen() -> None:
    assert strangers([Call(Kind.TRAINING, step) for step in (6, 7, 8)])


def test_a_failed_rank_says_more_than_a_stranger() -> None:
    assert not strangers(CALLS[:2], failed=True)


def test_settings_have_one_order() -> None:
    assert canonical(Fixed({"a": 1.0, "b": 2.0})) == canonical(Fixed({"b": 2.0, "a": 1.0}))
    assert canonical(Smooth(Fixed({"a": 1.0, "b": 2.0}), 0.5)) == canonical(
        Smooth(Fixed({"b": 2.0, "a": 1.0}), 0.5)
    )
    assert canonical(Fixed({"a": 1.0, "b": 2.0})) != canonical(Fixed({"a": 2.0, "b": 1.0}))
    assert canonical(Smooth(Equal(), 0.5)) != canonical(Smooth(Equal(), 0.25))


def test_settings_have_no_addresses() -> None:
    assert canonical(ParameterProbe(parameters=list)) == canonical(ParameterProbe(parameters=list))
    assert "0x" not in canonical([object(), lambda: None])


def test_a_board_waits_no_longer_than_it_should_and_says_who_is_missing() -> None:
    store = dist.HashStore()
    assert Board(store, [0, 1], 0).exchange("x", 0.05) == ["x", None]
    assert Board(store, [0, 1, 2], 1).exchange("y", -0.9) == [None, "y", None]


def meet(boards: list[Board], texts: list[str]) -> list:
    found: list = [None] * len(boards)

    def work(place: int) -> None:
        found[place] = boards[place].exchange(texts[place], 20)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(boards))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


def test_a_rank_that_missed_a_round_meets_the_others_in_the_next() -> None:
    store = dist.HashStore()
    first, second = Board(store, [4, 2], 0), Board(store, [4, 2], 1)
    assert first.exchange("alone", 0.02) == ["alone", None]
    assert meet([first, second], ["a", "b"]) == [["a", "b"]] * 2
    assert meet([first, Board(store, [4, 2], 1)], ["same", "same"]) == [["same", "same"]] * 2


def test_ranks_that_began_with_other_balancers_are_no_clash() -> None:
    store = dist.HashStore()
    Arrival(store, [1], 1, "settings of another balancer")
    assert Arrival(store, [0, 1], 0, "settings").clash([1]) is None
    Arrival(store, [2], 2, "settings")
    said = Arrival(store, [3, 2], 3, "settings").clash([2])
    assert said is not None
    assert "rank 3 sums over ranks [3, 2], rank 2 over ranks [2]" in said
    assert Arrival(store, [3, 2], 3, "settings").clash([2]) is None, "a later one of rank 3"


def test_a_copy_of_a_synchronizer_has_met_nobody() -> None:
    balancer = Balancer(["a"], Equal())
    balancer({"a": torch.ones((), requires_grad=True)})
    for made in (copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))):
        twin: Synchronizer = made(balancer._synchronizer)
        assert not twin.started
        assert twin.num_tasks == 1
        assert twin.group is None


def test_a_group_does_not_survive_pickle_silently() -> None:
    synchronizer = Synchronizer(1)
    synchronizer._given = lambda: None
    twin = pickle.loads(pickle.dumps(synchronizer))
    with pytest.raises(RuntimeError, match="job that has ended"):
        twin.connect(lambda: pytest.fail("nobody to compare with"))
    twin.set_group(None)
    assert twin.group is None


@pytest.mark.parametrize("name", ["loss/cls", "a b", "a__b"])
def test_a_run_log_refuses_names_before_anything_is_trained(name: str, tmp_path) -> None:
    with pytest.raises(ValueError, match="cannot be part of a column name"):
        RunLog([], RunInfo(tmp_path, (name,), {}))


@pytest.mark.parametrize("strategy", ["steps", "no"])
def test_trainer_refuses_names_where_it_would_log_them(strategy: str, monkeypatch) -> None:
    transformers = importlib.import_module("mtl_dist.integrations._trainer")
    reached = []
    monkeypatch.setattr(transformers, "_check", lambda trainer: None)
    monkeypatch.setattr(transformers.accelerate, "attach", lambda *a, **k: reached.append("attach"))
    handler = SimpleNamespace(callbacks=[])
    args = SimpleNamespace(logging_strategy=strategy, gradient_accumulation_steps=1)
    trainer = SimpleNamespace(args=args, accelerator=None, callback_handler=handler)
    with pytest.raises(ValueError, match="'loss/cls' cannot be part of a column name"):
        transformers.attach(Balancer(["loss/cls"], Equal()), trainer)
    assert not reached
    assert not handler.callbacks
