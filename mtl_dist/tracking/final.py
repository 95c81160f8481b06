"""The final weights and cosines of a run, as tables and as a picture."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from mtl_dist.tracking.keys import keys_of
from mtl_dist.tracking.rows import Row

Matrix = list[list[float | None]]
_CELL = 26  # pixels


def final_weights(row: Row, tasks: Sequence[str]) -> list[dict[str, Any]]:
    """One record per task: weight, loss, gradient norm, contribution. A missing value is None."""
    keys = keys_of(tuple(tasks))
    columns = zip(tasks, keys.weight, keys.loss, keys.grad_norm, keys.contribution, strict=True)
    return [
        {
            "task": task,
            "weight": row.get(weight),
            "loss": row.get(loss),
            "grad_norm": row.get(norm),
            "contribution": row.get(share),
        }
        for task, weight, loss, norm, share in columns
    ]


def cosine_matrix(row: Row, tasks: Sequence[str]) -> Matrix | None:
    """`[n, n]` cosines. An entry without a value is None. The result is None if no cosine was measured."""
    n, found = len(tasks), iter(keys_of(tuple(tasks)).cosine)
    matrix: Matrix = [[1.0 if i == j else None for j in range(n)] for i in range(n)]
    for i in range(n):
        for j in range(i + 1, n):
            matrix[i][j] = matrix[j][i] = row.get(next(found))
    measured = any(value is not None for i, line in enumerate(matrix) for value in line[i + 1 :])
    return matrix if measured else None


def cosine_svg(tasks: Sequence[str], matrix: Matrix) -> str:
    """A heatmap: red for conflicts, blue for agreement. Hovering over a cell shows its number."""
    left = 12 + 7 * max(map(len, tasks))
    side = left + _CELL * len(tasks) + 4
    marks = []
    for i, task in enumerate(map(html.escape, tasks)):
        middle = left + _CELL * i + 17
        marks.append(f'<text x="{left - 6}" y="{middle}" text-anchor="end">{task}</text>')
        marks.append(f'<text transform="translate({middle},{left - 6}) rotate(-90)">{task}</text>')
    for i, line in enumerate(matrix):
        for j, value in enumerate(line):
            place = f'x="{left + _CELL * j}" y="{left + _CELL * i}" width="{_CELL - 1}" height="{_CELL - 1}"'
            shown = "no value" if value is None else f"{value:.3f}"
            title = f"{html.escape(tasks[i])}, {html.escape(tasks[j])}: {shown}"
            marks.append(f'<rect {place} fill="{_colour(value)}"><title>{title}</title></rect>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{side}" height="{side}" '
        'style="background:#fff" font-family="sans-serif" font-size="12">' + "".join(marks) + "</svg>"
    )


def _colour(cosine: float | None) -> str:
    if cosine is None:
        return "#ddd"
    fade = round(255 * (1 - min(abs(cosine), 1.0)))
    return f"rgb(255,{fade},{fade})" if cosine < 0 else f"rgb({fade},{fade},255)"
