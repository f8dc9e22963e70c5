"""From predictions to numbers: exact match with its interval, by family, beside the scores of two dummies.

One dummy is blind (the same model without the images), the other always gives the answer that is most frequent in its
family. What a model scores beyond both is what it has read from the image.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmfuse.errors import unknown
from mmfuse.eval.text import normalise

if TYPE_CHECKING:
    from mmfuse.eval.questions import Prediction

#: The 97.5 % quantile of the normal distribution, for intervals of 95 %.
Z95 = 1.959963984540054


@dataclass(frozen=True)
class Score:
    """How many of `n` answers are right.

    Attributes:
        n: answers.
        right: right answers.
    """

    n: int
    right: int

    def __post_init__(self) -> None:
        if not (self.n >= 1 and 0 <= self.right <= self.n):
            raise ValueError(f"a score needs 1 answer or more and 0 to n right ones, got {self.right} of {self.n}")

    @property
    def accuracy(self) -> float:
        """The share of right answers, 0..1."""
        return self.right / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """The Wilson score interval (1927) at 95 %: inside 0..1 and sensible for few answers, or all right."""
        return wilson(self.accuracy, self.n)


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's interval at 95 % for a share of `n` independent answers, which need not be a whole number of them."""
    z2 = Z95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # Rounding may leave 1e-17 beyond the ends where they are known exactly.
    low = 0.0 if share == 0 else max(0.0, middle - half)
    high = 1.0 if share == 1 else min(1.0, middle + half)
    return low, high


def exact_match(predictions: Sequence[Prediction]) -> Score:
    """How many predictions are right.

    Raises:
        ValueError: there are none.
    """
    if not predictions:
        raise ValueError("there are no predictions to score")
    return Score(len(predictions), sum(item.right for item in predictions))


def per_digit(predictions: Sequence[Prediction]) -> float:
    """Of the digits of all answers, the share that stands at its place in the prediction, 0..1.

    Only digits count, the first with the first and so on; those that are missing or too many are wrong.

    Raises:
        ValueError: there are no digits.
    """
    right = total = 0
    for item in predictions:
        expected, given = _digits(item.answer), _digits(item.prediction)
        right += sum(a == b for a, b in zip(expected, given, strict=False))
        total += max(len(expected), len(given))
    if not total:
        raise ValueError("there are no digits to score")
    return right / total


def majority_answers(predictions: Sequence[Prediction]) -> dict[str, str]:
    """For each family the expected answer that is most frequent, the first in order of the alphabet among equals."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for item in predictions:
        answers[item.family][normalise(item.answer)] += 1
    return {family: min(held, key=lambda answer: (-held[answer], answer)) for family, held in answers.items()}


def score(
    predictions: Sequence[Prediction],
    blind: Sequence[Prediction] | None = None,
    majority: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """All scores of a test set, ready for `write_results`.

    Args:
        predictions: the model's.
        blind: the same questions without images, in the same order.
        majority: for each family the answer of a dummy that knows only the family; the most frequent expected answer
            of `predictions` if not given, which is the best that any such dummy can do.

    Returns:
        `n`, `exact_match`, `interval` (low, high), `blind_exact_match` (None without `blind`), `majority_exact_match`,
        `per_digit` (of the families whose answers all hold two digits or more, such as transcriptions; None without
        one), `unfinished` (answers that were cut), and `by_family`: for each family in order of appearance the same
        without `unfinished`, with `share` and `majority_answer`. All accuracies are 0..1.

    Raises:
        ValueError: no predictions, other questions in `blind`, or a family that `majority` lacks.
    """
    whole = exact_match(predictions)
    if blind is not None:
        _check_same(predictions, blind)
    usual = majority_answers(predictions) if majority is None else majority
    rows: dict[str, list[int]] = defaultdict(list)
    for row, item in enumerate(predictions):
        if item.family not in usual:
            raise ValueError(f"majority: {unknown('family', item.family, usual)}")
        rows[item.family].append(row)
    table = {}
    for family, held in rows.items():
        unseen = None if blind is None else [blind[row] for row in held]
        own = _scores([predictions[row] for row in held], unseen, usual)
        table[family] = {"share": own["n"] / whole.n, "majority_answer": usual[family], **own}
    transcribing = {family for family, own in table.items() if own["per_digit"] is not None}
    return {
        **_scores(predictions, blind, usual),
        "per_digit": per_digit([p for p in predictions if p.family in transcribing]) if transcribing else None,
        "unfinished": sum(not item.finished for item in predictions),
        "by_family": table,
    }


def _scores(
    predictions: Sequence[Prediction], blind: Sequence[Prediction] | None, usual: Mapping[str, str]
) -> dict[str, Any]:
    found = exact_match(predictions)
    as_usual = sum(normalise(item.answer) == normalise(usual[item.family]) for item in predictions)
    transcribes = all(len(_digits(item.answer)) > 1 for item in predictions)
    return {
        "n": found.n,
        "exact_match": found.accuracy,
        "interval": list(found.interval),
        "blind_exact_match": None if blind is None else exact_match(blind).accuracy,
        "majority_exact_match": as_usual / found.n,
        "per_digit": per_digit(predictions) if transcribes else None,
    }


def _digits(text: str) -> list[str]:
    return [character for character in text if character.isdigit()]


def _check_same(predictions: Sequence[Prediction], blind: Sequence[Prediction]) -> None:
    if len(blind) != len(predictions):
        raise ValueError(f"{len(blind)} blind predictions for {len(predictions)} questions")
    for seen, unseen in zip(predictions, blind, strict=True):
        if (seen.key, seen.question) != (unseen.key, unseen.question):
            raise ValueError(f"blind predictions are in another order: {unseen.key} stands where {seen.key} should")
