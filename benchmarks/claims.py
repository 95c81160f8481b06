"""What the source claims in words, and what the tables of `which_rule.py` say about it.

    python -m benchmarks.claims

Each claim compares two rules. The number is the difference of their Δm in percent on a data set, with the
same seeds, each rule at its own best learning rate, and its standard error. Nothing is trained here: data
sets without results are left out. Writes `benchmarks/results/which_rule/claims.md`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.data_sets import DATA_SETS, RANDOM
from benchmarks.tables import RESULTS
from benchmarks.trials import decimals, mean_and_error
from benchmarks.which_rule import Row, rows, stored

BEST_RANDOM = "best random weights"


@dataclass(frozen=True)
class Claim:
    """A sentence, and two entries. It speaks for the sentence if `one` is not worse than `other`."""

    words: str
    one: str
    other: str


CLAIMS = (
    Claim(
        "Equal weights have no meaning: others that were drawn at random are better.", BEST_RANDOM, "equal"
    ),
    Claim("1/L is a good baseline: better than equal weights.", "inverse_loss", "equal"),
    Claim("1/L of the first step already is.", "initial_loss", "equal"),
    Claim("1/‖∇L‖ is better in principle than 1/L.", "inverse_grad_norm", "inverse_loss"),
    Claim("GradNorm is redundant: 1/‖∇L‖ is as good.", "inverse_grad_norm", "grad_norm"),
    Claim("The min-norm direction is better than 1/‖∇L‖.", "mgda", "inverse_grad_norm"),
    Claim("Weights that adapt are better than the best fixed ones.", "inverse_grad_norm", BEST_RANDOM),
)


def entries(found: Sequence[Row]) -> dict[str, list[float]]:
    """Δm of each seed by entry; of the random weights those that were best when the rates were tuned."""
    drawn = [row for row in found if row.entry.startswith(RANDOM)]
    values = {row.entry: row.values for row in found if row not in drawn}
    if drawn:
        values[BEST_RANDOM] = max(drawn, key=lambda row: row.tuned).values
    return values


def difference(claim: Claim, values: Mapping[str, Sequence[float]]) -> str:
    """Mean of the paired differences ± standard error; empty if an entry is missing."""
    if claim.one not in values or claim.other not in values:
        return ""
    pairs = zip(values[claim.one], values[claim.other], strict=True)
    mean, error = mean_and_error([one - other for one, other in pairs])
    digits = decimals(error)
    return f"{mean:+.{digits}f} ± {error:.{digits}f}"


def table(results: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """One row for each claim, one column for each data set."""
    lines = [
        f"| claim | difference of Δm | {' | '.join(results)} |",
        "|---|---|" + "---:|" * len(results),
    ]
    for claim in CLAIMS:
        cells = [difference(claim, values) for values in results.values()]
        lines.append(f"| {claim.words} | {claim.one} - {claim.other} | {' | '.join(cells)} |")
    return "\n".join(lines)


def glance(results: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Δm of the entries that all data sets have, and the mean of their ranks; the best is first."""
    common = set.intersection(*(set(values) for values in results.values()))
    means = {
        name: {entry: statistics.fmean(values[entry]) for entry in common} for name, values in results.items()
    }
    order = {name: sorted(common, key=lambda entry: -of[entry]) for name, of in means.items()}
    rank = {entry: statistics.fmean(1 + order[name].index(entry) for name in order) for entry in common}
    lines = [f"| rule | {' | '.join(results)} | mean rank |", "|---|" + "---:|" * (len(results) + 1)]
    for entry in sorted(common, key=lambda entry: rank[entry]):
        cells = []
        for values in results.values():
            mean, error = mean_and_error(values[entry])
            cells.append(f"{mean:.{decimals(error)}f} ± {error:.{decimals(error)}f}")
        lines.append(f"| {entry} | {' | '.join(cells)} | {rank[entry]:.1f} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "which_rule")
    folder = parser.parse_args(argv).out
    names = [name for name in DATA_SETS if (folder / f"{name}.md").exists()]
    results = {name: entries(rows(*stored(name, folder, only_read=True))[0]) for name in names}
    text = (
        "`python -m benchmarks.claims`\n\n"
        f"Δm of one minus that of the other, in percent:\n\n{table(results)}\n\n"
        f"Δm in percent of what all data sets have:\n\n{glance(results)}\n"
    )
    (folder / "claims.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
