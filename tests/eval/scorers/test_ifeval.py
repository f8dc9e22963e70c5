"""IFEval: each instruction by hand, strict and loose."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmfuse.errors import DataError
from mmfuse.eval.scorers import score_rows
from mmfuse.eval.scorers.ifeval import loose_forms
from mmfuse.eval.text.instructions import CHECKS, follows, sentence_count

CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("keywords:existence", {"keywords": ["dog", "cat"]}, "a Dog and a CAT", "a dog"),
    ("keywords:frequency", {"keyword": "dog", "frequency": 2, "relation": "at least"}, "dog dogs", "dog"),
    ("keywords:forbidden_words", {"forbidden_words": ["dog"]}, "dogs", "a DOG"),
    ("keywords:letter_frequency", {"letter": "E", "let_frequency": 2, "let_relation": "less than"}, "Ex", "eE"),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, "One. Two", "Mr. One."),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", "a *** *** b"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "a b-", "a-b c"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "So"},
        "a\n\n'So, b",
        "a\n\nb",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] [b]", "[a]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "x\np. s. y", "ps y"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "** a\n- b"),
    ("detectable_format:constrained_response", {}, " My answer is no. ", "no"),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 1}, "*a*", "* *"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 1},
        "Section 1 a",
        "Section",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a}"),
    ("detectable_format:title", {}, "<<a>> b", "<< >>"),
    ("combination:two_responses", {}, "a******b", "a******a"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it"}, "SAY IT: x", "x"),
    ("startend:end_checker", {"end_phrase": "The end"}, 'x the end"', "the end."),
    ("startend:quotation", {}, '"a"', '"'),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"}, "A-B C", "A b"),
    ("punctuation:no_comma", {}, "a b", "a, b"),
]


@pytest.mark.parametrize(("name", "settings", "good", "bad"), CASES, ids=lambda value: value if ":" in value else "")
def test_instructions(name: str, settings: dict[str, Any], good: str, bad: str) -> None:
    assert follows(good, name, settings) is True
    assert follows(bad, name, settings) is False
    assert follows(" \n", name, settings) is False


def test_every_instruction_has_a_case() -> None:
    languages = {"language:response_language", "change_case:english_capital", "change_case:english_lowercase"}
    assert {name for name, *_ in CASES} | languages == set(CHECKS)
    assert len(CHECKS) == 25


@given(st.text(), st.sampled_from(CASES))
def test_instructions_are_total(text: str, case: tuple[str, dict[str, Any], str, str]) -> None:
    assert follows(text, case[0], case[1]) in (True, False)


@pytest.mark.parametrize(
    ("text", "count"), [("One. Two! Three?", 3), ("Mr. X came", 1), ("no mark", 1), ('He said "no." Then', 2), ("", 0)]
)
def test_sentences(text: str, count: int) -> None:
    assert sentence_count(text) == count


def test_languages_by_detector_or_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmfuse.eval.text.instructions._detectors", lambda: None)
    rows = [
        {
            "id": 1,
            "prediction": "ja",
            "instruction_id_list": ["language:response_language"],
            "kwargs": [{"language": "de"}],
        },
        {"id": 2, "prediction": "a", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"language": None}]},
    ]
    result = score_rows("ifeval", rows)
    assert set(result.values.values()) == {1.0}
    assert result.samples[0].score is None
    assert "1 instructions left out" in result.warnings[0]
    # What is not upper case fails whatever its language is.
    assert follows("small", "change_case:english_capital", {}) is False


def test_language_detector() -> None:
    pytest.importorskip("langdetect")
    assert (
        follows("Das ist ein ganz normaler deutscher Satz.", "language:response_language", {"language": "de"}) is True
    )
    assert follows("THIS IS A LONG ENGLISH SENTENCE.", "change_case:english_capital", {}) is True
    assert follows("12 34", "language:response_language", {"language": "de"}) is True


def test_strict_and_loose() -> None:
    row = {
        "id": 1,
        "prediction": "Sure, here it is:\n*no commas here*",
        "instruction_id_list": ["punctuation:no_comma", "detectable_format:title"],
        "kwargs": [{}, {}],
    }
    assert score_rows("ifeval", [row]).values == {
        "prompt_level_strict_acc": 0.0,
        "inst_level_strict_acc": 0.0,
        "prompt_level_loose_acc": 0.0,
        "inst_level_loose_acc": 0.5,
    }
    assert loose_forms("a\n*b*\nc") == ["a\n*b*\nc", "*b*\nc", "a\n*b*", "*b*", "a\nb\nc", "b\nc", "a\nb", "b"]


@pytest.mark.parametrize(
    ("names", "settings", "problem"),
    [
        (["no:such"], [{}], "no instruction 'no:such'"),
        (["keywords:existence"], [{}], "the setting 'keywords' is missing"),
        (["keywords:existence"], [{"keywords": ["("]}], "cannot be used"),
        (["length_constraints:number_words"], [{"num_words": 1, "relation": "about"}], "'less than' or 'at least'"),
        (["punctuation:no_comma"], [], "lists of the same length"),
    ],
)
def test_mistakes_are_named(names: list[str], settings: list[dict[str, Any]], problem: str) -> None:
    row = {"id": 5, "prediction": "a", "instruction_id_list": names, "kwargs": settings}
    with pytest.raises(DataError, match=f"row 5: .*{problem}"):
        score_rows("ifeval", [row])
