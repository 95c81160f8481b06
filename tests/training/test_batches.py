"""The samples of a step depend on seed and step alone."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard

from mtl_dist.recipes import MultiDigits
from mtl_dist.training.batches import StepBatches, eval_batches, train_loader


def test_a_resumed_sampler_continues_the_sequence():
    full = list(StepBatches(103, 10, seed=3, first_step=0, last_step=25))
    assert len(full) == 25
    for first in (1, 9, 10, 14, 25):
        sampler = StepBatches(103, 10, seed=3, first_step=first, last_step=25)
        assert list(sampler) == full[first:]
        assert len(sampler) == 25 - first


def test_an_epoch_has_no_sample_twice_and_epochs_and_seeds_differ():
    batches = list(StepBatches(103, 10, seed=3, first_step=0, last_step=20))
    epochs = [list(chain(*batches[:10])), list(chain(*batches[10:]))]
    assert all(len(set(epoch)) == 100 for epoch in epochs)
    assert epochs[0] != epochs[1]
    other = list(chain(*StepBatches(103, 10, seed=4, first_step=0, last_step=10)))
    assert other not in epochs  # seed s + 1 must not be seed s one epoch later


@pytest.mark.parametrize("num_processes", [2, 4])
def test_accelerate_cuts_the_same_global_batches(num_processes):
    whole = list(StepBatches(50, 8, seed=0, first_step=0, last_step=9))
    shards = [
        list(BatchSamplerShard(StepBatches(50, 8, 0, 0, 9), num_processes, rank, split_batches=True))
        for rank in range(num_processes)
    ]
    assert [list(chain(*parts)) for parts in zip(*shards, strict=True)] == whole


def test_fewer_samples_than_a_batch_are_refused():
    with pytest.raises(ValueError, match="batch_size is 10, but there are only 9 training samples"):
        StepBatches(9, 10, 0, 0, 1)


def test_the_loader_gives_batches_of_the_samplers_indices():
    train, _ = MultiDigits(num_train=40, num_validation=1).data(seed=0)
    sampler = StepBatches(len(train), 8, seed=0, first_step=2, last_step=4)
    for indices, batch in zip(sampler, train_loader(train, sampler), strict=True):
        assert torch.equal(batch["image"], train.images[indices])
        assert torch.equal(batch["left"], train.digits[indices, 0])


@pytest.mark.parametrize("num_processes", [1, 2, 3, 8])
def test_every_validation_sample_is_on_one_rank_in_the_same_number_of_batches(num_processes):
    _, validation = MultiDigits(num_train=1, num_validation=29).data(seed=0)
    parts = [list(eval_batches(validation, 12, rank, num_processes)) for rank in range(num_processes)]
    assert {len(part) for part in parts} == {3}
    seen = torch.cat([batch["image"] for step in zip(*parts, strict=True) for batch in step])
    assert torch.equal(seen, validation.images)
