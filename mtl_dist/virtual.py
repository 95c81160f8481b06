"""Virtual ranks: one process trains as R data-parallel ranks would, through the same code.

Each rank is a thread that runs alone, from one collective to the next, in rank order: nothing depends on a
scheduler, so a run is reproducible and can be stepped through. Only the collectives differ from a real job's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree  # no public spelling yet in torch 2.13

from mtl_dist.balancer import Balancer, PeerFailed
from mtl_dist.sync import virtual_rank

_current: ContextVar[_Lockstep] = ContextVar("mtl_dist_lockstep")


class VirtualRanks:
    """R ranks in one process, for debugging a run of R on one device.

        ranks = VirtualRanks(4, balancer, model)
        for batch in loader:
            shards = ranks.split(batch)
            loss = ranks.run(lambda rank: backward(model(**shards[rank])))

    Every rank has its own copy of the balancer, its own random state (all start from the present one, as
    processes with one seed do) and its own values of the model's buffers; parameters and gradients are
    shared. A rank's backward must be of its loss divided by R: the sum over ranks in `.grad` is then the mean
    that an engine computes. After `run`, buffers are those of rank 0, which engines broadcast or save.

    Memory is that of all shards together. Nothing is shared with other processes, if there are any.

    Args:
        number: R.
        balancer: inside `model`, like all other balancers there. Their reports are those of rank 0, which all
            ranks share.
        model: whose buffers each rank has its own values of.

    Raises:
        ValueError: R is no positive number.
        RuntimeError: the balancer has taken a step already.
    """

    def __init__(self, number: int, balancer: Balancer, model: nn.Module) -> None:
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"virtual ranks must be a number >= 1, got {number!r}")
        self.number = number
        inside = (module for module in model.modules() if isinstance(module, Balancer))
        self._balancers = tuple(dict.fromkeys([balancer, *inside]))
        self._model = model
        self._ranks: list[_Own] = []
        for one in self._balancers:
            one.become_virtual([_VirtualCollectives(rank, number) for rank in range(number)])

    def split(self, batch: Any) -> list[Any]:
        """R parts of a batch (any pytree of tensors), along the first axis and in order.

        Sizes differ by at most one; anything that is not a tensor goes to every part.
        """
        flat, spec = pytree.tree_flatten(batch)
        parts = [
            leaf.tensor_split(self.number)
            if isinstance(leaf, Tensor) and leaf.dim()
            else [leaf] * self.number
            for leaf in flat
        ]
        return [pytree.tree_unflatten(list(part), spec) for part in zip(*parts, strict=True)]

    def run(self, work: Callable[[int], Tensor]) -> Tensor:
        """Runs `work(rank)` for every rank, forward and backward.

        Args:
            work: takes the rank, returns its scalar loss.

        Returns:
            mean of the losses over ranks, detached.

        Raises:
            Exception: the first that a rank raised.
            RuntimeError: ranks did not take part in the same collectives, or their weights differ.
        """
        if not self._ranks:
            self._ranks = [_Own(self._model, copied=rank > 0) for rank in range(self.number)]
        losses = _Lockstep(work, self._ranks).run()
        self._ranks[0].enter()
        for balancer in self._balancers:
            balancer.check_virtual_agreement()
        return torch.stack([loss.detach() for loss in losses]).mean()


class _Own:
    """What a rank has of its own while parameters are shared: random state, and the model's buffers."""

    def __init__(self, model: nn.Module, *, copied: bool) -> None:
        self._random = _random_state()
        self._buffers: dict[tuple[nn.Module, str], Tensor | None] = {
            (module, name): buffer.clone() if copied else buffer
            for module in model.modules()
            for name, buffer in module.named_buffers(recurse=False)
        }

    def enter(self) -> None:
        """Before the rank runs."""
        _set_random_state(self._random)
        for (module, name), buffer in self._buffers.items():
            module._buffers[name] = buffer  # not copied into: another rank's backward may need the old values

    def leave(self) -> None:
        """When it stops to wait, or has ended."""
        self._random = _random_state()
        self._buffers = {(module, name): module._buffers[name] for module, name in self._buffers}


class _Lockstep:
    """Threads that take turns: one runs, until it waits for the others' values or ends."""

    def __init__(self, work: Callable[[int], Tensor], ranks: Sequence[_Own]) -> None:
        number = len(ranks)
        self._ranks = ranks
        self._go = [threading.Semaphore(0) for _ in range(number)]
        self._back = threading.Semaphore(0)
        self._offers: list[Any] = [None] * number
        self._answer: Sequence[Any] | Exception = []
        self._results: list[Tensor | None] = [None] * number
        self._errors: list[Exception | None] = [None] * number
        self._ended = [False] * number
        self._threads = [
            threading.Thread(target=self._thread, args=(rank, work), name=f"virtual rank {rank}", daemon=True)
            for rank in range(number)
        ]

    def run(self) -> list[Tensor]:
        """The results of all ranks."""
        for thread in self._threads:
            thread.start()
        while not all(self._ended):
            running = [rank for rank, ended in enumerate(self._ended) if not ended]
            for rank in running:
                self._ranks[rank].enter()
                self._go[rank].release()
                self._back.acquire()
                self._ranks[rank].leave()
            waiting = [rank for rank, ended in enumerate(self._ended) if not ended]
            self._answer = list(self._offers)
            if waiting and any(self._ended):
                self._answer = RuntimeError(
                    f"virtual ranks {waiting} wait in a collective of mtl_dist that others never reach"
                )
        errors = [error for error in self._errors if error is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, PeerFailed)):  # causes first
            raise error
        return [result for result in self._results if result is not None]

    def exchange(self, rank: int, offer: Any) -> Sequence[Any]:
        """The offers of all ranks, in rank order."""
        self._offers[rank] = offer
        self._back.release()
        self._go[rank].acquire()
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer

    def _thread(self, rank: int, work: Callable[[int], Tensor]) -> None:
        self._go[rank].acquire()
        _current.set(self)
        virtual_rank.set(rank)
        try:
            # on accelerators, backward functions otherwise run in a thread that the ranks share
            with torch.autograd.set_multithreading_enabled(False):
                self._results[rank] = work(rank)
        except Exception as error:
            self._errors[rank] = error
        self._ended[rank] = True
        self._back.release()


class _VirtualCollectives:
    """The collectives (`sync.Collectives`) of threads in one process."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size

    def start_all_reduce(self, buffer: Tensor) -> Callable[[], None]:
        self._add_up(buffer)
        return lambda: None

    def _add_up(self, buffer: Tensor) -> None:
        buffer.copy_(torch.stack(list(self._exchange(buffer.clone()))).sum(0))

    def reduce_scatter(self, mine: Tensor, by_rank: Tensor) -> None:
        pieces = [offer[self.rank] for offer in self._exchange(by_rank.clone())]
        mine.copy_(torch.stack(pieces).sum(0))

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        return list(self._exchange(tensor.clone()))

    def gather_text(self, text: str) -> list[str | None]:
        return list(self._exchange(text))

    def all_reduce_and_leave(self, buffer: Tensor) -> None:
        self._add_up(buffer)

    def _exchange(self, offer: Any) -> Sequence[Any]:
        lockstep = _current.get(None)
        if lockstep is None:
            raise RuntimeError(
                "this balancer belongs to virtual ranks: call the model in training mode from "
                "VirtualRanks.run only"
            )
        return lockstep.exchange(self.rank, offer)


def _random_state() -> list[Tensor]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states += torch.cuda.get_rng_state_all()
    return states


def _set_random_state(states: Sequence[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(list(states[1:]))
