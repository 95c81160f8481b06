"""The samples of a step: a pure function of seed and step, independent of the number of processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from mtl_dist.recipes import Batch, BatchData


class StepBatches(Sampler[list[int]]):
    """Batch sampler of the global batches of steps `first_step` to `last_step - 1`.

    Each epoch is a permutation that depends only on (seed, epoch), cut into full batches. The remaining
    samples are not used in that epoch. A resumed run therefore needs only its step, and no sampler state.

    Args:
        num_samples: number of samples of the data set.
        batch_size: number of samples of a global batch, over all ranks.
        seed: seed of the run.
        first_step: number of optimizer steps already done.
        last_step: number of optimizer steps of the whole run.
        parts: number of micro-batches that each global batch is cut into.

    Raises:
        ValueError: the data set is smaller than one batch.
    """

    drop_last = True  # Accelerate reads it: all batches are full

    def __init__(
        self, num_samples: int, batch_size: int, seed: int, first_step: int, last_step: int, parts: int = 1
    ) -> None:
        if num_samples < batch_size:
            raise ValueError(f"batch_size is {batch_size}, but there are only {num_samples} training samples")
        self.batch_size = batch_size // parts  # of what the loader yields
        self._size, self._parts = batch_size, parts
        self._num_samples = num_samples
        self._seed = seed
        self._steps = range(first_step, last_step)

    def __len__(self) -> int:
        return len(self._steps) * self._parts

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch = self._num_samples // self._size
        order: list[int] = []
        for step in self._steps:
            epoch, batch = divmod(step, per_epoch)
            if not order or batch == 0:
                order = self._permutation(epoch)
            for start in range(batch * self._size, (batch + 1) * self._size, self.batch_size):
                yield order[start : start + self.batch_size]

    def _permutation(self, epoch: int) -> list[int]:
        # hash the seed first: with seed + epoch alone, seed s + 1 would repeat the epochs of seed s
        seed = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(self._seed)))
        generator = torch.Generator().manual_seed(seed + epoch)
        order: list[int] = torch.randperm(self._num_samples, generator=generator).tolist()
        return order


def train_loader(data: BatchData, sampler: StepBatches, num_workers: int = 0) -> DataLoader[Batch]:
    """Loads what `sampler` yields. `Accelerator.prepare` splits it over ranks (`split_batches=True`)."""
    dataset: Any = (
        data  # torch's annotation asks for `__getitem__`; its fetcher uses `__getitems__` if it exists
    )
    collate: Any = _as_is  # torch's annotation allows only lists of samples
    # its iterators draw a seed. From torch's global generator, a resumed run would draw one more than the
    # first
    own = torch.Generator()
    return DataLoader(
        dataset, batch_sampler=sampler, collate_fn=collate, num_workers=num_workers, generator=own
    )


def eval_batches(data: BatchData, batch_size: int, rank: int, num_processes: int) -> Iterator[Batch]:
    """This rank's part of each validation batch. Every sample is on exactly one rank.

    All ranks get the same number of batches, because some engines communicate in the forward. The parts of
    the last batch may differ by one sample, or be empty.
    """
    for start in range(0, len(data), batch_size):
        indices = torch.arange(start, min(start + batch_size, len(data)))
        yield data.__getitems__(indices.tensor_split(num_processes)[rank].tolist())


def _as_is(batch: Batch) -> Batch:
    return batch
