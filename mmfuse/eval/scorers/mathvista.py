"""MathVista: mathematics in pictures. An answer is extracted first, then brought into the form of the target."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from mmfuse.errors import DataError
from mmfuse.eval.scorers.choices import options
from mmfuse.eval.scorers.records import (
    Result,
    Row,
    Sample,
    by_category,
    clusters,
    identity,
    mean,
    optional,
    required,
    text,
    unparsed,
)
from mmfuse.eval.text import edit_distance

_QUOTED = re.compile(r'The answer is "(.*)"\.')
_IN_PARENTHESES = re.compile(r"\(([a-zA-Z])\)")


def mathvista(rows: Sequence[Row], protocol: str) -> Result:
    """MathVista (Lu et al. 2023). Targets are texts; that of a multiple choice is the text of the option.

    The official code lets GPT-4 extract the answer where it is not the bare number or option. Under `official` such
    rows need the field `extraction` (see the judge requests of `mmfuse score`); it is an error if one lacks it. Under
    `rules` no model is asked: what `The answer is "…".` and the bare forms do not give counts as wrong, so the number
    is lower than an official one and is not to be quoted as such.
    """
    samples = []
    for row in rows:
        found, rule = _extract(row, protocol)
        form = None if found is None else normal_form(found, row)
        target = text(row, "target")
        category = optional(row, "task", "category")
        samples.append(Sample(identity(row), float(form == target), form, rule, clusters(row, "image"), category))
    metrics = {"accuracy": mean(sample.score for sample in samples), **by_category("accuracy", samples)}
    skills = [row.get("skills") or [] for row in rows]
    for skill in dict.fromkeys(str(skill) for own in skills for skill in own):
        pairs = zip(samples, skills, strict=True)
        metrics[f"accuracy/{skill}"] = mean(sample.score if skill in own else None for sample, own in pairs)
    metrics["unparsed_rate"] = unparsed(samples)
    judges = sorted({str(row["judge"]) for row in rows if row.get("judge") is not None})
    notes = (f"answers extracted by {', '.join(judges)}",) if judges and protocol == "official" else ()
    return Result(tuple(samples), metrics, notes)


def bare_answer(row: Row) -> str | None:
    """The answer where no extraction is needed: nothing, the text of an option, or the number alone."""
    answer = text(row)
    if not answer:
        return ""
    if _is_choice(row) and answer in options(row).values():
        return answer
    reader = {"integer": int, "float": float}.get(optional(row, "answer_type"))
    if reader is not None:
        try:
            return str(reader(answer))
        except ValueError:
            return None
    return None


def mathvista_prompt(row: Row, resources: Mapping[str, str]) -> str | None:
    """The request that extracts an answer: the demonstrations, the question and the response; None if it is bare."""
    if bare_answer(row) is not None:
        return None
    return f"{resources['prompt'].strip()}\n\n{text(row, 'question')}\n\n{text(row)}\n\nExtracted answer: "


def _extract(row: Row, protocol: str) -> tuple[str | None, str]:
    bare = bare_answer(row)
    if protocol == "rules":
        if bare:
            return bare, "bare"
        quoted = _QUOTED.search(text(row))
        return (quoted[1], "quoted") if quoted else (None, "none")
    if bare is not None:
        return bare, "bare"
    if row.get("extraction") is None:
        raise DataError(
            f"row {identity(row)}: the official extraction asks a model; the field 'extraction' is missing "
            "(export the requests, or use the protocol rules)"
        )
    return text(row, "extraction"), "extraction"


def _is_choice(row: Row) -> bool:
    return required(row, "question_type") == "multi_choice"


def normal_form(extraction: str, row: Row) -> str | None:
    """An extraction in the form of the target: an option's text, a whole number, a rounded one; None if it has none.

    Of a multiple choice a letter counts, and else the option with the fewest edits, the first of equals.
    """
    if _is_choice(row):
        own = options(row)
        if not own:
            raise DataError(f"row {identity(row)}: the field 'choices' is missing")
        letter = _IN_PARENTHESES.search(extraction.strip())
        found = letter[1].upper() if letter else extraction.strip()
        return own[found] if found in own else min(own.values(), key=lambda option: edit_distance(found, option))
    kind = required(row, "answer_type")
    try:
        if kind == "integer":
            return str(int(float(extraction)))
        if kind == "float":
            return str(round(float(extraction), int(required(row, "precision"))))
    except (ValueError, OverflowError):
        return None
    return extraction
