"""What ranks compare: exact, in one order, and in words."""

from __future__ import annotations

import copy
import importlib
import pickle
import threading
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mtl_dist import Balancer, Engine, ParameterProbe
from mtl_dist.balancer.identity import state_digest
from mtl_dist.canonical import canonical
from mtl_dist.checkpoint import load, save
from mtl_dist.stats import LocalStats
from mtl_dist.sync import Call, Identity, Kind, Synchronizer
from mtl_dist.sync.agreement import compare_calls, compare_identities
from mtl_dist.sync.layout import Layout
from mtl_dist.sync.meeting import Arrival, Board
from mtl_dist.sync.summed import Summed
from mtl_dist.tracking import RunInfo, RunLog
from mtl_dist.weighting import Equal, Fixed, Rule, Smooth

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
    total = torch.stack(buffers).sum(0)
    return Summed(layout, total, with_gram=False).faults.strangers(len(calls))


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


class Largest(Rule):
    """As a stranger writes it: no dataclass."""

    def __init__(self, power: float = 1.0, scales: dict | None = None) -> None:
        self.scales = scales
        self.power = power

    def update(self, stats, state):
        return (stats.losses**self.power) * stats.present, state


class Slotted:
    __slots__ = ("low",)

    def __init__(self, low: float) -> None:
        self.low = low


class Plain:
    def __init__(self, low: float) -> None:
        self.low = low


def test_a_rule_that_is_no_dataclass_is_its_class_and_its_settings() -> None:
    assert repr(Largest(2.0)) == "Largest(power=2.0, scales=None)"
    assert Largest(2.0) == Largest(2.0) != Largest(3.0)
    assert len({Largest(2.0), Largest(2.0), Largest(3.0)}) == 2
    assert canonical(Largest(scales={"a": 1, "b": 2})) == canonical(Largest(scales={"b": 2, "a": 1}))
    assert "Largest(power=2.0" in repr(Smooth(Largest(2.0), 0.5))


@pytest.mark.parametrize(
    "kind", [Slotted, Plain, lambda low: torch.full((3,), low), lambda low: partial(max, low)]
)
def test_settings_of_any_kind_are_told_apart_by_their_values(kind) -> None:
    assert canonical(Largest(kind(1.0))) == canonical(Largest(kind(1.0))) != canonical(Largest(kind(2.0)))


def test_arrays_are_told_apart_by_all_their_values() -> None:
    array = np.zeros(5000)
    before = canonical(array)
    array[2500] = 1  # where its repr has dots
    assert canonical(array) != before


def test_a_checkpoint_of_such_a_rule_loads(tmp_path) -> None:
    balancer = Balancer(["a", "b"], Largest(2.0))
    save(balancer, tmp_path)
    load(Balancer(["a", "b"], Largest(2.0)), tmp_path)
    with pytest.raises(ValueError, match=r"belongs to rule 'Largest\(power=2.0.*has 'Largest\(power=3.0"):
        load(Balancer(["a", "b"], Largest(3.0)), tmp_path)


def test_a_checkpoint_loads_where_a_mapping_has_another_order() -> None:
    state = Balancer(["a", "b"], Fixed({"a": 1.0, "b": 2.0})).state_dict()
    Balancer(["a", "b"], Fixed({"b": 2.0, "a": 1.0})).load_state_dict(state)


def test_what_only_an_address_tells_apart_is_refused() -> None:
    with pytest.raises(ValueError, match="weighting: Largest has the setting <object object at 0x"):
        Balancer(["a", "b"], Largest(object()))
    with pytest.raises(ValueError, match="weighting: Smooth has the setting"):
        Balancer(["a", "b"], Smooth(Largest(object()), 0.5))
    with pytest.raises(ValueError, match=r"weighting is the class Equal: give an object, such as Equal\(\)"):
        Balancer(["a", "b"], Equal)
    loop: list = []
    loop.append(loop)
    with pytest.raises(ValueError, match="a setting of Largest holds itself"):
        Balancer(["a", "b"], Largest(loop))


class Remembers(Largest):
    def update(self, stats, state):
        self.seen = stats.losses
        return super().update(stats, state)


class Collects(Largest):
    def update(self, stats, state):
        self.scales.append(1)
        return super().update(stats, state)


@pytest.mark.parametrize("rule", [Remembers(), Collects(1.0, [])], ids=repr)
def test_a_rule_that_changes_itself_is_refused(rule) -> None:
    with pytest.raises(ValueError, match=r"changed the attributes of the rule.*belongs into its state"):
        Balancer(["a", "b"], Smooth(rule, 0.5))


def test_every_state_has_a_digest_of_24_bits() -> None:
    digests = set()
    for step in range(20):
        balancer = Balancer(["a", "b"], Equal())
        balancer.load_state_dict({**balancer.state_dict(), "step": step})
        digests.add(state_digest(balancer._progress))
    assert len(digests) == 20
    assert 0 < min(digests) <= max(digests) < 1 << 24


def test_every_setting_is_compared() -> None:
    made = [
        Balancer(["a", "b"], Equal()),
        Balancer(["b", "a"], Equal()),
        Balancer(["a", "b"], Fixed({"a": 1.0, "b": 2.0})),
        Balancer(["a", "b"], Equal(), probe=ParameterProbe()),
        Balancer(["a", "b"], Equal(), probe=ParameterProbe(seed=1)),
        Balancer(["a", "b"], Equal(), on_nonfinite="skip"),
        Balancer(["a", "b"], Equal(), window=2),
        Balancer(["a", "b"], Equal(), check=True),
        Balancer(["a", "b"], Equal()),
    ]
    made[-1].set_engine(Engine(scaled=lambda value: value))
    texts = {balancer._identity().settings_text() for balancer in made}
    assert len(texts) == len(made)
    assert canonical(partial(print, 1)) == "partial(print, [1], {})"


def test_sets_have_one_order_too() -> None:
    assert canonical({"b", "a"}) == canonical(frozenset("ab")) == "{'a', 'b'}"


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


def test_the_first_rank_waits_for_the_last() -> None:
    store = dist.HashStore()
    first, last = Board(store, [0, 1], 0), Board(store, [0, 1], 1)
    late = threading.Timer(0.1, lambda: last.exchange("late", 20))
    late.start()
    assert first.exchange("early", 20) == ["early", "late"]
    late.join(30)


def test_no_two_sets_of_ranks_have_a_round_in_common() -> None:
    sets = [[0], [1], [0, 1], [1, 0], [11], list(range(64)), list(range(65))]
    names = {Board(dist.HashStore(), ranks, 0).name for ranks in sets}
    assert len(names) == len(sets)
    assert max(map(len, names)) < 64, "a key of a store"


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


def test_only_ranks_that_mean_the_same_balancer_in_groups_that_share_a_rank_clash() -> None:
    store = dist.HashStore()
    Arrival(store, [1, 2], 1, "settings")
    apart, same, other = [
        Arrival(store, ranks, 0, settings)
        for ranks, settings in (([0, 3], "settings"), ([1, 2], "settings"), ([0, 1], "other"))
    ]
    for arrival in (apart, same, other):
        assert arrival.clash([0, 1, 5]) is None, "its own rank, and one that did not come, are no clash"


def test_a_part_of_the_job_looks_for_ranks_that_mean_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtl_dist.sync.meeting._OUTSIDERS_SECONDS", 0.05)
    store = dist.HashStore()
    alone = Arrival(store, [0], 0, "settings")
    assert alone.clash_outside(3) is None, "nobody came"
    Arrival(store, [2], 2, "settings")
    assert alone.clash_outside(3) is None, "rank 2 trains alone too"
    Arrival(store, [0, 1], 1, "settings")
    assert "rank 0 sums over ranks [0], rank 1 over ranks [0, 1]" in str(alone.clash_outside(3))
    assert Arrival(store, [0], 0, "settings").clash_outside(3) is None, "a later one of rank 0"


def test_a_part_of_the_job_waits_no_longer_than_until_all_have_come() -> None:
    store = dist.HashStore()
    Arrival(store, [1], 1, "settings")
    begun = time.monotonic()
    assert Arrival(store, [0], 0, "settings").clash_outside(2) is None
    assert time.monotonic() - begun < 1


def test_absent_ranks_are_said_to_be_where_they_were_last() -> None:
    store = dist.HashStore()
    mine = Arrival(store, [0, 1], 0, "settings")
    assert mine.whereabouts(1) == "rank 1, which has called no balancer"
    Arrival(store, [1, 2], 1, "first")
    Arrival(store, [1, 3], 1, "second")
    assert mine.whereabouts(1) == "rank 1, whose last balancer sums over ranks [1, 3]"


def test_ranks_in_different_calls_or_states_are_told_which() -> None:
    one, two = "a training call at step 1", "observe() at step 1"
    assert compare_calls([f"{one}\nstate 1", f"{one}\nstate 1"]) is None
    calls = compare_calls([f"{one}\nstate 1", f"{two}\nstate 1", None])
    assert isinstance(calls, RuntimeError)
    assert f"\n  rank 0: {one}\n  rank 1: {two}\n  rank 2: does not say" in str(calls)
    states = compare_calls([f"{one}\nstate 1", f"{one}\nstate 2"])
    assert isinstance(states, ValueError)
    assert "different states" in str(states)
    assert "\n  rank 0: state 1\n  rank 1: state 2" in str(states)


def test_only_the_settings_that_differ_are_told() -> None:
    mine = Identity({"probe": "P", "window": "1", "check": "False"}, "step 0")
    theirs = Identity({"probe": "P", "window": "2"}, "step 0")
    compare_identities([mine.text(), mine.text(), None])
    rows = r"They differ in check, window:\n  rank 0: check False, window 1\n  rank 1: check None, window 2"
    with pytest.raises(ValueError, match=rows) as raised:
        compare_identities([mine.text(), theirs.text()])
    assert "probe" not in str(raised.value)
    with pytest.raises(ValueError, match=r"different states .*:\n  rank 0: step 0\n  rank 1: step 1"):
        compare_identities([mine.text(), Identity(mine.settings, "step 1").text()])
    swapped = Identity(dict(reversed(mine.settings.items())), "step 0")
    assert (swapped.text(), swapped.settings_text()) == (mine.text(), mine.settings_text())


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
