"""The page and the line that a run ends in."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.record import FAILED, PASSED, SKIPPED, Found


def results_of(path: Path) -> dict[str, Found]:
    """Of one part; nothing where it did not run."""
    if not path.exists():
        return {}
    found: dict[str, Found] = json.loads(path.read_text(encoding="utf-8"))["results"]
    return found


def counted(path: Path) -> str:
    """How many checks of a part passed, were skipped and failed."""
    outcomes = Counter(found["outcome"] for found in results_of(path).values())
    return ", ".join(f"{outcomes[kind]} {kind}" for kind in (PASSED, SKIPPED, FAILED))


def where(facts: dict[str, Any]) -> str:
    """The hardware in a few words."""
    names = Counter(gpu["name"] for gpu in facts["gpus"])
    gpus = " + ".join(f"{count} x {name}" for name, count in names.items())
    return gpus or f"no GPU, {facts['processor']}"


def verdict(
    out: Path, facts: dict[str, Any], parts: Sequence[str], seconds: float, *, brief: bool
) -> tuple[str, int]:
    """The last line, and the exit status: 0 if nothing failed and something passed in every part that ran."""
    ran = [part for part in parts if results_of(out / f"{part}.json")]
    outcomes = Counter(f["outcome"] for part in ran for f in results_of(out / f"{part}.json").values())
    good = not outcomes[FAILED] and outcomes[PASSED] > 0
    missing = [part for part in parts if part not in ran]
    counts = ", ".join(f"{outcomes[kind]} {kind}" for kind in (PASSED, SKIPPED, FAILED))
    line = (
        f"{'PASSED' if good else 'FAILED'}: {counts}, in {seconds:.0f} s, on {where(facts)}, torch "
        f"{facts['torch']}" + (f"; not run: {', '.join(missing)}" if missing else "")
    )
    return line + (" (the small form: no statement about GPUs)" if brief else ""), 0 if good else 1


def page(out: Path, facts: dict[str, Any], parts: Sequence[str], *, brief: bool) -> str:
    """Hardware, then each part: its counts, its tables, what was skipped or failed."""
    title = f"# {where(facts)}" + (", small form" if brief else "")
    lines = [title, "", "Made by `bash launch/gpu.sh`.", "", *(f"* {k}: {v}" for k, v in facts.items())]
    for part in parts:
        results = results_of(out / f"{part}.json")
        if not results:
            continue
        lines += ["", f"## {part}: {counted(out / f'{part}.json')}", ""]
        lines += TABLES.get(part, _errors)(results)
        for name, found in results.items():
            if found["outcome"] != PASSED:
                lines.append(f"* {found['outcome']}: {name}. {' '.join(found['reason'].split())[:600]}")
    return "\n".join(lines) + "\n"


def _errors(results: dict[str, Found]) -> list[str]:
    errors = {name: found["error"] for name, found in results.items() if found.get("error") is not None}
    if not errors:
        return []
    worst = max(errors, key=lambda name: errors[name])
    return [f"Largest relative error: {errors[worst]:.1e} ({worst}).", ""]


def _texts(results: dict[str, Found]) -> list[str]:
    return [line for found in results.values() for line in ("```", found.get("text", "").strip(), "```", "")]


def _tables(results: dict[str, Found]) -> list[str]:
    return [line for found in results.values() for line in (found.get("text", "").replace("## ", "### "), "")]


def _waits(results: dict[str, Found]) -> list[str]:
    """One row for each number of waits."""
    rows = ["| waits (on a CPU: reads) of a step | which |", "|---:|---|"]
    by_number: dict[float, list[str]] = {}
    for name, found in results.items():
        if found["outcome"] == PASSED:
            by_number.setdefault(found.get("waits", found.get("reads")), []).append(name)
    return [*rows, *(f"| {n:g} | {'; '.join(by_number[n])} |" for n in sorted(by_number)), ""]


def _models(results: dict[str, Found]) -> list[str]:
    lines: list[str] = []
    for size, found in results.items():
        if found["outcome"] != PASSED:
            continue
        lines += [f"### {size}: {found['parameters'] / 1e6:.1f} million parameters", ""]
        lines += [
            "| variant | ms | time | peak MB | operators | reads | collectives |",
            "|---|" + "---:|" * 6,
        ]
        for name, row in found["variants"].items():
            if row["outcome"] == SKIPPED:
                lines.append(f"| {name} | {row['reason']} | | | | | |")
                continue
            ratio = f"{row['ratio']:.3f}"
            if row["ratio_error"] is not None:
                ratio += f" ± {row['ratio_error']:.3f}"
            cells = (row["ms"], ratio, row["memory_mb"], row["operators"], row["reads"], row["collectives"])
            lines.append(f"| {name} | {' | '.join(map(str, cells))} |")
        lines.append("")
    return lines


def _clients(results: dict[str, Found]) -> list[str]:
    rows = ["| client | parameters differ from its own by | a resumed run is the same | MB |"]
    rows.append("|---|---:|---|---:|")
    for client, found in results.items():
        if found["outcome"] == PASSED:
            rows.append(f"| {client} | {found['error']:.1e} | {found['resumed']} | {found['gpu_mb']} |")
    return [*rows, ""]


TABLES = {"doctor": _texts, "overhead": _tables, "syncs": _waits, "models": _models, "clients": _clients}
