"""Whether a cell equals its one-process reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from cells import Cell, refusal
from torch import Tensor

# float32: rounding of sums in another order, through 10 steps
FLOAT32 = 1e-6
# bf16 has 8 significant bits: unit roundoff u = 2^-8. One process rounds the gradient of the whole batch, W
# ranks round one gradient each, and some engines round their sum again: an error of u to 2u of a gradient's
# length in every step, which the steps need not cancel. So parameters are compared together, relative to the
# way they went, and weights relative to the largest, with a bound of 4u.
BFLOAT16 = 4 * 2.0**-8
# float16 has 11 bits
FLOAT16 = 4 * 2.0**-11
TOLERANCES = {"fp32": FLOAT32, "bf16": BFLOAT16, "fp16": FLOAT16}


@dataclass(frozen=True)
class Verdict:
    """Of one cell.

    Attributes:
        outcome: "passed", "refused" or "failed".
        reason: why it was refused, or what went wrong.
        error: largest relative difference; NaN where nothing was compared.
        seconds: it took.
    """

    outcome: str
    reason: str = ""
    error: float = float("nan")
    seconds: float = 0.0


def judge(
    cell: Cell, ranks: list[dict[str, Any]], reference: dict[str, Any] | None, world_size: int = 2
) -> Verdict:
    """Compares all ranks' results of a cell with one process, or their errors with the refusal expected.

    Args:
        cell: what was trained.
        ranks: what each rank found.
        reference: what one process found.
        world_size: how many ranks there must have been, but for plain torch.
    """
    expected = refusal(cell)
    errors = [rank.get("error") for rank in ranks]
    if any(errors):
        if expected and all(error and expected.pattern.search(error) for error in errors):
            return Verdict("refused", expected.reason, seconds=ranks[0]["seconds"])
        return Verdict("failed", f"raised {errors}")
    if expected:
        return Verdict("failed", f"should be refused ({expected.reason}) and was not")
    if reference is None or "error" in reference:
        return Verdict("failed", f"no reference: {(reference or {}).get('error')}")
    problem, error = difference(cell, ranks, reference, world_size)
    return Verdict("failed" if problem else "passed", problem, error, ranks[0]["seconds"])


def difference(
    cell: Cell, ranks: list[dict[str, Any]], reference: dict[str, Any], world_size: int
) -> tuple[str, float]:
    """What is wrong, if anything, and the largest relative error."""
    if cell.engine == "plain":
        world_size = 1
    for rank in ranks:
        if rank["facts"]["world_size"] != world_size or len(ranks) != world_size:
            return f"ran on {rank['facts']['world_size']} ranks", float("nan")
        if not torch.equal(rank["weights"], ranks[0]["weights"]):
            return "ranks used different weights", float("nan")
    got = ranks[0]
    if reference["before"].keys() != got["before"].keys():
        return f"other parameters: {sorted(got['before'].keys() ^ reference['before'].keys())}", float("nan")
    tolerance = TOLERANCES[cell.precision]
    errors = {
        "weights": distance(reference["weights"], got["weights"]),
        **parameter_errors(cell, got, reference),
    }
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    problem = "" if errors[worst] <= tolerance else f"{worst} differ by {errors[worst]:.1e}"
    return problem, errors[worst]


def parameter_errors(cell: Cell, got: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    """Of each tensor relative to its largest entry; in bf16 of all together relative to the way they went."""
    names = reference["after"]
    assert any(not torch.equal(reference["after"][n], reference["before"][n]) for n in names), (
        "nothing was learned"
    )
    if cell.precision == "fp32":
        return {name: distance(reference["after"][name], got["after"][name]) for name in names}
    start, end, ours = (
        torch.cat([values[name].float().flatten() for name in names])
        for values in (reference["before"], reference["after"], got["after"])
    )
    return {"parameters": float((ours - end).norm() / (end - start).norm())}


def distance(expected: Tensor, got: Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    if expected.shape != got.shape:
        return float("inf")
    return float((expected - got).abs().max() / expected.abs().max()) if expected.numel() else 0.0
