"""Ranks that do not meet as they should, one case after the other, each in a job of its own.

    meetings.py FOLDER CASES...       RANK and WORLD_SIZE in the environment

Writes `FOLDER/rank.RANK.json`: a mapping from case to ["ok", what it returned, seconds] or to
[error type, message, seconds]. A case that hangs ends the process after its limit.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import faulthandler
import gc
import json
import os
import pickle
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mtl_dist import Balancer, Engine, FeatureProbe, FeatureTap, ParameterProbe
from mtl_dist.weighting import DWA, FAMO, MGDA, Equal, Fixed, GradNorm, InverseLoss

RANK, WORLD_SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
FOLDER = Path(sys.argv[1])
LIMIT = 45.0
TASKS = ("a", "b")
jobs = 0


def start(seconds: float = 20) -> None:
    global jobs
    jobs += 1
    dist.init_process_group(
        "gloo",
        init_method=f"file://{FOLDER}/store.{CASE}.{jobs}",
        rank=RANK,
        world_size=WORLD_SIZE,
        timeout=datetime.timedelta(seconds=seconds),
    )


def end() -> None:
    gc.collect()
    dist.destroy_process_group()


class Net(nn.Module):
    def __init__(self, rule: Any = None, **others: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 1), nn.Linear(4, 1)
        self.balancer = Balancer(TASKS, rule or MGDA(), **others)

    def forward(self, x: Tensor) -> Tensor:
        return self.losses(self.trunk(x).tanh())

    def losses(self, z: Tensor) -> Tensor:
        heads = {"a": lambda z: self.a(z).square().mean(), "b": lambda z: (self.b(z) - 1).square().mean()}
        return self.balancer(z, heads)


def batch(step: int = 0, rank: int = RANK) -> Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(100 * step + rank))


def train(net: nn.Module, steps: int = 3, first: int = 0) -> None:
    for step in range(first, first + steps):
        net(batch(step)).backward()


def seen(net: Net) -> list:
    """What must be the same on all ranks."""
    return [net.balancer.step, list(net.balancer.weights.values())]


def trained(**others: Any) -> dict:
    """A state of three steps, of a net that met nobody."""
    net = Net(GradNorm(lr=0.2), group=alone(), **others)
    train(net)
    return net.balancer.state_dict()


def alone() -> dist.ProcessGroup:
    return [dist.new_group([rank]) for rank in range(WORLD_SIZE)][RANK]


# groups


def uneven_groups() -> Any:
    start()
    dist.new_group([0])
    net = Net()
    train(net)
    return seen(net)


def very_uneven_groups() -> Any:
    start()
    for _ in range(5 if RANK == 0 else 2):
        dist.new_group([RANK], use_local_synchronization=True)
    net, other = Net(), Net(DWA())
    train(net)
    train(other)
    return seen(net) + seen(other)


def uneven_numbers_of_balancers() -> Any:
    start()
    groups = [dist.new_group([0]), dist.new_group([1])]
    for _ in range(1 + 2 * RANK):
        train(Net(group=groups[RANK]))
    net = Net()
    train(net)
    return seen(net)


def mesh() -> Any:
    """Tensor x data: each data-parallel group makes its own; some ranks are in more groups than others."""
    start()
    dist.new_group([0])
    dist.new_group([0, 3])
    mine = [dist.new_group([0, 2]), dist.new_group([1, 3])][RANK % 2]
    net = Net(group=mine)
    for step in range(3):
        net(batch(step)).backward()
    return [RANK % 2, seen(net)]


def subgroup_of_a_subgroup() -> Any:
    start()
    outer = dist.new_group([1, 2, 3])
    inner = dist.new_group([2, 3])
    if RANK == 0:
        return None
    whole = Net(DWA(), group=outer)
    train(whole)
    if RANK > 1:
        part = Net(group=inner)
        train(part)
        return [RANK, seen(whole), seen(part)]
    return [RANK, seen(whole)]


def some_ranks_have_no_balancer() -> Any:
    start()
    last = dist.new_group([2, 3])
    if RANK < 2:
        return None
    net = Net(group=last)
    train(net)
    return seen(net)


def group_of_two_and_all() -> None:
    start()
    group = dist.new_group([1, 2])
    train(Net(group=None if RANK == 0 else group), 1)


def own_group_and_all() -> None:
    start()
    group = dist.new_group([1])
    train(Net(group=None if RANK == 0 else group), 1)


def not_a_member() -> Any:
    start()
    net = Net(group=dist.new_group([0]))
    train(net)
    return net.balancer.step


def same_ranks_in_other_words() -> Any:
    start()
    group = dist.new_group([0, 1])
    net = Net(group=None if RANK == 0 else group)
    train(net)
    return seen(net)


def timeout_is_inherited() -> Any:
    start(seconds=17)
    group = dist.new_group([0, 1], timeout=datetime.timedelta(seconds=13))
    found = []
    for given in (None, group):
        before = set(dist.distributed_c10d._world.pg_map)
        net = Net(group=given)
        train(net, 1)
        (own,) = set(dist.distributed_c10d._world.pg_map) - before
        found.append(own._get_backend(torch.device("cpu")).options._timeout.total_seconds())
    return found


# decided too early


def dry_run() -> Any:
    net = Net(InverseLoss())
    net(batch(0, 0))
    start()
    train(net)
    return seen(net)


def different_dry_runs() -> None:
    net = Net(InverseLoss())
    net(batch())
    start()
    train(net)


def dry_run_on_rank_0() -> None:
    net = Net(InverseLoss())
    if RANK == 0:
        net(batch())
    start()
    train(net)


def dry_run_in_eval_mode() -> Any:
    net = Net(InverseLoss())
    net.eval()(batch())
    with torch.no_grad():
        net.train()(batch())
    start()
    train(net)
    return seen(net)


def job_made_anew() -> Any:
    net = Net(GradNorm(lr=0.2))
    for k in range(3):
        start()
        train(net, 2, first=2 * k)
        end()
    start()
    other = Net(GradNorm(lr=0.2))
    train(other, 6)
    return [seen(net), seen(net) == seen(other)]


def job_ended() -> None:
    net = Net()
    start()
    train(net)
    end()
    net.eval()(batch())
    net.train()
    train(net)


def group_destroyed_before_the_first_step() -> None:
    start()
    group = dist.new_group([0, 1])
    net = Net(group=group)
    dist.barrier()  # the other rank may still be connecting
    dist.destroy_process_group(group)
    del group
    train(net)


def destroyed_group_kept() -> None:
    start()
    group = dist.new_group([0, 1])
    net = Net(group=group)
    dist.barrier()  # the other rank may still be connecting
    dist.destroy_process_group(group)
    train(net)


def group_given_anew() -> Any:
    start()
    group = dist.new_group([0, 1])
    net = Net(group=group)
    train(net, 2)
    del group
    end()
    start()
    net.balancer.set_group(dist.new_group([0, 1]))
    train(net, 2, first=2)
    return seen(net)


def a_copy_meets_again() -> Any:
    start()
    net = Net(GradNorm(lr=0.2))
    train(net)
    synchronizers = [net.balancer._synchronizer]
    synchronizers += [copy.deepcopy(synchronizers[0]), pickle.loads(pickle.dumps(synchronizers[0]))]
    states = []
    for synchronizer in synchronizers:
        net.balancer._synchronizer = synchronizer
        train(net, 1)
        states.append([synchronizer.world_size, seen(net)])
    return states


# states


def loaded_on_rank_0() -> None:
    start()
    state = trained()
    net = Net(GradNorm(lr=0.2))
    if RANK == 0:
        net.balancer.load_state_dict(state)
    train(net)


def loaded_by_all() -> Any:
    start()
    state = copy.deepcopy(trained())
    everyone: list = [None] * WORLD_SIZE
    dist.all_gather_object(everyone, state)
    net = Net(GradNorm(lr=0.2))
    train(net)
    net.balancer.load_state_dict(everyone[0])
    train(net)
    return seen(net)


def loaded_on_rank_0_later(probe: Any = None, rule: Any = None, own: bool = False) -> Any:
    start()
    net = Net(rule or GradNorm(lr=0.2), probe=probe)
    train(net, 2)
    state = net.balancer.state_dict()
    train(net, 2)
    if RANK == 0:
        net.balancer.load_state_dict(net.balancer.state_dict() if own else state)
    train(net, 2)
    return seen(net)


def loaded_later_under_the_tap() -> Any:
    return loaded_on_rank_0_later(FeatureTap())


def loaded_later_under_the_parameter_probe() -> Any:
    return loaded_on_rank_0_later(ParameterProbe())


def loaded_what_all_have() -> Any:
    return loaded_on_rank_0_later(own=True)


def loaded_other_weights_at_the_same_step() -> Any:
    start()
    net = Net(GradNorm(lr=0.2))
    train(net, 2)
    state = net.balancer.state_dict()
    if RANK == 1:
        state["weights"] = state["weights"].flip(0)
    net.balancer.load_state_dict(state)
    train(net, 2)
    return seen(net)


def loaded_and_a_peer_fails() -> Any:
    """What was loaded is still compared after a call that failed."""
    start()
    net = Net(GradNorm(lr=0.2))
    train(net, 2)
    state = net.balancer.state_dict()
    if RANK == 0:
        state["weights"] = state["weights"].flip(0)
        net.balancer.load_state_dict(state)
    with contextlib.suppress(RuntimeError, ValueError):
        net.losses(net.trunk(batch()) if RANK == 0 else torch.ones(2, 5))
    train(net, 2)
    return seen(net)


# settings


def settings(rank_0: dict, rank_1: dict, rule: Any = None) -> Callable[[], Any]:
    def case() -> Any:
        start()
        net = Net(rule and rule(), **(rank_0 if RANK == 0 else rank_1))
        train(net)
        return seen(net)

    return case


def fixed_in_another_order() -> Any:
    start()
    weights = {"a": 1.0, "b": 2.0}
    net = Net(Fixed(weights if RANK == 0 else dict(reversed(weights.items()))))
    train(net)
    return seen(net)


def other_fixed_weights() -> Any:
    start()
    train(Net(Fixed({"a": 1.0, "b": 2.0 + RANK})))


# calls


def observe_fails() -> Any:
    start()
    net = Net(FAMO(feedback="after"))
    train(net, 1)
    said = None
    try:
        net.balancer.observe({"a": torch.tensor(1.0), "b": torch.tensor(2.0) if RANK == 0 else torch.ones(3)})
    except (RuntimeError, ValueError) as error:
        said = f"{type(error).__name__}: {error}"
    train(net, 2)
    return [RANK, said, seen(net)]


def observe_on_one_rank() -> None:
    start()
    net = Net(FAMO(feedback="after"))
    train(net, 1)
    if RANK == 0:
        net.balancer.observe({"a": torch.tensor(1.0), "b": torch.tensor(2.0)})
    train(net, 2)


def another_step() -> None:
    start()
    net = Net()
    net.balancer.set_engine(Engine(skipped=lambda: RANK == 1))
    train(net)


def one_call_more() -> None:
    start(seconds=5)
    net = Net()
    train(net, 2 + RANK)
    if RANK == 0:
        time.sleep(8)


def evaluation_on_one_rank() -> Any:
    start()
    net = Net()
    train(net, 2)
    if RANK == 1:
        net.eval()(batch())
        with torch.no_grad():
            net.train()(batch())
    train(net, 2)
    return seen(net)


def never_comes() -> None:
    start(seconds=5)
    if RANK == 1:
        time.sleep(8)
        return
    train(Net())


def stops_to_come() -> None:
    start(seconds=5)
    net = Net()
    train(net, 1)
    if RANK == 1:
        time.sleep(8)
        return
    train(net)


def one_reduction_less() -> None:
    """Rank 1 loses its second reduction to an error that its loop passes over."""
    start(seconds=5)
    net = Net(probe=FeatureTap())
    for step in range(3):
        total = net(batch(step))
        if not (RANK == 1 and step == 1):
            total.backward()


# joins


def wrapped(net: Net) -> DistributedDataParallel:
    return DistributedDataParallel(net)


def join() -> None:
    start()
    model = wrapped(Net())
    with model.join():
        train(model, 3 + RANK)


def join_around_a_call_outside() -> None:
    start()
    net = Net()
    model = wrapped(net.trunk)
    with model.join():
        for step in range(3 + RANK):
            net.losses(model(batch(step))).backward()


def join_in_words() -> Any:
    """Contexts that end evenly by themselves are left alone."""
    start()
    net = Net()
    model = wrapped(net)
    with model.join(enable=False):
        train(model, 2)
    with model.join(throw_on_early_termination=True):
        train(model, 2, first=2)
    return seen(net)


def join_before() -> Any:
    start()
    net = Net()
    model = wrapped(net)
    train(model, 1)
    with model.join():
        net.eval()
        for _ in range(2 + RANK):
            model(batch()).backward()
    net.train()
    train(model, 2)
    return seen(net)


def join_of_throwing() -> None:
    start()
    model = wrapped(Net())
    with model.join(throw_on_early_termination=True):
        train(model, 3 + RANK)


SETTINGS = {
    "check": settings({"check": True}, {}),
    "on_nonfinite": settings({"on_nonfinite": "hold"}, {}),
    "window": settings({"window": 2}, {}, Equal),
    "measured for the report": settings({"probe": FeatureProbe()}, {}, Equal),
    "probe": settings({"probe": ParameterProbe(sketch=8)}, {"probe": ParameterProbe()}),
}
CASES: dict[str, Callable[[], Any]] = {
    name: value
    for name, value in globals().items()
    if callable(value) and getattr(value, "__module__", None) == "__main__" and name != "Net"
} | {f"settings: {name}": case for name, case in SETTINGS.items()}
CASE = ""
WAIT = ("one_call_more", "never_comes", "stops_to_come")  # for seconds, in which the other cases can run


def run(cases: list[str], file: Path) -> None:
    """Writes what became of each case."""
    global CASE, jobs
    results = {}
    for case in cases:
        CASE, jobs = case.replace(" ", "_").replace(":", ""), 0
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        begin = time.monotonic()
        try:
            results[case] = ["ok", CASES[case]()]
        except Exception as error:
            results[case] = [type(error).__name__, str(error)]
        results[case].append(time.monotonic() - begin)
        faulthandler.cancel_dump_traceback_later()
        if dist.is_initialized():
            (FOLDER / f"left.{CASE}.{RANK}").touch()
            while (
                len(list(FOLDER.glob(f"left.{CASE}.*"))) < WORLD_SIZE
            ):  # the others may still need this rank
                time.sleep(0.01)
            end()
    file.write_text(json.dumps(results))


def main() -> None:
    """Each case that waits has a process of its own; the others follow one another."""
    torch.set_num_threads(1)
    cases = [[case for case in sys.argv[2:] if case not in WAIT]]
    cases += [[case] for case in sys.argv[2:] if case in WAIT]
    files = [FOLDER / f"part.{RANK}.{number}.json" for number in range(len(cases))]
    processes = []
    for part, file in zip(cases[1:], files[1:], strict=True):
        processes.append(os.fork())
        if processes[-1] == 0:
            run(part, file)
            return
    run(cases[0], files[0])
    for process in processes:
        assert os.waitpid(process, 0)[1] == 0, "a case that waits ended its process"
    results = {case: result for file in files for case, result in json.loads(file.read_text()).items()}
    (FOLDER / f"rank.{RANK}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
    os._exit(0)  # groups after a timeout may keep threads
