"""The definition of correct: W ranks equal one process on the concatenated batch.

For every rule and probe (equivalence.py), through 20 steps under DDP: losses, Gram matrix, weights, and every
parameter gradient.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from equivalence import KINDS
from launcher import succeed
from problem import SCENARIOS
from torch import Tensor

STEPS = 20


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return trajectories(tmp_path_factory.mktemp("single"), 1, "float32")


@pytest.fixture(scope="module", params=[2, 4])
def several(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict:
    return trajectories(tmp_path_factory.mktemp("several"), request.param, "float32")


def trajectories(folder: Path, num_processes: int, dtype: str, rules: tuple[str, ...] = ()) -> dict:
    out = folder / "trajectories.pt"
    succeed("equivalence.py", num_processes, str(out), str(STEPS), dtype, *rules, timeout=290)
    return torch.load(out)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_ranks_equal_one_process(single: dict, several: dict, scenario: str) -> None:
    compare(single, several, scenario, 1e-6, per_parameter=False)


@pytest.mark.parametrize("num_processes", [2, 4])
def test_to_the_last_digits_in_float64(tmp_path: Path, num_processes: int) -> None:
    """What float32 leaves open: each parameter's own gradient, biases whose terms cancel included."""
    (tmp_path / "one").mkdir()
    expected = trajectories(tmp_path / "one", 1, "float64", KINDS)
    got = trajectories(tmp_path, num_processes, "float64", KINDS)
    for scenario in SCENARIOS:
        compare(expected, got, scenario, 1e-10, per_parameter=True)


def compare(expected: dict, got: dict, scenario: str, tolerance: float, *, per_parameter: bool) -> None:
    cells = [cell for cell in expected if cell[2] == scenario]
    assert cells
    assert expected.keys() == got.keys()
    problems = [
        problem
        for cell in cells
        for problem in differences(expected[cell], got[cell], cell, tolerance, per_parameter=per_parameter)
    ]
    assert not problems, "\n".join(problems)


def differences(
    expected: list[dict], got: list[dict], cell: tuple, tolerance: float, *, per_parameter: bool
) -> list[str]:
    """The first quantity of a trajectory that is off, if any, relative to its largest entry.

    In float32 a parameter's gradient is compared relative to the step's largest entry: the gradient of a
    bias is a sum over samples whose terms cancel, and its last digits depend on the order of the sum.
    """
    assert len(expected) == len(got) == STEPS
    for step, (a, b) in enumerate(zip(expected, got, strict=True)):
        largest = max(g.abs().max() for g in a["gradients"].values())
        pairs = {name: (a[name], b[name], None) for name in ("losses", "gram", "weights")}
        for name, gradient in a["gradients"].items():
            pairs[name] = (gradient, b["gradients"][name], None if per_parameter else largest)
        for name, (x, y, scale) in pairs.items():
            error = relative_error(x, y, scale)
            if not error <= tolerance:
                return [f"{cell}, step {step}: {name} differs by {error:.1e}"]
    return []


def relative_error(expected: Tensor | None, got: Tensor | None, scale: Tensor | None) -> float:
    if expected is None or got is None:
        assert expected is got
        return 0.0
    error = (expected - got).abs().max()
    scale = expected.abs().max() if scale is None else scale
    return float(error / scale) if error > 0 else 0.0
