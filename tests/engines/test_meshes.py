"""HSDP and tensor parallelism on a 2x2 mesh of 4 ranks equal one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from matrix import START_LIMIT, run_script

PROBES = ("FeatureProbe", "FeatureTap")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder: Path = tmp_path_factory.mktemp("meshes")
    results = {}
    for num_processes in (1, 4):
        out = folder / f"{num_processes}.pt"
        done = run_script("meshes.py", num_processes, out, timeout=START_LIMIT)
        assert done.returncode == 0, done.stderr
        results |= torch.load(out)
    return results


def error(expected: torch.Tensor, got: torch.Tensor) -> float:
    return float((expected - got).abs().max() / expected.abs().max())


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("mesh", ["HSDP", "dp x tp"])
def test_a_mesh_equals_one_process(trained: dict, mesh: str, probe: str) -> None:
    expected, got = trained[probe], trained[f"{mesh}, {probe}"]
    assert error(expected["weights"], got["weights"]) <= 1e-6
    assert error(expected["gram"], got["gram"]) <= 2e-6  # of gradients in float32, squared
    for name, parameter in expected["parameters"].items():
        assert error(parameter, got["parameters"][name]) <= 1e-6, name


@pytest.mark.parametrize("probe", PROBES)
def test_without_the_group_tensor_parallel_ranks_are_counted_twice(trained: dict, probe: str) -> None:
    """Losses look right, and the Gram is half of what it is: the group argument is what makes it whole."""
    expected, got = trained[probe]["gram"][0], trained[f"dp x tp without its group, {probe}"]["gram"][0]
    assert error(expected / 2, got) <= 2e-6
