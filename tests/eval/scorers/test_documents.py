"""ANLS and relaxed accuracy."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmfuse.eval.scorers import score_rows
from mmfuse.eval.text import edit_distance


def plain_distance(first: str, second: str) -> int:
    """The table of Wagner and Fischer, row by row."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        above, row = row, [i]
        for j, b in enumerate(second, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
    return row[-1]


@given(st.text("ab c", max_size=12), st.text("ab c", max_size=12))
def test_edit_distance(first: str, second: str) -> None:
    assert edit_distance(first, second) == plain_distance(first, second)


def test_edit_distance_of_long_texts() -> None:
    first, second = "the quick brown fox " * 8, "a quick brown ox  " * 8
    assert edit_distance(first, second) == plain_distance(first, second) == edit_distance(second, first)


@pytest.mark.parametrize(
    ("prediction", "target", "official", "paper"),
    [
        ("ab", "ac", 0.5, 0.0),
        ("abc", "abcdef", 0.5, 0.0),
        ("hello    world", "hello world", 1.0, 1.0),
        ("", "", 1.0, 1.0),
        ("", "a", 0.0, 0.0),
        ("stra e", "straße", 1 - 1 / 7, 1 - 1 / 7),
        ("Ye ", "Yes ", 0.75, 2 / 3),
    ],
)
def test_anls(one, prediction: str, target: str, official: float, paper: float) -> None:
    assert one("docvqa", "official", prediction, [target]).score == pytest.approx(official)
    assert one("infovqa", "paper", prediction, target).score == pytest.approx(paper)


@pytest.mark.parametrize(
    ("prediction", "target", "score"),
    [
        ("5.25", "5", 1),
        ("5.26", "5", 0),
        ("5%", "0.05", 1),
        ("0", "0.0", 0),
        ("Yes", "yes", 1),
        (" 5", "5", 1),
        (" yes", "yes", 0),
        ("1,000", "1000", 0),
    ],
)
def test_relaxed_accuracy(one, prediction: str, target: str, score: int) -> None:
    assert one("chartqa", "official", prediction, target).score == score


def test_vlmevalkit_strips_the_prediction(one) -> None:
    assert one("chartqa", "vlmevalkit", " yes", "yes").score == 1


def test_splits_are_reported() -> None:
    rows = [
        {"id": 1, "prediction": "1", "target": "1", "split": "human"},
        {"id": 2, "prediction": "2", "target": "1", "split": "augmented"},
    ]
    values = score_rows("chartqa", rows).values
    assert values == {"relaxed_accuracy": 0.5, "relaxed_accuracy/human": 1.0, "relaxed_accuracy/augmented": 0.0}
