"""MathVista: extraction and the form of the target."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmfuse.errors import DataError
from mmfuse.eval.scorers import score_rows
from mmfuse.eval.scorers.mathvista import normal_form

CHOICES = ["3/11", "8/11", "six"]


def row(prediction: str, target: str, kind: str = "multi_choice", answer: str = "text", **fields: object) -> dict:
    base = {"id": 1, "prediction": prediction, "target": target, "question_type": kind, "answer_type": answer}
    return {**base, "choices": CHOICES, "precision": 2, **fields}


@pytest.mark.parametrize(
    ("extraction", "kind", "form"),
    [
        ("(b) 8/11", "text", "8/11"),
        ("B", "text", "8/11"),
        ("b", "text", "six"),
        ("8/1", "text", "8/11"),
        ("", "text", "six"),
        ("14.9", "integer", "14"),
        ("1e400", "integer", None),
        ("fourteen", "integer", None),
        ("1.456", "float", "1.46"),
        ("0", "float", "0.0"),
        ("nan", "float", "nan"),
        ("[1, 2]", "list", "[1, 2]"),
    ],
)
def test_forms(extraction: str, kind: str, form: str | None) -> None:
    question = "multi_choice" if kind == "text" else "free_form"
    assert normal_form(extraction, row("", "", question, kind)) == form


@pytest.mark.parametrize(
    ("sample", "parsed", "rule"),
    [
        (row("8/11", "8/11"), "8/11", "bare"),
        (row("7", "7", "free_form", "integer"), "7", "bare"),
        (row("I see seven", "7", "free_form", "integer", extraction="7"), "7", "extraction"),
    ],
)
def test_official(sample: dict, parsed: str, rule: str) -> None:
    found = score_rows("mathvista", [sample]).samples[0]
    assert (found.parsed, found.rule, found.score) == (parsed, rule, 1.0)


def test_an_extraction_that_is_missing_is_an_error_or_wrong() -> None:
    sample = row("I see seven", "7", "free_form", "integer")
    with pytest.raises(DataError, match=r"row 1: .*'extraction' is missing"):
        score_rows("mathvista", [sample])
    assert score_rows("mathvista", [sample], "rules").samples[0].parsed is None
    quoted = {**sample, "prediction": 'The answer is "7".'}
    assert score_rows("mathvista", [quoted], "rules").values["accuracy"] == 1.0


def test_skills() -> None:
    values = score_rows("mathvista", [row("six", "six", skills=["algebra", "logic"], task="x")]).values
    assert (values["accuracy/algebra"], values["accuracy/x"]) == (1.0, 1.0)


@given(st.text(), st.sampled_from(["integer", "float", "list", "text"]))
def test_forms_are_total(extraction: str, kind: str) -> None:
    form = normal_form(extraction, row("", "", "multi_choice" if kind == "text" else "free_form", kind))
    assert form is None or isinstance(form, str)
