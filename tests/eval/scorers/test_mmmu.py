"""MMMU: open answers, guesses, domains."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmfuse.errors import DataError
from mmfuse.eval.scorers import score_rows
from mmfuse.eval.text.numbers import mmmu_open

ABCD = ["0", "700", "1400", "3418"]


@pytest.mark.parametrize(
    ("answer", "target", "right"),
    [
        ("3", "3", True),
        ("-3", "3", False),
        ("0.5", "1/2", False),
        ("12 and 15", "15", True),
        ("so x = 4.004", "4", True),
        ("x = 4\nThat is it", "4", False),
        ("It is the Dog.", "dog", True),
        ("1,234", "1234", True),
        ("1e3 is it", "it", True),
        ("The result is b", "b", True),
        ("The result is bob", "b", False),
        ("", "", True),
    ],
)
def test_open_answers(answer: str, target: str, right: bool) -> None:
    assert mmmu_open(answer, [target]) is right
    assert mmmu_open(answer, ["nothing of the kind", target]) is right


@given(st.text(), st.lists(st.text(), min_size=1))
def test_open_answers_are_total(answer: str, targets: list[str]) -> None:
    assert mmmu_open(answer, targets) in (True, False)


def rows(predictions: list[str]) -> list[dict[str, object]]:
    return [
        {"id": f"validation_Math_{i}", "prediction": given, "target": "A", "options": ABCD}
        for i, given in enumerate(predictions)
    ]


def test_official_guesses_are_those_of_the_seed_in_order() -> None:
    random.seed(42)
    expected = [float(random.choice("ABCD") == "A") for _ in range(20)]
    result = score_rows("mmmu", rows(["it is unclear"] * 20))
    assert [sample.score for sample in result.samples] == expected
    assert {sample.rule for sample in result.samples} == {"guess"}
    assert result.values["unparsed_rate"] == 1.0


def test_scoring_leaves_the_global_generator_alone() -> None:
    state = random.getstate()
    score_rows("mmmu", rows(["unclear"]))
    assert random.getstate() == state


@pytest.mark.parametrize(("protocol", "score"), [("strict", 0.0), ("lmms", 0.25), ("vlmevalkit", 0.0)])
def test_what_cannot_be_read(protocol: str, score: float) -> None:
    sample = score_rows("mmmu", rows(["unclear"]), protocol).samples[0]
    assert (sample.score, sample.parsed) == (score, None)


def test_lmms_reads_more_letters(one) -> None:
    assert one("mmmu", "strict", "D. no", "D", options=ABCD).parsed is None
    assert one("mmmu", "lmms", "D. no", "D", options=ABCD).parsed == "D"


@pytest.mark.parametrize(("protocol", "score"), [("official", 1.0), ("lmms", 0.0), ("vlmevalkit", 1.0)])
def test_open_questions_by_protocol(one, protocol: str, score: float) -> None:
    assert one("mmmu", protocol, "dog", "dog", question_type="open").score == score


def test_domains_and_subjects_come_from_ids_and_options_from_their_text() -> None:
    some = [
        {"id": "validation_Math_1", "prediction": "A", "target": "A", "options": "['1', '2']"},
        {"id": "validation_Art_Theory_2", "prediction": "A", "target": "B", "options": "['1', '2']"},
    ]
    values = score_rows("mmmu", some).values
    assert (values["accuracy/Science"], values["accuracy/Art and Design"], values["accuracy/Art_Theory"]) == (1, 0, 0)
    with pytest.raises(DataError, match="'options' is no list"):
        score_rows("mmmu", [{**some[0], "options": "__import__('os')"}])
