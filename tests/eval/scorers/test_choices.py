"""Multiple choice: what each protocol reads from an answer, CircularEval, pairs, means over kinds and sources."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmfuse.errors import DataError
from mmfuse.eval.scorers import score_rows
from mmfuse.eval.text import choices as read

OPTIONS = {"A": "cat", "B": "dog", "C": "bird", "D": "no"}


@pytest.mark.parametrize(
    ("answer", "letter", "vlmevalkit", "lmms", "mmmu"),
    [
        ("B", "B", "B", "B", "B"),
        ("b", "B", None, None, None),
        ("(B)", "B", "B", "B", "B"),
        ("B.", "B", "B", "B", "B"),
        ("B) dog", None, "dog", "B", None),
        ("**B**", None, "B", "B", None),
        ("[B]", None, "B", "B", None),
        ("", None, None, None, None),
        ("B\n", "B", "B", "B", None),
        ("A dog is on the bus", None, "dog", "A", "A"),
        ("It is not A but B", None, "D", "B", "B"),
        ("None of the above", None, "D", None, None),
        ("Both A and B", None, None, "B", "B"),
        ("The correct answer is **C**. A and B are wrong, as D would be.", None, "C", "D", "D"),
        ("Ｂ", None, None, None, None),
        ("选B", None, None, "B", None),
        ("Cannot determine the answer B", None, None, "B", "B"),
        ("BANANA c", None, None, "A", None),
    ],
)
def test_traps(answer: str, letter: str, vlmevalkit: str, lmms: str, mmmu: str) -> None:
    expected = {"dog": "B"}.get(vlmevalkit, vlmevalkit)
    assert read.letter_choice(answer, OPTIONS)[0] == letter
    assert read.vlmevalkit_choice(answer, OPTIONS)[0] == expected
    assert read.lmms_choice(answer, OPTIONS)[0] == lmms
    assert read.mmmu_choice(answer, OPTIONS)[0] == mmmu


@pytest.mark.parametrize(
    ("answer", "official", "lmms"),
    [
        ("B", 1, 1),
        ("b", 0, 1),
        ("(B)", 0, 0),
        ("B.", 0, 1),
        ("B. dog", 1, 1),
        ("The answer is B.", 1, 0),
        ("The answer is B. The answer is B.", 0, 0),
        ("The answer is B", 0, 0),
    ],
)
def test_scienceqa(one, answer: str, official: int, lmms: int) -> None:
    options = ["cat", "dog"]
    assert one("scienceqa", "official", answer, 1, choices=options).score == official
    assert one("scienceqa", "lmms", answer, "B", choices=options).score == lmms


def test_a_letter_without_an_option_is_not_read(one) -> None:
    assert one("scienceqa", "official", "C", "B", choices=["cat", "dog"]).parsed is None


@pytest.mark.parametrize(
    ("task", "protocol", "answer", "letter"),
    [
        ("ai2d", "lmms", "(b)", "B"),
        ("ai2d", "lmms", " B. dog", "B"),
        ("ai2d", "lmms", "B dog", None),
        ("cv_bench", "lmms", "( b) dog", "B"),
        ("cv_bench", "lmms", "bird", "B"),
        ("cv_bench", "official", "so the answer is (B).", "B"),
        ("cv_bench", "official", "Answer: B", "B"),
        ("mmstar", "official", "the answer is B", "B"),
        ("mmstar", "official", "Option B", "B"),
        ("mmstar", "official", "Blue", "B"),
        ("mmstar", "official", "The B", None),
        ("seedbench", "lmms", " banana", "B"),
        ("seedbench", "official", "B.", None),
        ("mmvp", "lmms", "the answer is (b)", "B"),
        ("mmvp", "lmms", "Bicycles", "B"),
    ],
)
def test_readers_of_tasks(task: str, protocol: str, answer: str, letter: str | None) -> None:
    rows = [{"id": number, "prediction": answer, "target": "B"} for number in (1, 2)]
    assert score_rows(task, rows, protocol).samples[0].parsed == letter


def test_seedbench_by_likelihood(one) -> None:
    losses = [2.0, 1.0, 1.0, 3.0]
    assert one("seedbench", "official", losses, "B").parsed == "B"
    with pytest.raises(DataError, match="row 1: 'prediction' must hold 4 losses"):
        one("seedbench", "official", [1.0, float("nan"), 2.0, 3.0], "B")


def rotations(index: int, answers: list[str], **fields: Any) -> list[dict[str, Any]]:
    """Four rotations of a question whose first option is right at first."""
    texts = ["cat", "dog", "bird", "fish"]
    return [
        {
            "id": index + turn * 1_000_000,
            "index": index + turn * 1_000_000,
            "options": texts[turn:] + texts[:turn],
            "target": "ADCB"[turn],
            "prediction": answer,
            **fields,
        }
        for turn, answer in enumerate(answers)
    ]


def test_circular_evaluation_asks_for_every_rotation() -> None:
    rows = [*rotations(1, ["A", "D", "C", "B"], category="x"), *rotations(2, ["A", "A", "A", "A"], category="y")]
    values = score_rows("mmbench", rows).values
    assert (values["circular_accuracy"], values["accuracy"]) == (0.5, 1.0)
    assert (values["circular_accuracy/x"], values["circular_accuracy/y"]) == (1.0, 0.0)
    assert score_rows("mmbench", rows[::-1]).values == pytest.approx(values)


def test_one_answer_that_cannot_be_read_loses_the_question() -> None:
    assert score_rows("mmbench", rotations(1, ["A", "D", "C", "it is hard to tell"])).values["circular_accuracy"] == 0
    assert score_rows("mmbench", rotations(1, ["A", "D", "C", "cat"])).values["circular_accuracy"] == 1


def test_rotations_without_their_question_are_refused_and_no_rotations_are_named() -> None:
    with pytest.raises(DataError, match="question 7 has rotations, but no row"):
        score_rows("mmbench", rotations(7, ["A"] * 4)[1:])
    assert "no question has rotations" in score_rows("mmbench", rotations(1, ["A"])).warnings[0]


def test_mmvp_counts_pairs() -> None:
    answers = [("A", "A"), ("B", "B"), ("A", "A"), ("A", "B")]
    rows = [{"id": i, "prediction": given, "target": right} for i, (given, right) in enumerate(answers)]
    values = score_rows("mmvp", rows).values
    assert (values["pair_accuracy"], values["accuracy"]) == (0.5, 0.75)
    with pytest.raises(DataError, match="pair 1 has 1 rows"):
        score_rows("mmvp", rows[:3])


def test_mmvp_names_the_published_errors() -> None:
    rows = [{"id": i, "index": i, "prediction": "A", "target": "(a)"} for i in (99, 100)]
    assert "rows 99" in score_rows("mmvp", rows).warnings[0]


def test_cv_bench_weighs_sources() -> None:
    sources = ["ADE20K", "COCO", "COCO", "Omni3D"]
    rows = [{"id": i, "prediction": "AABA"[i], "target": "(A)", "source": source} for i, source in enumerate(sources)]
    values = score_rows("cv_bench", rows).values
    assert values["cv_bench"] == ((1 + 0.5) / 2 + 1) / 2
    assert (values["accuracy"], values["accuracy/2d"], values["accuracy/3d"]) == (0.75, 0.75, 1.0)
    assert "cv_bench" not in score_rows("cv_bench", rows[1:]).values


def test_mmstar_of_lmms_is_the_mean_over_kinds() -> None:
    rows = [{"id": i, "prediction": "AAB"[i], "target": "A", "l2_category": "xxy"[i]} for i in range(3)]
    assert next(iter(score_rows("mmstar", rows, "lmms").values.items())) == ("mean_of_kinds", 0.5)
    assert next(iter(score_rows("mmstar", rows).values.items())) == ("accuracy", 2 / 3)
    with pytest.raises(DataError, match="'l2_category' is missing"):
        score_rows("mmstar", [{"id": 1, "prediction": "A", "target": "A"}], "lmms")


@pytest.mark.parametrize(
    ("protocol", "answer", "target", "score"),
    [
        ("lmms", "It is B", "B", 1),
        ("lmms", "Two.", "two", 1),
        ("vlmevalkit", "dog", "B", 1),
        ("vlmevalkit", "5.", "5", 1),
    ],
)
def test_realworldqa(one, protocol: str, answer: str, target: str, score: int) -> None:
    options = {"options": ["cat", "dog", "5"]} if protocol == "vlmevalkit" and target == "B" else {}
    assert one("realworldqa", protocol, answer, target, **options).score == score


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"target": "E", "options": ["a"]}, "the target 'E' is none of the options A"),
        ({"target": "A", "options": "a, b"}, "'options' must be a list"),
        ({"target": "A"}, "the field 'options' is missing"),
    ],
)
def test_mistakes_are_named(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        score_rows("multiple_choice", [{"id": 1, "prediction": "A", **fields}])


def test_empty_columns_of_a_tsv_are_no_options(one) -> None:
    assert one("multiple_choice", "letter", "C", "A", A="x", B="y", C=float("nan")).parsed is None


@given(st.text(), st.lists(st.text(max_size=5), min_size=2, max_size=5), st.sampled_from(sorted(vars(read))))
def test_every_reader_is_total(answer: str, texts: list[str], name: str) -> None:
    reader = getattr(read, name)
    if not name.endswith(("_choice", "_character")) or name.startswith("_"):
        reader = read.letter_choice
    options = dict(zip("ABCDE", texts, strict=False))
    letter, rule = reader(answer, options)
    assert (letter is None) == (rule in ("none", "refusal"))
    assert letter is None or letter in "ABCDE"
