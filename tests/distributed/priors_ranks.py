"""W ranks with unequal shards, one of them empty, have the priors of one process. Run by test_priors.py."""

import math

import pytest
import torch
import torch.distributed as dist
from ranks import start, stop

from mtl_dist.priors import Binary, Categorical, MultiLabel, Regression, estimate_priors

DEFINITIONS = {
    "class": Categorical(5),
    "weighted": Categorical(5, weight=[0.5, 2, 1, 3, 0.25], label_smoothing=0.1),
    "binary": Binary(),
    "labels": MultiLabel(3, missing=-1),
    "scalar": Regression(),
    "vector": Regression(4, reduction="sum"),
}


def data(num):
    """All ranks' labels, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.randint(0, 5, (num,), generator=generator)
    vectors = torch.randn(num, 4, generator=generator, dtype=torch.float64) * 3 + torch.arange(4)
    return {
        "class": classes,
        "weighted": classes.clamp(max=3),
        "binary": classes > 2,
        "labels": torch.randint(-1, 2, (num, 3), generator=generator),
        "scalar": vectors[:, 0].contiguous(),
        "vector": vectors,
    }


def shard(labels, rank, world_size, *, last_empty=False):
    """One rank's labels; the shards are of unequal sizes."""
    num, parts = len(labels), world_size - last_empty
    cuts = [num * rank**2 // parts**2 for rank in range(parts)]
    cuts += [num] * (world_size + 1 - parts)
    return labels[cuts[rank] : cuts[rank + 1]]


def close(got, expected, tolerance=1e-12):
    assert math.isclose(got, expected, rel_tol=tolerance), f"{got!r} != {expected!r}"


def check_each(rank, world_size, last_empty):
    for task, labels in data(97).items():
        mine = shard(labels, rank, world_size, last_empty=last_empty)
        assert (len(mine) == 0) == (last_empty and rank == world_size - 1)
        whole, local = DEFINITIONS[task].empty(), DEFINITIONS[task].empty()
        whole.update(labels)
        for batch in mine.split(7):
            local.update(batch)
        total = local.synchronize()
        assert total.count == whole.count, task
        close(total.initial_loss, whole.initial_loss)
        close(total.prior_loss, whole.prior_loss)


def check_estimate(rank, world_size):
    parts = {task: shard(labels, rank, world_size, last_empty=True) for task, labels in data(97).items()}
    loader = [
        {task: labels[i : i + 5] if i % 2 or task != "class" else None for task, labels in parts.items()}
        for i in range(0, len(parts["class"]), 5)
    ]
    whole_loader = [None] * world_size
    dist.all_gather_object(whole_loader, loader)
    together = [batch for part in whole_loader for batch in part]

    calls, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: calls.append(0) or all_reduce(*args, **kwargs)
    priors = estimate_priors(loader, DEFINITIONS, labels=lambda batch: batch)
    dist.all_reduce = all_reduce
    assert len(calls) == 3, f"three all-reduces whatever the tasks and batches, got {len(calls)}"

    for task, definition in DEFINITIONS.items():
        one = definition.empty()
        for batch in together:
            if batch[task] is not None:
                one.update(batch[task])
        close(priors.initial[task], one.initial_loss)
        close(priors.prior[task], one.prior_loss)
        assert priors.counts[task] == one.count


def check_large_mean(rank, world_size):
    noise = torch.randn(5000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    local = Regression()
    for batch in shard(1e8 + noise, rank, world_size).split(13):
        local.update(batch)
    close(local.synchronize().prior_loss, noise.var(unbiased=False).item(), 1e-6)


def check_faults_reach_every_rank(rank, world_size):
    """One rank's bad label, and ranks with unlike tasks, are errors on every rank and no hang."""
    targets = torch.ones(3)
    if rank == 0:
        targets[1] = math.nan
    with pytest.raises(ValueError, match=rf"task 'y': Regression.* finite; 1 of {3 * world_size} are not"):
        estimate_priors([targets], {"y": Regression()}, labels=lambda batch: {"y": batch})
    with pytest.raises(ValueError, match=f"different tasks or losses.*num_classes={3 + rank}"):
        Categorical(3 + rank).synchronize()
    with pytest.raises(ValueError, match="different tasks or losses"):
        estimate_priors([], {f"task {rank}": Binary()}, labels=lambda batch: {})


def check_group(rank):
    """Only the ranks of the group are summed."""
    group = dist.new_group([0, 1])
    if rank < 2:
        local = Regression()
        local.update(torch.tensor([1.0 + 2 * rank]))
        total = local.synchronize(group)
        assert (total.count, total.initial_loss, total.prior_loss) == (2, 5, 1)


def main():
    rank, world_size = start()
    check_each(rank, world_size, last_empty=False)
    check_each(rank, world_size, last_empty=True)
    check_estimate(rank, world_size)
    check_large_mean(rank, world_size)
    check_faults_reach_every_rank(rank, world_size)
    check_group(rank)
    print("all checks passed\n", end="", flush=True)
    stop()


if __name__ == "__main__":
    main()
