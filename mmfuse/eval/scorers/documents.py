"""Questions about documents and charts: ANLS (DocVQA, InfographicVQA, ST-VQA) and ChartQA's relaxed accuracy."""

from __future__ import annotations

from collections.abc import Sequence

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
)
from mmfuse.eval.text import edit_distance

#: Below this similarity an answer counts nothing.
ANLS_THRESHOLD = 0.5
#: How far a number may be off in ChartQA, relative to the right one.
RELAXED_CHANGE = 0.05


def anls(rows: Sequence[Row], protocol: str) -> Result:
    """Average normalised Levenshtein similarity (Biten et al. 2019).

    `official` (the RRC script; `lmms` and `vlmevalkit` do the same) divides by the longer of the *raw* texts in upper
    case and keeps a similarity of exactly 0.5; `paper` follows the formula of the paper: it divides by the length of
    the texts that are compared, and 0.5 counts 0.
    """
    samples = []
    for row in rows:
        given, targets = text(row), texts(row)
        if protocol == "paper":
            given, targets = _plain(given), [_plain(target) for target in targets]
        distance = min(normalised_distance(target, given) for target in targets)
        similarity = 1 - distance
        dropped = distance >= ANLS_THRESHOLD if protocol == "paper" else similarity < ANLS_THRESHOLD
        score = 0.0 if dropped else similarity
        category = optional(row, "answer_type", "category")
        samples.append(Sample(identity(row), score, given, "text", clusters(row, "image", "docId"), category))
    return Result(tuple(samples), {"anls": mean(sample.score for sample in samples), **by_category("anls", samples)})


def normalised_distance(target: str, prediction: str) -> float:
    """The edit distance up to case and whitespace over the length of the longer raw text; 0 for two empty ones."""
    # Upper case as in the official script: it can be longer than the text itself ("ß" becomes "SS").
    longest = max(len(target.upper()), len(prediction.upper()))
    if not longest:
        return 0.0
    return edit_distance(_plain(target), _plain(prediction)) / longest


def _plain(text: str) -> str:
    # The official order: what lower-casing makes of a text is not stripped again.
    return " ".join(text.lower().split())


def chartqa(rows: Sequence[Row], protocol: str) -> Result:
    """ChartQA's relaxed accuracy (Masry et al. 2022): numbers may be off by 5 %, texts must be equal up to case.

    `official` and `lmms` take the prediction as it is; `vlmevalkit` strips it first. With `split` (`human`,
    `augmented`) the accuracy of each is added.
    """
    samples = []
    for row in rows:
        given = text(row).strip() if protocol == "vlmevalkit" else text(row)
        score = float(any(relaxed_match(given, target) for target in texts(row)))
        category = optional(row, "split", "type", "category")
        samples.append(Sample(identity(row), score, given, "text", clusters(row, "image"), category))
    accuracy = mean(sample.score for sample in samples)
    return Result(tuple(samples), {"relaxed_accuracy": accuracy, **by_category("relaxed_accuracy", samples)})


def relaxed_match(prediction: str, target: str) -> bool:
    """Whether two numbers differ by 5 % of the target at most; texts, and a target of 0, must be equal up to case."""
    given, wanted = _number(prediction), _number(target)
    if given is not None and wanted:
        return abs(given - wanted) / abs(wanted) <= RELAXED_CHANGE
    return prediction.lower() == target.lower()


def _number(text: str) -> float | None:
    """A number as Python reads it; `12%` is 0.12."""
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None
