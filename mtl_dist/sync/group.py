"""A process group of our own over the ranks of another one, under a name that all of its ranks agreed on.

`torch.distributed.new_group(use_local_synchronization=True)` names a group by its ranks and by the number of
groups that this process is in. Where ranks are members of different numbers of groups, they wait for each
other under different names, for ever. Without local synchronisation all ranks of the job would have to come.
"""

from __future__ import annotations

import datetime
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast

import torch
import torch.distributed as dist


def make_group(parent: dist.ProcessGroup, name: str) -> dist.ProcessGroup:
    """A group with the ranks, backend, timeout and options of `parent`.

    Args:
        parent: this rank is a member of it.
        name: the same on all of its ranks, and never used before.
    """
    ranks = dist.get_process_group_ranks(parent)
    backend, timeout = dist.get_backend_config(parent), timeout_of(parent)
    c10d, world = _c10d(), cast(Any, dist.group.WORLD)
    helper: Any = getattr(c10d, "_new_process_group_helper", None)
    if (
        helper is None
        or "group_name" not in inspect.signature(helper).parameters
        or hasattr(world, "new_group")
    ):
        # another torch: its own names, which need equal numbers of groups
        made = dist.new_group(ranks, timeout, backend, use_local_synchronization=True)
        return cast(dist.ProcessGroup, made)
    with _unbound(world, whole=len(ranks) == dist.get_world_size()):
        group, _ = helper(
            len(ranks),
            ranks.index(dist.get_rank()),
            ranks,
            dist.Backend(backend),
            job_store(),
            name,
            backend_options=_options(parent),
            timeout=timeout,
            group_desc="mtl_dist",
        )
    c10d._world.pg_group_ranks[group] = {rank: place for place, rank in enumerate(ranks)}
    return cast(dist.ProcessGroup, group)


def job_store() -> Any:
    """The store that `init_process_group` made."""
    return _c10d()._get_default_store()


def _c10d() -> Any:
    from torch.distributed import distributed_c10d  # absent where torch was built without it

    return distributed_c10d


def timeout_of(group: dist.ProcessGroup) -> datetime.timedelta:
    """How long the collectives of a group wait; `new_group` does not inherit it."""
    for backend in _backends(group):
        with suppress(AttributeError):
            timeout: datetime.timedelta = backend.options._timeout
            return timeout
    default: datetime.timedelta = dist.default_pg_timeout
    return default


def _backends(group: Any) -> Iterator[Any]:
    for device in getattr(group, "_device_types", [torch.device("cpu")]):
        with suppress(RuntimeError):
            backend = group._get_backend(device)
            yield getattr(backend, "wrapped_pg", backend)  # under TORCH_DISTRIBUTED_DEBUG=DETAIL


def _options(parent: dist.ProcessGroup) -> Any:
    """NCCL's stream priority and settings of a communicator, as `parent` has them; None for others."""
    given = next((b.options for b in _backends(parent) if type(b).__name__ == "ProcessGroupNCCL"), None)
    if given is None:
        return None
    own = type(given)()
    own.is_high_priority_stream = given.is_high_priority_stream
    own._timeout = given._timeout  # another one than that of the group would be warned of
    for name in dir(given.config):
        with suppress(AttributeError, TypeError):  # not to be read, or read only
            if not name.startswith("_") and isinstance(value := getattr(given.config, name), (int, str)):
                setattr(own.config, name, value)
    return own


@contextmanager
def _unbound(world: Any, *, whole: bool) -> Iterator[None]:
    """Where the job is bound to devices, NCCL splits the job's communicator, which all ranks must attend.

    A group of some ranks makes a communicator of its own instead.
    """
    bound = world.bound_device_id
    if whole or bound is None:
        yield
        return
    world.bound_device_id = None
    try:
        yield
    finally:
        world.bound_device_id = bound


def is_member(group: Any) -> bool:
    """Whether this rank is in the group that it was given; `new_group` gives a number to ranks it leaves out.

    Raises:
        ValueError: it is no group.
    """
    if isinstance(group, dist.ProcessGroup):
        return True
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        return False
    raise ValueError(
        f"group= must be a process group, such as torch.distributed.new_group(ranks) makes, got {group!r}: "
        "give the one of the ranks that hold different samples (a device mesh has get_group()), or None for "
        "all ranks"
    )


def outside(group: Any) -> RuntimeError:
    """The error for a group that this rank is not in."""
    return RuntimeError(
        f"mtl_dist: group= is no process group that this rank is a member of, got {group!r}: give each rank "
        "the group of the ranks that it shares the model with, or do not train on this rank"
    )


def check_member(group: dist.ProcessGroup | None) -> None:
    """Raises the error of a group that this rank cannot sum over; None stands for all ranks."""
    if group is not None and not is_member(group):
        raise outside(group)


def members(group: dist.ProcessGroup) -> Sequence[int]:
    """The ranks of a living group, in its order.

    Raises:
        RuntimeError: the group was destroyed.
    """
    try:
        return list(dist.get_process_group_ranks(group))
    except (KeyError, ValueError, RuntimeError):
        raise group_is_gone() from None


def group_is_gone() -> RuntimeError:
    """The error for a group that was given and exists no more."""
    return RuntimeError(
        "mtl_dist: the process group given as group= was destroyed, or the balancer came out of a file, "
        "which cannot hold a group: call attach again, or give the new group, balancer.set_group(group), or "
        "balancer.set_group(None) for all ranks"
    )
