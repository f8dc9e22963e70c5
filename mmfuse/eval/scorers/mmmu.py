"""MMMU: multiple choice and open questions on college subjects."""

from __future__ import annotations

import ast
import random
from collections.abc import Sequence
from typing import Any

from mmfuse.errors import DataError
from mmfuse.eval.scorers.choices import options, wanted
from mmfuse.eval.scorers.records import (
    Result,
    Row,
    Sample,
    by_category,
    clusters,
    identity,
    mean,
    optional,
    text,
    texts,
    unparsed,
)
from mmfuse.eval.text import choices as read
from mmfuse.eval.text.numbers import mmmu_open

_DOMAINS = {
    "Art and Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health and Medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy "
    "Public_Health",
    "Humanities and Social Science": "History Literature Sociology Psychology",
    "Tech and Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power "
    "Materials Mechanical_Engineering",
}
_DOMAIN_OF = {subject: domain for domain, subjects in _DOMAINS.items() for subject in subjects.split()}
#: With which the official code seeds its guesses.
_SEED = 42
#: The column of VLMEvalKit's file that stands for whatever is not the answer to an open question.
_OTHER = "Other Answers"


def mmmu(rows: Sequence[Row], protocol: str) -> Result:
    """MMMU: the share of right answers over all questions, by domain and by subject.

    A question is open if it has no options (or `question_type` is `open`). What cannot be read from an answer to a
    multiple choice is, by protocol:

    - `strict`: wrong;
    - `official`: guessed as the official code does, with its seed and in the order of the rows, which therefore must
      be that of its files (subject by subject) for equal numbers;
    - `lmms`: guessed there with whatever the global generator gives; here it counts what a guess is worth on average;
    - `vlmevalkit`: wrong (exact matching, without a judge). Open questions become a choice between the answer and
      "Other Answers".

    lmms-eval compares open answers letter by letter, so under `lmms` they are all wrong.
    """
    guesses = random.Random(_SEED)
    samples = []
    for row in rows:
        own = _options(row)
        score, parsed, rule = _open(row, protocol) if own is None else _choice(row, own, protocol, guesses)
        subject = _subject(row)
        samples.append(Sample(identity(row), score, parsed, rule, clusters(row, "image"), subject))
    metrics = {"accuracy": mean(sample.score for sample in samples)}
    for domain in _DOMAINS:
        inside = [_DOMAIN_OF.get(sample.category) == domain for sample in samples]
        if any(inside):
            pairs = zip(samples, inside, strict=True)
            metrics[f"accuracy/{domain}"] = mean(sample.score if held else None for sample, held in pairs)
    metrics |= {**by_category("accuracy", samples), "unparsed_rate": unparsed(samples)}
    return Result(tuple(samples), metrics)


def _options(row: Row) -> dict[str, str] | None:
    """The options of a multiple choice; None for an open question."""
    value: Any = row.get("options")
    if isinstance(value, str):
        # The official parquet files hold the list as Python would print it.
        try:
            value = ast.literal_eval(value)  # safe: literals alone, no calls and no names
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            value = None
        if not isinstance(value, list):
            raise DataError(f"row {identity(row)}: 'options' is no list: {row['options']!r:.80}")
    if row.get("question_type") == "open" or value == []:
        return None
    return options({**row, "options": value}) or None


def _subject(row: Row) -> str:
    """The field `subject` or `category`, or what stands in an id such as `validation_Accounting_1`."""
    named = optional(row, "subject", "category")
    parts = identity(row).split("_")
    return named or ("_".join(parts[1:-1]) if len(parts) > 2 and parts[-1].isdigit() else "")


def _choice(row: Row, own: dict[str, str], protocol: str, guesses: random.Random) -> tuple[float, str | None, str]:
    reader = {"lmms": read.lmms_mmmu_choice, "vlmevalkit": read.vlmevalkit_choice}.get(protocol, read.mmmu_choice)
    letter, rule = reader(text(row), own)
    right = wanted(row, own)
    if letter is None and protocol == "official":
        return float(guesses.choice(list(own)) == right), None, "guess"
    if letter is None and protocol == "lmms":
        return 1 / len(own), None, "guess"
    return float(letter == right), letter, rule


def _open(row: Row, protocol: str) -> tuple[float, str | None, str]:
    given, targets = text(row), texts(row)
    if protocol == "vlmevalkit":
        answer = targets[0] if len(targets) == 1 else str(targets)
        letter, rule = read.vlmevalkit_choice(given, {"A": answer, "B": _OTHER})
        return float(letter == "A"), letter, rule
    return float(protocol != "lmms" and mmmu_open(given, targets)), given, "open"
