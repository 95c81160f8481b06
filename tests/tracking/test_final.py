"""Closing tables and the heatmap."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from mtl_dist.tracking.final import cosine_matrix, cosine_svg, final_weights

TASKS = ("a", "b", "c")
ROW = {
    "mtl/weight/a": 0.5,
    "mtl/weight/b": 0.5,
    "mtl/weight/c": 0.0,
    "mtl/loss/a": 2.0,
    "mtl/cosine/a__b": -0.5,
}


def test_records_have_none_for_what_does_not_exist():
    first, _, third = final_weights(ROW, TASKS)
    assert first == {"task": "a", "weight": 0.5, "loss": 2.0, "grad_norm": None, "contribution": None}
    assert third["weight"] == 0
    assert third["loss"] is None


def test_cosines_as_a_symmetric_matrix():
    assert cosine_matrix(ROW, TASKS) == [[1, -0.5, None], [-0.5, 1, None], [None, None, 1]]
    assert cosine_matrix({"mtl/weight/a": 1.0}, TASKS) is None
    assert cosine_matrix(ROW, ("a",)) is None


@pytest.mark.parametrize("n", [3, 50])
def test_the_heatmap_is_an_image_with_a_cell_a_pair(n):
    tasks = [f"task_{i}" for i in range(n)]
    matrix = [[1.0 if i == j else 0.1 * (i - j) / n for j in range(n)] for i in range(n)]
    root = ET.fromstring(cosine_svg(tasks, matrix))
    cells = root.findall("{http://www.w3.org/2000/svg}rect")
    assert len(cells) == n * n
    assert all(len(cell) == 1 for cell in cells)
    side = float(root.get("width"))
    assert max(float(cell.get("x")) + float(cell.get("width")) for cell in cells) <= side


def test_conflict_is_red_agreement_blue_and_names_are_escaped():
    svg = cosine_svg(["<b>", "x"], [[1.0, -1.0], [None, 1.0]])
    assert "<b>" not in svg
    root = ET.fromstring(svg)
    fills = [cell.get("fill") for cell in root.findall("{http://www.w3.org/2000/svg}rect")]
    assert fills == ["rgb(0,0,255)", "rgb(255,0,0)", "#ddd", "rgb(0,0,255)"]
