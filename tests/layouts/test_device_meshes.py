"""Layouts of process groups: uneven, nested, permuted, late, experts, tensor parallel, and jobs made anew."""

from __future__ import annotations

from pathlib import Path

import device_meshes
import pytest
import torch
from compare_runs import check
from launcher import succeed


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder: Path = tmp_path_factory.mktemp("meshes")
    succeed(device_meshes.__file__, 4, str(folder / "out.pt"), str(folder))
    return torch.load(folder / "out.pt")


@pytest.mark.parametrize("name", device_meshes.LAYOUTS)
def test_every_rank_equals_one_process(trained: dict, name: str) -> None:
    expected = device_meshes.alone(name)
    of_ranks = [got for got in trained[name] if got is not None]
    assert len(of_ranks) == (3 if name == "uneven memberships" else 4)
    for got in of_ranks:
        check(expected, got)


def test_what_is_split_is_refused_in_words(trained: dict) -> None:
    for got in trained["tensor parallel"]:
        features, loss, samples, *probes = got["refused"]
        assert features.startswith("a feature is a DTensor of placements (Shard(dim=0),), and the balancer")
        assert loss.startswith("the loss of task 'a' is a DTensor of placements (")
        assert samples.startswith("the tensor of losses is a DTensor of placements (Shard(dim=0),)")
        assert all("give x.full_tensor()" in text for text in got["refused"])
        assert all("ParameterProbe and SharedLayerProbe do not measure" in text for text in probes)
        assert len(probes) == 2
