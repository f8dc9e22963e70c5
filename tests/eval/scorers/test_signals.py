"""Retrieval and events."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmfuse.errors import DataError
from mmfuse.eval.scorers import score_rows
from mmfuse.eval.scorers.signals import among_first


@given(st.integers(2, 7).flatmap(lambda size: st.tuples(st.just(size), st.integers(0, size - 1), st.integers(2, size))))
def test_expected_retrieval_is_the_mean_over_all_draws(case: tuple[int, int, int]) -> None:
    size, better, ways = case
    draws = list(itertools.combinations(range(size - 1), ways - 1))
    for first in range(1, ways + 1):
        hits = sum(sum(wrong < better for wrong in draw) < first for draw in draws)
        assert among_first(better, size, ways, first) == pytest.approx(hits / len(draws))


def test_retrieval_by_hand() -> None:
    rows = [
        {"id": 1, "prediction": [0.9, 0.1, 0.2, 0.3], "target": 0},
        {"id": 2, "prediction": [0.5, 0.5, 0.1, 0.9], "target": 1},
    ]
    values = score_rows("eeg_retrieval", rows).values
    assert (values["top1"], values["top3"], values["chance_top1"]) == (0.5, 1.0, 0.25)
    # Of three wrong candidates two are better (one is equal and earlier), so one draw of three wins.
    assert values["2way_top1"] == pytest.approx((1 + 1 / 3) / 2)
    assert values["4way_top1"] == values["top1"]
    assert "10way_top1" not in values


@pytest.mark.parametrize(
    ("prediction", "target", "problem"),
    [([0.1], 0, "two candidates or more"), ([0.1, math.nan], 0, "finite"), ([0.1, 0.2], 2, "candidate's number")],
)
def test_mistakes_in_similarities_are_named(prediction: list[float], target: int, problem: str) -> None:
    with pytest.raises(DataError, match=f"row 1: .*{problem}"):
        score_rows("eeg_retrieval", [{"id": 1, "prediction": prediction, "target": target}])


def recording(wanted: list[Any], given: list[Any], duration: float = 3600) -> dict[str, float]:
    return score_rows("events", [{"id": 1, "prediction": given, "target": wanted, "duration": duration}]).values


@pytest.mark.parametrize(
    ("wanted", "given", "sensitivity", "precision"),
    [
        ([[100, 200]], [[150, 160]], 1.0, 1.0),
        ([[100, 200]], [[60, 71]], 1.0, 1.0),
        ([[100, 200]], [[50, 70]], 0.0, 0.0),
        ([[100, 200]], [[259, 300]], 1.0, 1.0),
        ([[100, 200]], [[260, 300]], 0.0, 0.0),
        ([[100, 110], [180, 190]], [[185, 188]], 1.0, 1.0),
        ([[100, 110], [200, 210]], [[100, 101], [1000, 1001]], 0.5, 0.5),
        ([[0, 600]], [[10, 20]], 0.5, 1.0),
        ([], [[10, 20]], math.nan, 0.0),
        ([[10, 20]], [], 0.0, math.nan),
        ([], [], math.nan, math.nan),
    ],
)
def test_events_by_hand(wanted: list[Any], given: list[Any], sensitivity: float, precision: float) -> None:
    values = recording(wanted, given)
    assert [values["sensitivity"], values["precision"]] == pytest.approx([sensitivity, precision], nan_ok=True)
    assert math.isnan(values["f1"]) == (not wanted and not given)


def test_false_answers_per_day_and_samples() -> None:
    values = recording([[0, 10]], [[5, 10], [1000, 1020]], 43_200)
    assert values["false_per_day"] == 2.0
    assert (values["sample_sensitivity"], values["sample_precision"]) == (0.5, 0.2)


@given(
    st.lists(st.integers(0, 3599), max_size=12, unique=True), st.lists(st.integers(0, 3599), max_size=12, unique=True)
)
def test_events_are_total_and_bounded(first: list[int], second: list[int]) -> None:
    wanted, given = ([list(pair) for pair in zip(*[iter(sorted(own))] * 2, strict=False)] for own in (first, second))
    values = recording(wanted, given)
    assert all(math.isnan(value) or 0 <= value <= 1 for name, value in values.items() if name != "false_per_day")
    again = recording(wanted, wanted)
    if wanted:
        assert (again["sensitivity"], again["precision"], again["f1"]) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"prediction": [[5, 3]]}, "must not overlap or leave"),
        ({"prediction": [[0, 10], [5, 20]]}, "must not overlap or leave"),
        ({"prediction": [[50, 61]]}, "must not overlap or leave"),
        ({"prediction": [5]}, r"'prediction' must be a list of \[start, end\]"),
        ({"duration": 0}, "'duration' must be at least 1 second"),
    ],
)
def test_mistakes_in_events_are_named(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError, match=f"row 1: .*{problem}"):
        score_rows("events", [{"id": 1, "prediction": [], "target": [], "duration": 60, **fields}])
