"""Yes or no: POPE, MME, HallusionBench and AMBER."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmfuse.errors import DataError
from mmfuse.eval.scorers import score_rows
from mmfuse.eval.text import yesno as read

READERS = (
    read.pope_yes_no,
    read.exact_yes_no,
    read.vlmevalkit_yes_no,
    read.mme_yes_no,
    read.lmms_mme_yes_no,
    read.amber_yes_no,
)


@pytest.mark.parametrize(
    ("answer", "pope", "lmms", "vlmevalkit", "mme", "lmms_mme"),
    [
        ("Yes", "yes", "yes", "yes", "yes", "yes"),
        ("Yes.", "yes", None, "yes", "yes", "yes"),
        ("NO", "yes", "no", "no", "no", "no"),
        ("Nope", "yes", None, None, "no", "no"),
        ("no\nThere is", "yes", None, "no", "no", "no"),
        ('"No"', "yes", None, "no", "no", "no"),
        ("it isn't", "yes", None, None, None, None),
        ("I cannot tell.", "yes", None, None, None, None),
        ("Yes; not sure", "no", None, "yes", "yes", "yes"),
        ("Yes. There is no dog", "yes", None, None, "yes", "yes"),
        ("", "yes", None, None, None, None),
        ("The answer is yes.", "yes", None, "yes", None, None),
        ("noticeable: yes", "yes", None, "yes", "no", "no"),
        ("None", "yes", None, None, "no", "no"),
        ("nobody is there", "yes", None, None, "no", "no"),
        ("Y", "yes", None, None, None, "yes"),
        ("n.", "yes", None, None, None, "no"),
        ("There is", "yes", None, None, None, None),
    ],
)
def test_traps(answer: str, pope: str, lmms: str, vlmevalkit: str, mme: str, lmms_mme: str) -> None:
    found = [reader(answer)[0] for reader in READERS[:5]]
    assert found == [pope, lmms, vlmevalkit, mme, lmms_mme]


@given(st.text() | st.lists(st.sampled_from(["yes", "no", "Yes", "not", ".", ",", " ", "\n"])).map("".join))
def test_readers_are_total(answer: str) -> None:
    for reader in READERS:
        said, rule = reader(answer)
        assert said in ("yes", "no", None)
        assert (said is None) == (rule == "none")


def rows(pairs: str, **fields: Any) -> list[dict[str, Any]]:
    """`"yn nn"`: what was said and what is right, for each row."""
    words = {"y": "yes", "n": "no", "?": "hard to say"}
    return [
        {"id": str(i), "prediction": words[said], "target": words[right], **fields}
        for i, (said, right) in enumerate(pairs.split())
    ]


def test_pope_by_hand() -> None:
    values = score_rows("pope", rows("yy yy yn ny nn")).values
    assert values == {
        "accuracy": 0.6,
        "precision": pytest.approx(2 / 3),
        "recall": pytest.approx(2 / 3),
        "f1": pytest.approx(2 / 3),
        "yes_ratio": 0.6,
        "ambiguous_rate": 0.0,
    }


def test_pope_counts_what_says_neither() -> None:
    some = rows("?y ?n yy nn")
    assert score_rows("pope", some).values["ambiguous_rate"] == 0.5
    lmms, vlmevalkit = score_rows("pope", some, "lmms").values, score_rows("pope", some, "vlmevalkit").values
    assert (lmms["recall"], vlmevalkit["recall"]) == (1.0, 0.5)
    assert lmms["unparsed_rate"] == vlmevalkit["unparsed_rate"] == 0.5


def test_pope_without_a_positive_answer_is_defined_and_named() -> None:
    result = score_rows("pope", rows("ny nn"))
    assert (result.values["precision"], result.values["f1"]) == (0.0, 0.0)
    assert "no answer is yes" in result.warnings[0]


def test_pope_splits_and_their_means() -> None:
    some = [*rows("yy nn", category="random"), *rows("yn nn", category="popular, adversarial")]
    for number, row in enumerate(some):
        row["id"] = number
    values = score_rows("pope", some, "vlmevalkit").values
    assert (values["accuracy/random"], values["accuracy/popular"], values["accuracy/adversarial"]) == (1.0, 0.5, 0.5)
    assert values["accuracy_mean"] == pytest.approx(2 / 3)
    assert values["f1_mean"] == pytest.approx(1 / 3)


@given(st.lists(st.tuples(st.sampled_from("yn?"), st.sampled_from("yn")), min_size=1, max_size=30))
def test_f1_is_the_harmonic_mean(pairs: list[tuple[str, str]]) -> None:
    values = score_rows("pope", rows(" ".join(map("".join, pairs))), "vlmevalkit").values
    precision, recall = values["precision"], values["recall"]
    expected = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    assert values["f1"] == pytest.approx(expected)


def test_labels_are_checked() -> None:
    with pytest.raises(DataError, match="row 7: 'target' must be yes or no, got 'maybe'"):
        score_rows("pope", [{"id": 7, "prediction": "yes", "target": "maybe"}])


def mme_rows() -> list[dict[str, Any]]:
    said = {"count": "yy nn yy yn", "OCR": "yy nn", "code_reasoning": "yy yn", "poems": "ny nn"}
    return [
        {**row, "id": f"{task}{number}", "category": task}
        for task, pairs in said.items()
        for number, row in enumerate(rows(pairs))
    ]


def test_mme_sums_accuracy_and_pairs() -> None:
    result = score_rows("mme", mme_rows())
    values = result.values
    assert (values["score/count"], values["score/OCR"], values["score/code_reasoning"]) == (75 + 50, 200, 50)
    assert (values["perception"], values["cognition"]) == (325, 50)
    assert next(iter(values)) == "perception"
    assert "poems" in result.warnings[0]


def test_mme_pairs_by_image_in_any_order_and_refuses_others() -> None:
    some = [{**row, "image": str(i % 2)} for i, row in enumerate(rows("yy nn yn nn", category="count"))]
    assert score_rows("mme", some).values["accuracy_plus"] == 0.5
    assert score_rows("mme", some[::-1]).values["accuracy_plus"] == 0.5
    with pytest.raises(DataError, match="count/1 has 1 questions"):
        score_rows("mme", some[:3])


def hallusion(kind: str, figure: int, question: int, judgement: str) -> dict[str, Any]:
    place = {"category": kind, "subcategory": "map", "set_id": 1, "figure_id": figure, "question_id": question}
    right = judgement == "correct"
    own = f"{kind}_{figure}_{question}"
    return {
        "id": own,
        "prediction": "Yes" if right else "No",
        "target": "1",
        "judgement": judgement,
        "judge": "gpt-4",
        **place,
    }


def test_hallusionbench_by_hand() -> None:
    some = [
        hallusion("VS", 0, 0, "unclear"),
        hallusion("VS", 1, 0, "correct"),
        hallusion("VS", 1, 1, "Incorrect"),
        hallusion("VD", 1, 2, "correct"),
    ]
    official = score_rows("hallusionbench", some, "official").values
    assert (official["accuracy"], official["figure_accuracy"], official["question_accuracy"]) == (0.75, 0.5, 2 / 3)
    plain = score_rows("hallusionbench", some, "vlmevalkit").values
    # VLMEvalKit's key of a figure leaves out the kind, and counts the missing figure as one.
    assert (plain["accuracy"], plain["figure_accuracy"], plain["question_accuracy"]) == (0.5, 0.0, 1 / 3)


def test_hallusionbench_reads_the_index_of_the_tsv() -> None:
    row = {"id": 1, "prediction": "Yes, it is", "target": "Yes", "index": "VD_illusion_1_2_3_4"}
    sample = score_rows("hallusionbench", [row]).samples[0]
    assert (sample.score, sample.cluster, sample.category) == (1.0, "illusion_2", "VD")


def test_amber_looks_for_no() -> None:
    said = [("No", "no"), ("No", "yes"), ("no", "no"), ("Yes", "yes")]
    some = [
        {"id": i, "prediction": given, "target": right, "type": kind}
        for i, ((given, right), kind) in enumerate(
            zip(
                said, ["discriminative-hallucination"] * 2 + ["discriminative-attribute-state", "relation"], strict=True
            )
        )
    ]
    values = score_rows("amber_discriminative", some).values
    assert (values["accuracy"], values["precision"], values["recall"], values["f1"]) == (0.5, 0.5, 0.5, 0.5)
    assert (values["accuracy/existence"], values["accuracy/state"], values["accuracy/relation"]) == (0.5, 0.0, 1.0)
    assert values["accuracy_mean"] == 0.5
