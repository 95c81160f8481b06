"""The time that each rule needs to compute weights from statistics, compared with the same method in torchjd.

    python -m benchmarks.solvers [--sizes 2 8 32 128] [--kinds normal] [--repeats 15]

Both get the same Gram matrix on the CPU, in float64, and alternate in the same run. Beside each time is the
certificate of the weights: their distance from the definition of the rule; 0 is exact (see
`tests/weighting/certificates.py`). "-" marks rules whose weights are a formula. Times are medians, in
milliseconds, of the CPU time of the process; with one thread on an idle machine this is the wall time. Rows
that miss a goal of `GOALS` are listed below the table. Writes `benchmarks/results/solvers.{md,json}`, or
`solvers_hard.{md,json}` for gradients other than normal ones.

Nash-MTL of torchjd needs the package `ecos`, which the tests do not install. Without it, the column is empty.
It starts from its own weights of the previous call, for the same gradients.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchjd import aggregation as tjd

from mtl_dist.stats import TaskStats
from mtl_dist.weighting import RULES
from tests.weighting.certificates import CERTIFICATES
from tests.weighting.gradients import KINDS, gradients, gram_of
from tests.weighting.subjects import build

RESULTS = Path(__file__).parent / "results"

Solve = Callable[[], Tensor]

# milliseconds on one core at n = 128, with a default for the other rules
GOALS = {"upgrad": 60.0}
GOAL = 20.0


def nash() -> Callable[[Tensor], Tensor]:
    """Nash-MTL of torchjd. It reads gradients, so the Gram matrix is factorised first (not measured)."""
    aggregators: dict[int, tjd.NashMTL] = {}
    vectors: dict[int, Tensor] = {}

    def solve(gram: Tensor) -> Tensor:
        n = len(gram)
        if n not in aggregators:
            aggregators[n] = tjd.NashMTL(n)
            values, columns = torch.linalg.eigh(gram)
            vectors[n] = columns * values.clamp(min=0).sqrt()
        return aggregators[n].weighting(vectors[n])

    return solve


# torchjd's weighting of the same name, from a Gram matrix
NEIGHBOURS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "aligned_mtl": tjd.AlignedMTLWeighting,
    "cagrad": lambda: tjd.CAGradWeighting(c=0.5),
    "dual_proj": tjd.DualProjWeighting,
    "fairgrad": lambda: tjd.FairGradWeighting(alpha=1.0),
    "gradvac": tjd.GradVacWeighting,
    "imtlg": tjd.IMTLGWeighting,
    "krum": lambda: tjd.KrumWeighting(0),
    "mgda": tjd.MGDAWeighting,
    "nash_mtl": nash,
    "pcd": tjd.PCDWeighting,
    "pcgrad": tjd.PCGradWeighting,
    "upgrad": tjd.UPGradWeighting,
}


def ours(name: str, gram: Tensor) -> Solve:
    tasks = [f"task{i}" for i in range(len(gram))]
    rule = build(name, tasks)
    state = rule.init(tasks, gram.device)
    ones = torch.ones(len(gram), dtype=gram.dtype)
    stats = TaskStats(losses=ones, present=ones > 0, gram=gram, counts=ones)
    return lambda: rule.update(stats, state)[0]


def theirs(name: str, gram: Tensor) -> Solve | None:
    if name not in NEIGHBOURS or (name == "krum" and len(gram) < 3):
        return None
    if name == "nash_mtl" and importlib.util.find_spec("ecos") is None:
        return None
    weighting = NEIGHBOURS[name]()
    return lambda: weighting(gram)


def median_ms(solvers: list[Solve], repeats: int) -> list[float]:
    """Median times of alternating calls. Slow solvers are called less often."""
    times: list[list[float]] = [[] for _ in solvers]
    for solve in solvers:
        solve()
    start = time.process_time()
    for _ in range(repeats):
        for solve, record in zip(solvers, times, strict=True):
            before = time.process_time()
            solve()
            record.append(1e3 * (time.process_time() - before))
        if time.process_time() - start > 3 and len(times[0]) >= 3:
            break
    return [statistics.median(record) for record in times]


def measure(name: str, n: int, kind: str, repeats: int) -> dict[str, object]:
    gram = torch.from_numpy(gram_of(gradients(kind, n)))
    solvers = [ours(name, gram)]
    if (neighbour := theirs(name, gram)) is not None:
        solvers.append(neighbour)
    certificate = CERTIFICATES.get(name)
    certificates = [certificate(gram.numpy(), s().numpy()) if certificate else None for s in solvers]
    times = median_ms(solvers, repeats)
    row: dict[str, object] = {
        "rule": name,
        "n": n,
        "kind": kind,
        "ms": times[0],
        "certificate": certificates[0],
    }
    if neighbour is not None:
        row |= {"torchjd_ms": times[1], "torchjd_certificate": certificates[1], "ratio": times[1] / times[0]}
    return row


def markdown(rows: list[dict[str, object]]) -> str:
    def cell(value: object, digits: str) -> str:
        return "-" if value is None else format(value, digits)

    lines = [
        "| rule | n | gradients | ms | certificate | torchjd ms | its certificate | times faster |",
        "|---|--:|---|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row['rule']} | {row['n']} | {row['kind']} "
        f"| {cell(row['ms'], '.3f')} | {cell(row['certificate'], '.0e')} "
        f"| {cell(row.get('torchjd_ms'), '.3f')} | {cell(row.get('torchjd_certificate'), '.0e')} "
        f"| {cell(row.get('ratio'), '.1f')} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def misses(rows: list[dict[str, object]]) -> str:
    """One line per missed goal: slower than torchjd, or slower than the goal at n = 128."""
    lines = []
    for row in rows:
        where = f"`{row['rule']}`, n = {row['n']}, {row['kind']}: {row['ms']:.3f} ms"
        if row["n"] == 128 and float(str(row["ms"])) > (goal := GOALS.get(str(row["rule"]), GOAL)):
            lines.append(f"- {where}, goal {goal:g} ms")
        if float(str(row.get("ratio", 1.0))) < 1:
            theirs, ours = row["torchjd_certificate"], row["certificate"]
            at = "" if theirs is None else f" (certificate {theirs:.0e}, ours {ours:.0e})"
            lines.append(f"- {where}, torchjd {row['torchjd_ms']:.3f} ms{at}")
    return "\nMissed:\n\n" + "\n".join(lines) + "\n" if lines else "\nNo goal is missed.\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 8, 32, 128])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["normal"], help="of gradients")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        measure(name, n, kind, args.repeats) for name in args.rules for n in args.sizes for kind in args.kinds
    ]
    table = markdown(rows) + misses(rows)
    print(table)
    args.output.mkdir(parents=True, exist_ok=True)
    name = "solvers" if args.kinds == ["normal"] else "solvers_hard"
    head = (
        f"torch {torch.__version__}, numpy {np.__version__}, one thread, CPU time; the machine was shared "
        f"(load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores), so compare within a row\n\n"
    )
    (args.output / f"{name}.md").write_text(head + table)
    (args.output / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
