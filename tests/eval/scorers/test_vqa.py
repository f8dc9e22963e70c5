"""VQA accuracy and GQA: the traps in which protocols differ."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmfuse.errors import DataError
from mmfuse.eval.scorers import score_rows
from mmfuse.eval.scorers.vqa import person_accuracy
from mmfuse.eval.text import evalai, vqa_official


@pytest.mark.parametrize(
    ("prediction", "answer", "official", "textvqa", "lmms"),
    [
        ("Yes", "yes", 0, 1, 1),
        ("yes.", "yes", 0, 1, 1),
        ("two", "2", 0, 1, 1),
        ("the dog", "dog", 0, 1, 1),
        ("1,,000", "1000", 0, 1, 1),
        ("man's", "man 's", 0, 1, 0),
        ("", "", 1, 1, 1),
        ("café", "cafe", 0, 0, 0),
    ],
)
def test_ten_equal_answers(one, prediction, answer, official, textvqa, lmms) -> None:
    answers = [answer] * 10
    assert one("vqav2", "official", prediction, answers).score == official
    assert one("textvqa", "official", prediction, answers).score == textvqa
    assert one("vqav2", "lmms", prediction, answers).score == lmms


@pytest.mark.parametrize(("matches", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)])
def test_share_of_people(one, matches: int, score: float) -> None:
    answers = ["dog"] * matches + [f"other {number}" for number in range(10 - matches)]
    assert one("vqav2", "official", "The Dog.", answers).score == pytest.approx(score)


@given(st.integers(1, 12), st.data())
def test_closed_form_is_the_mean_over_leave_one_out_subsets(people: int, data: st.DataObject) -> None:
    matches = data.draw(st.integers(0, people))
    votes = [True] * matches + [False] * (people - matches)
    subsets = [min(1.0, (sum(votes) - vote) / 3) for vote in votes]
    assert person_accuracy(matches, people) == pytest.approx(sum(subsets) / people)


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("ten dogs", "10 dogs"),
        ("eleven", "eleven"),
        ("none", "0"),
        ("An apple, a pear", "apple pear"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),
        ("couldn'tve", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("Id've", "id've"),
        ("t-shirt", "t shirt"),
        ("t- shirt", "t shirt"),
        ("3.5", "3.5"),
        ("3.", "3"),
        (". " * 33, "."),
    ],
)
def test_official_form(text: str, form: str) -> None:
    assert vqa_official(text) == form


def test_evalai_splits_the_genitive() -> None:
    assert evalai("Man's, hat?") == "man 's hat"


def test_objects_of_the_annotation_file_and_categories() -> None:
    answers = [{"answer": "yes", "answer_id": number} for number in range(10)]
    rows = [
        {"id": 1, "prediction": "yes", "target": answers, "answer_type": "yes/no"},
        {"id": 2, "prediction": "no", "target": ["3"] * 10, "answer_type": "number"},
    ]
    values = score_rows("vqav2", rows).values
    assert values == {"accuracy": 0.5, "accuracy/yes/no": 1.0, "accuracy/number": 0.0}


def test_other_than_ten_answers_are_named() -> None:
    result = score_rows("vqav2", [{"id": 1, "prediction": "a", "target": ["a", "b"]}])
    assert "ten answers" in result.warnings[0]
    with pytest.raises(DataError, match="row 1: 'target' must be text"):
        score_rows("vqav2", [{"id": 1, "prediction": "a", "target": []}])


@pytest.mark.parametrize(
    ("prediction", "target", "official", "lmms"),
    [("Yes.", "yes", 1, 1), ("yes...", "yes", 1, 1), ("tshirt", "t-shirt", 0, 1), (" yes", "yes", 0, 0)],
)
def test_gqa(one, prediction: str, target: str, official: int, lmms: int) -> None:
    assert one("gqa", "official", prediction, target).score == official
    assert one("gqa", "lmms", prediction, target).score == lmms


def test_gqa_types() -> None:
    rows = [
        {"id": 1, "prediction": "red", "target": "red", "types": {"structural": "query", "semantic": "attr"}},
        {"id": 2, "prediction": "no", "target": "yes", "types": {"structural": "verify", "semantic": "obj"}},
    ]
    values = score_rows("gqa", rows).values
    assert (values["accuracy"], values["open"], values["binary"], values["accuracy/attr"]) == (0.5, 1.0, 0.0, 1.0)
