"""The cells that matter, at every run: all engines, and each option on one engine of each kind.

The whole matrix is launch/matrix.sh.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cells import ENGINES, FAMILIES, Cell, ci_matrix, refusal, whole_matrix
from compare import BFLOAT16, FLOAT32, Verdict, judge
from matrix import judge_all
from table import markdown
from toy import TASKS, Net, global_batch

from mtl_dist import Balancer
from mtl_dist.weighting import MGDA

LIMIT = 1500.0  # seconds for all cells, far above what free cores need


@pytest.fixture(scope="module")
def verdicts(request: pytest.FixtureRequest) -> dict[Cell, Verdict]:
    """Of the cells that are selected: `-k zero` trains no other."""
    found = (getattr(item, "callspec", None) for item in request.session.items)
    selected = {spec.params["cell"] for spec in found if spec and "cell" in spec.params}
    return judge_all(cell for cell in ci_matrix() if cell in selected)


@pytest.mark.timeout(LIMIT)
@pytest.mark.parametrize("cell", ci_matrix(), ids=lambda cell: cell.name)
def test_a_cell_equals_one_process(verdicts: dict[Cell, Verdict], cell: Cell) -> None:
    verdict = verdicts[cell]
    assert verdict.outcome == ("refused" if refusal(cell) else "passed"), verdict.reason


def test_ci_runs_every_engine_and_every_option() -> None:
    whole, ci = whole_matrix(), ci_matrix()
    assert {cell.engine for cell in ci} == set(ENGINES)
    for field in (
        "rule",
        "probe",
        "precision",
        "accumulation",
        "held",
        "checkpoint",
        "compiled",
        "data",
        "lag",
    ):
        values = {getattr(cell, field) for cell in whole} - {"model, inductor", "sum"}
        assert {getattr(cell, field) for cell in ci} == values, field
    assert len(set(whole)) == len(whole)
    assert set(ci) <= set(whole)


@pytest.mark.parametrize("checkpoint", ["none", "non-reentrant"])
def test_a_compiled_model_breaks_once_at_the_balancer(checkpoint: str) -> None:
    cell = Cell("plain", checkpoint=checkpoint)
    net = Net(Balancer(TASKS, MGDA()), cell)
    torch._dynamo.reset()
    explained = torch._dynamo.explain(net)(global_batch(0, 0, "even"))
    assert len(explained.break_reasons) == 1, explained
    assert "Balancer.forward" in explained.break_reasons[0].reason
    assert explained.graph_count == 1  # the trunk; after the balancer nothing is left to compile


# ---- the harness can fail --------------------------------------------------------------------------


def result(**others: Any) -> dict[str, Any]:
    after = {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor([0.5])}
    before = {"w": torch.zeros(2), "b": torch.zeros(1)}
    facts = {"world_size": 2}
    weights = torch.tensor([[0.25, 0.75]])
    return {"facts": facts, "weights": weights, "before": before, "after": after, "seconds": 1.0, **others}


def off(factor: float) -> dict[str, Any]:
    return result(after={"w": torch.tensor([1.0, 2.0]), "b": torch.tensor([0.5 * (1 + factor)])})


DDP = Cell("ddp")
BF16 = replace(DDP, precision="bf16")


@pytest.mark.parametrize(
    ("cell", "ranks", "outcome", "reason"),
    [
        (DDP, [result(), result()], "passed", ""),
        (DDP, [off(5e-7), result()], "passed", ""),
        (DDP, [off(3e-6), result()], "failed", "b differ"),
        (BF16, [off(3e-6), result()], "passed", ""),
        (BF16, [off(0.1), result()], "failed", "parameters differ"),
        (DDP, [off(float("nan")), result()], "failed", "b differ"),
        (DDP, [result(weights=torch.tensor([[0.2501, 0.7499]]))] * 2, "failed", "weights differ"),
        (DDP, [result(weights=torch.zeros(2, 2))] * 2, "failed", "weights differ"),
        (DDP, [result(), result(weights=torch.tensor([[0.2501, 0.7499]]))], "failed", "ranks used different"),
        (DDP, [result(facts={"world_size": 1})] * 2, "failed", "ran on 1 ranks"),
        (DDP, [result()], "failed", "ran on 2 ranks"),
        (DDP, [result(error="ValueError: no")] * 2, "failed", "ValueError: no"),
        (DDP, [result(), result(error="ValueError: no")], "failed", "ValueError: no"),
    ],
)
def test_a_difference_is_found(cell: Cell, ranks: list[dict], outcome: str, reason: str) -> None:
    verdict = judge(cell, ranks, result())
    assert verdict.outcome == outcome, verdict
    assert reason in verdict.reason


def test_a_refusal_must_come_from_every_rank_in_its_words() -> None:
    cell = next(cell for cell in whole_matrix() if refusal(cell))
    expected = refusal(cell)
    assert expected is not None
    message = next(cell for cell in REFUSED if expected.pattern.search(cell))
    raised = result(error=message)
    assert judge(cell, [raised, raised], result()).outcome == "refused"
    assert judge(cell, [raised, result(error="RuntimeError: other")], result()).outcome == "failed"
    assert judge(cell, [raised, result()], result()).outcome == "failed"
    assert judge(cell, [result(), result()], result()).outcome == "failed"


# beginnings of what is raised
REFUSED = (
    "RuntimeError: expect_autograd_hooks_ INTERNAL ASSERT FAILED",
    "RuntimeError: Expected to mark a variable ready only once.",
)


def test_the_tolerances() -> None:
    assert FLOAT32 == 1e-6
    assert BFLOAT16 == 2**-6


def test_the_table_says_what_failed_and_why_cells_were_refused() -> None:
    cells = [
        Cell("ddp"),
        Cell("fsdp2"),
        Cell("fsdp2", precision="bf16"),
        Cell("zero-3", held=True, accumulation=4),
    ]
    outcomes = [Verdict("passed", error=2e-7), Verdict("failed", "b differ"), Verdict("refused", "because")]
    text = markdown(dict(zip(cells, [*outcomes, Verdict("passed", error=3e-7)], strict=True)))
    assert "4 cells: 2 passed, 1 refused, 1 failed" in text
    assert "* fsdp2: mgda, FeatureProbe, fp32: b differ" in text
    assert "(1) because" in text
    assert "| ddp | 1 | - " in text
    assert "| fsdp2 | **1 failed** | refused (1) |" in text


def test_every_engine_has_a_family() -> None:
    assert len(ENGINES) == 1 + sum(len(engines) for engines in FAMILIES.values()) == len(set(ENGINES))
