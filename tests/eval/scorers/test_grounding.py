"""Boxes: conventions, and what a plain count of pixels says of an overlap."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmfuse.errors import DataError
from mmfuse.eval.scorers import score_rows
from mmfuse.eval.scorers.grounding import iou

boxes = st.tuples(*[st.integers(0, 12)] * 4)


@given(boxes, boxes)
def test_overlap_is_the_share_of_cells(first: Any, second: Any) -> None:
    def cells(box: Any) -> set[tuple[int, int]]:
        return {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}

    ordered = [(min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)) for x1, y1, x2, y2 in (first, second)]
    a, b = map(cells, ordered)
    expected = len(a & b) / len(a | b) if a | b else math.nan
    assert iou(*ordered) == pytest.approx(expected, nan_ok=True)


def row(prediction: str, **fields: Any) -> dict[str, Any]:
    return {"id": 1, "prediction": prediction, "target": [100, 50, 200, 100], "width": 400, "height": 200, **fields}


@pytest.mark.parametrize(
    ("prediction", "protocol", "fields", "right"),
    [
        ("<box>(250,250),(500,500)</box>", "qwen_vl", {}, 1),
        ("(250, 250),(500, 500)", "qwen_vl", {}, 1),
        ("(250,250),(500)", "qwen_vl", {}, 0),
        ("[[250, 250, 500, 500]]", "internvl", {}, 1),
        ("[0.25,0.25,0.5,0.5]", "internvl", {}, 1),
        ("[0.25, 0.25, 0.5, 0.5]", "lmms", {}, 1),
        ("[250, 250, 500, 500]", "lmms", {}, 0),
        ("It is at 100, 50 to 200, 100.", "convention", {"convention": "pixels"}, 1),
        ("[250, 250, 500, 500]", "convention", {"convention": "0-1000"}, 1),
        ("[0.25, 0.25, 0.5, 0.5]", "convention", {"convention": "unit"}, 1),
        ("[500, 500, 250, 250]", "convention", {"convention": "0-1000"}, 0),
        ("[100, 50, 100, 50]", "convention", {"convention": "pixels"}, 0),
        ("[[100, 50, 200, 100], [0, 0, 1, 1]]", "convention", {"convention": "pixels"}, 1),
        ("no box", "qwen_vl", {}, 0),
    ],
)
def test_conventions(prediction: str, protocol: str, fields: dict[str, str], right: int) -> None:
    result = score_rows("refcoco", [row(prediction, **fields)], protocol)
    assert result.values["accuracy"] == right
    assert (result.samples[0].parsed is None) == ("no box" in prediction or prediction == "(250,250),(500)")


def test_an_overlap_of_exactly_one_half_is_right() -> None:
    some = row("[100, 50, 150, 100]", convention="pixels")
    assert score_rows("refcoco", [some]).values == {"accuracy": 1.0, "mean_iou": 0.5, "unparsed_rate": 0.0}


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({}, "'convention' must be one of pixels"),
        ({"convention": "pixels", "width": 0}, "'width' must be the image's size"),
        ({"convention": "pixels", "target": [100, 50, 60, 20]}, "'target' must be corners with x1 < x2"),
        ({"convention": "pixels", "target": "x"}, r"'target' must be \[x1"),
    ],
)
def test_mistakes_are_named(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError, match=f"row 1: {problem}"):
        score_rows("refcoco", [row("[1, 2, 3, 4]", **fields)])
