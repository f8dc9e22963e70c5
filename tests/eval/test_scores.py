from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from mmfuse.eval import Prediction, Score, exact_match, majority_answers, per_digit, score


def say(family, answer, prediction, key="k"):
    return Prediction(key, family, f"{family}?", answer, prediction, 0)


@pytest.mark.parametrize(("right", "n"), [(1, 1), (0, 1), (0, 10), (5, 10), (1961, 2100), (2100, 2100)])
def test_wilson_interval_is_that_of_scipy(right, n):
    expected = binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert Score(n, right).interval == pytest.approx((expected.low, expected.high), abs=1e-12)


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))))
def test_the_interval_holds_the_accuracy_and_stays_in_range(counts):
    found = Score(*counts)
    low, high = found.interval
    assert 0.0 <= low <= found.accuracy <= high <= 1.0
    mirrored = Score(found.n, found.n - found.right).interval
    assert (1 - high, 1 - low) == pytest.approx(mirrored, abs=1e-12)


@pytest.mark.parametrize(("n", "right"), [(0, 0), (3, 4), (3, -1)])
def test_an_impossible_score_is_refused(n, right):
    with pytest.raises(ValueError, match=f"got {right} of {n}"):
        Score(n, right)


def test_nothing_to_score_is_an_error():
    for function in (exact_match, score):
        with pytest.raises(ValueError, match="there are no predictions to score"):
            function([])
    with pytest.raises(ValueError, match="there are no digits to score"):
        per_digit([say("exists", "yes", "no")])


@pytest.mark.parametrize(
    ("answer", "prediction", "expected"),
    [
        ("35 71", "35 71", 1.0),
        ("35 71", "3571", 1.0),
        ("35 71", "35 17", 0.5),
        ("35 71", "35", 0.5),
        ("35 71", "", 0.0),
        ("35 71", "35 71 99 99", 0.5),
        ("35 71", "no", 0.0),
    ],
)
def test_digits_are_compared_place_by_place(answer, prediction, expected):
    assert per_digit([say("read", answer, prediction)]) == expected


def test_majority_is_the_most_frequent_answer_of_each_family():
    held = [say("a", "1", ""), say("a", "2", ""), say("a", "2", ""), say("b", "Yes", ""), say("b", "no", "")]
    assert majority_answers(held) == {"a": "2", "b": "no"}


def test_score_of_two_families():
    seen = [
        say("read", "12 34", "12 34"),
        say("read", "56 78", "56 79"),
        say("count", "0", "0"),
        say("count", "0", "1"),
    ]
    blind = [say("read", "12 34", "1"), say("read", "56 78", "2"), say("count", "0", "0"), say("count", "0", "0")]
    found = score(seen, blind)
    assert (found["n"], found["exact_match"], found["blind_exact_match"]) == (4, 0.5, 0.5)
    assert found["majority_exact_match"] == 0.75
    assert found["per_digit"] == 7 / 8
    assert found["interval"] == list(Score(4, 2).interval)
    assert list(found["by_family"]) == ["read", "count"]
    assert found["by_family"]["count"] == {
        "n": 2,
        "share": 0.5,
        "exact_match": 0.5,
        "interval": list(Score(2, 1).interval),
        "blind_exact_match": 1.0,
        "majority_answer": "0",
        "majority_exact_match": 1.0,
        "per_digit": None,
    }
    assert found["by_family"]["read"]["per_digit"] == 7 / 8


def test_score_without_blind_predictions_and_digits():
    found = score([say("exists", "yes", "YES")])
    assert found["blind_exact_match"] is None and found["per_digit"] is None
    assert found["by_family"]["exists"]["blind_exact_match"] is None
    assert found["exact_match"] == 1.0 and found["unfinished"] == 0


def test_unfinished_answers_are_counted():
    cut = Prediction("k", "f", "q", "1", "1 1 1", 0, finished=False)
    assert score([cut, say("f", "1", "1")])["unfinished"] == 1


def test_majority_answers_of_the_training_data_may_be_given():
    seen = [say("exists", "yes", "yes"), say("exists", "yes", "no"), say("exists", "no", "no")]
    assert score(seen, majority={"exists": "no"})["majority_exact_match"] == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="unknown family 'exists': did you mean 'exist'"):
        score(seen, majority={"exist": "no"})


def test_blind_predictions_must_be_of_the_same_questions():
    seen = [say("a", "1", "1", "first"), say("a", "1", "1", "second")]
    with pytest.raises(ValueError, match="1 blind predictions for 2 questions"):
        score(seen, seen[:1])
    with pytest.raises(ValueError, match="second stands where first should"):
        score(seen, seen[::-1])


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xyz"), st.sampled_from("xyz")), min_size=1))
def test_families_add_up_to_the_whole(rows):
    seen = [say(*row) for row in rows]
    found = score(seen)
    table = found["by_family"].values()
    assert sum(row["n"] for row in table) == found["n"] == len(rows)
    assert sum(row["share"] for row in table) == pytest.approx(1)
    for name in ("exact_match", "majority_exact_match"):
        assert sum(row["share"] * row[name] for row in table) == pytest.approx(found[name])
