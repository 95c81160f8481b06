"""Groups of tasks in the report: what the recorded cosines say, in words and in one picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

import numpy as np

from mtl_dist.grouping import Affinities, Agreement, Groups, find_groups
from mtl_dist.grouping.map_equation import Array
from mtl_dist.tracking.report.panels import COSINE, LOSS, NORM, cosine_keys, tasks_of
from mtl_dist.tracking.report.read import RunData

MOST_DRAWN = 40  # tasks; a larger picture would not be read, and would double the page
MOST_AT_ONCE = 1 << 20  # cosines in memory, 8 MB
CELL = 22  # size of a cell, pixels
LETTER = 7.2  # width of a letter, pixels


def affinities_of(runs: Sequence[RunData]) -> Affinities:
    """The mean over the steps of all runs.

    Raises:
        ValueError: no run has values of tasks.
    """
    tasks = tasks_of(runs)
    if not tasks:
        raise ValueError("no run has values of tasks: a run has them from its first step on")
    return Affinities.over(tasks, (part for run in runs for part in _parts(run, tasks)))


def _parts(run: RunData, tasks: Sequence[str]) -> Iterator[tuple[Array, Array, Array]]:
    """Cosines, norms and losses of a run, some steps at a time."""
    n, keys = len(tasks), cosine_keys(run, tasks)
    missing = np.full(len(run.steps), np.nan)
    size = max(1, MOST_AT_ONCE // n**2)
    for start in range(0, len(run.steps), size):
        here = slice(start, start + size)
        cosines = np.full((len(run.steps[here]), n, n), np.nan)
        for (i, j), key in keys.items():
            cosines[:, i, j] = cosines[:, j, i] = run.columns[key][here]
        norms, losses = (
            np.stack([run.columns.get(prefix + task, missing)[here] for task in tasks], axis=1)
            for prefix in (NORM, LOSS)
        )
        yield cosines, norms, losses


def groups_section(runs: Sequence[RunData]) -> str:
    """The section of the page; empty for less than three tasks, or if no cosine was recorded."""
    tasks = tasks_of(runs)
    if len(tasks) < 3 or not any(key.startswith(COSINE) for run in runs for key in run.columns):
        return ""
    found = affinities_of(runs)
    if not found.steps:
        return ""
    groups, bits = find_groups(found.links())
    names = "".join(f"<li>{escape(', '.join(found.tasks[task] for task in group))}</li>" for group in groups)
    inside, between = (found.agreement(groups, inside=inside) for inside in (True, False))
    picture = (
        _picture(found, groups)
        if len(tasks) <= MOST_DRAWN
        else f"<p>No picture: there are more than {MOST_DRAWN} tasks.</p>"
    )
    pooled = f" of all {len(runs)} runs" if len(runs) > 1 else ""
    return (
        f'<section id="groups">\n<h2>Groups of tasks</h2>\n'
        f"<p>Groups with the least codelength of the map equation, {bits:.4g} bits; the links are the mean "
        f"cosines{pooled} above 0. {_words('Inside groups', inside)} {_words('Between groups', between)} "
        "A negative cosine is no link: groups show who helps whom, colours who is in conflict.</p>"
        f'\n<ol class="members">{names}</ol>\n{picture}\n</section>'
    )


def _words(where: str, pairs: Agreement) -> str:
    if not pairs.pairs:
        return f"{where} there is no pair."
    return f"{where} the mean cosine is {pairs.cosine:.3f}, negative in {pairs.conflict:.0%} of the steps."


def _picture(found: Affinities, groups: Groups) -> str:
    """The mean cosines as a matrix, the tasks in the order of the groups, a frame around each group."""
    order = [task for group in groups for task in group]
    cosines = found.cosines[np.ix_(order, order)]
    off = np.abs(cosines[~np.eye(len(order), dtype=bool)])
    largest = float(np.nanmax(off, initial=0.0)) or 1.0
    left = LETTER * max(len(found.tasks[task]) for task in order) + 8
    width, height = left + CELL * len(order) + 2, CELL * len(order) + 2
    cells = [
        f'<rect x="{left + CELL * j:g}" y="{1 + CELL * i}" width="{CELL}" height="{CELL}" '
        f"{_colour(cosines[i, j], largest)}><title>{escape(found.tasks[a])}, "
        f"{escape(found.tasks[b])}: {cosines[i, j]:.3f}</title></rect>"
        for i, a in enumerate(order)
        for j, b in enumerate(order)
        if i != j and np.isfinite(cosines[i, j])
    ]
    names = [
        f'<text x="{left - 6:g}" y="{1 + CELL * i + 15}" text-anchor="end">{escape(found.tasks[task])}</text>'
        for i, task in enumerate(order)
    ]
    frames, start = [], 0
    for group in groups:
        side = CELL * len(group)
        frames.append(
            f'<rect x="{left + CELL * start:g}" y="{1 + CELL * start}" width="{side}" height="{side}" '
            'fill="none" stroke="currentColor" stroke-width="2"/>'
        )
        start += len(group)
    return (
        f'<div class="scroll"><svg width="{width:g}" height="{height}" role="img" '
        f'aria-label="Mean cosines of the tasks, in groups" font-size="12" fill="currentColor">'
        f"{''.join(cells)}{''.join(names)}{''.join(frames)}</svg></div>\n"
        f"<p>Blue: mean cosine up to {largest:.2g}. Orange: down to −{largest:.2g}. Frames: groups.</p>"
    )


def _colour(cosine: float, largest: float) -> str:
    """Orange for conflict, blue for agreement, as in the matrices above; the ground shows through near 0."""
    share = min(1.0, abs(cosine) / largest) ** 0.8
    return f'fill="{"#cd5500" if cosine < 0 else "#0069af"}" fill-opacity="{share:.2f}"'
