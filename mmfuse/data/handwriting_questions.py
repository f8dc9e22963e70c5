"""Questions about a scene of handwritten digits, each with its answer computed from the labels.

Every family lists *all* questions that it can ask about a grid. `Balancer` then picks so that answers are used equally
often, which keeps a model that does not see the image near chance.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np

from mmfuse.errors import unknown

Grid = Sequence[Sequence[int]]
Candidates = list[tuple[str, str]]

NUMBER_WORDS: Final = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
READ_ALL: Final = "Read all digits."


@dataclass(frozen=True)
class Question:
    """One question about one scene."""

    family: str
    text: str
    answer: str


def transcription(grid: Grid) -> str:
    """Return the digits row by row, rows separated by a space: `"35 71"`."""
    return " ".join("".join(map(str, row)) for row in grid)


def _read(grid: Grid) -> Candidates:
    return [(READ_ALL, transcription(grid))]


def _position(grid: Grid) -> Candidates:
    return [
        (f"What is in row {NUMBER_WORDS[y]}, column {NUMBER_WORDS[x]}?", str(digit))
        for y, row in enumerate(grid)
        for x, digit in enumerate(row)
    ]


def _right_of(grid: Grid) -> Candidates:
    once = _occur_once(grid)
    pairs = ((left, right) for row in grid for left, right in itertools.pairwise(row))
    return [(f"What is right of {left}?", str(right)) for left, right in pairs if left in once]


def _above(grid: Grid) -> Candidates:
    once = _occur_once(grid)
    pairs = (pair for upper, lower in itertools.pairwise(grid) for pair in zip(upper, lower, strict=True))
    return [(f"What is above {lower}?", str(upper)) for upper, lower in pairs if lower in once]


def _count(grid: Grid) -> Candidates:
    times = _times(grid)
    return [(f"How many times is {digit} written?", str(times[digit])) for digit in range(10)]


def _exists(grid: Grid) -> Candidates:
    times = _times(grid)
    return [(f"Is there a {digit}?", "yes" if times[digit] else "no") for digit in range(10)]


def _largest(grid: Grid) -> Candidates:
    rows = [(f"What is largest in row {NUMBER_WORDS[y]}?", str(max(row))) for y, row in enumerate(grid)]
    columns = list(zip(*grid, strict=True))
    return rows + [(f"What is largest in column {NUMBER_WORDS[x]}?", str(max(col))) for x, col in enumerate(columns)]


def _times(grid: Grid) -> Counter[int]:
    return Counter(digit for row in grid for digit in row)


def _occur_once(grid: Grid) -> set[int]:
    return {digit for digit, times in _times(grid).items() if times == 1}


FAMILIES: Final[Mapping[str, Callable[[Grid], Candidates]]] = MappingProxyType(
    {
        "read": _read,
        "position": _position,
        "right_of": _right_of,
        "above": _above,
        "count": _count,
        "exists": _exists,
        "largest": _largest,
    }
)


def candidates(family: str, grid: Grid) -> Candidates:
    """Return every question of `family` on `grid` as `(text, answer)`; empty where the grid allows none.

    Raises:
        ValueError: there is no such family.
    """
    if family not in FAMILIES:
        raise ValueError(unknown("question family", family, FAMILIES))
    return FAMILIES[family](grid)


class Balancer:
    """Picks questions so that, within a family, the answers are used equally often.

    Of the answers that a scene allows it takes the one given least often so far, ties and the wording at random.

    Args:
        rng: the only source of randomness.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._used: dict[str, Counter[str]] = {family: Counter() for family in FAMILIES}

    def pick(self, family: str, options: Candidates) -> Question:
        """Return one of the `options` of `family`, which must not be empty."""
        used = self._used[family]
        answers = dict.fromkeys(answer for _, answer in options)
        answer = min(answers, key=lambda answer: (used[answer], self._rng.random()))
        texts = [text for text, given in options if given == answer]
        used[answer] += 1
        return Question(family, texts[int(self._rng.random() * len(texts))], answer)

    def dialogue(
        self, grid: Grid, turns: int, families: Sequence[str], weights: Mapping[str, float] = MappingProxyType({})
    ) -> list[Question]:
        """Return up to `turns` different questions: one of each family in random order, then further rounds.

        Fewer come back only where the scene has no further question.

        Args:
            grid: the digits of the scene.
            turns: how many questions.
            families: what may be asked.
            weights: a family of weight 2 is twice as likely to be asked next as one of weight 1, the default.
        """
        questions: list[Question] = []
        options = {family: candidates(family, grid) for family in families}
        while any(options.values()) and len(questions) < turns:
            for family in self._order(families, weights):
                if options[family] and len(questions) < turns:
                    question = self.pick(family, options[family])
                    options[family].remove((question.text, question.answer))
                    questions.append(question)
        return questions

    def _order(self, families: Sequence[str], weights: Mapping[str, float]) -> list[str]:
        """All families at random, likely ones first (Efraimidis and Spirakis 2006, sampling without replacement)."""
        if not weights:
            return [families[number] for number in self._rng.permutation(len(families))]
        waiting = self._rng.exponential(size=len(families)) / [weights.get(family, 1.0) for family in families]
        return [families[number] for number in np.argsort(waiting)]
