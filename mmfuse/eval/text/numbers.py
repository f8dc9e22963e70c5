"""Answers to open questions as MMMU compares them: texts, and numbers rounded to two digits."""

from __future__ import annotations

import re
from typing import Final

#: A text in the form in which it is looked for, or a number.
Value = str | float

_NUMBERS: Final = tuple(
    re.compile(pattern)
    for pattern in (
        r"-?\b\d{1,3}(?:,\d{3})+\b",
        r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
        r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
    )
)
_SENTENCE: Final = re.compile(r"\.\s(?=[A-Z])|\n")
_INDICATORS: Final = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL: Final = frozenset(":,.!?;'")


def mmmu_values(answer: str) -> set[Value]:
    """What an answer may mean: the shortest tails behind words such as "so" and "is", and all numbers in them.

    Two oddities are official: the answer is lowered before it is cut into sentences at capital letters, so only lines
    are cut; and `=` counts in the last line only.
    """
    answer = answer.strip().strip(".").lower()
    lines = _SENTENCE.split(answer)
    tails = []
    for number, line in enumerate(lines):
        words = (*_INDICATORS, "=") if number == len(lines) - 1 else _INDICATORS
        found = [line.split(word)[-1].strip() for word in words if word in line]
        # An empty tail gives way to the next one, as in the official loop; the first of the shortest is kept.
        best = ""
        for tail in found:
            if not best or len(tail) < len(best):
                best = tail
        if best and best not in _TRIVIAL:
            tails.append(best)
    tails = tails or [answer]
    texts = [*tails, *(number for tail in tails for pattern in _NUMBERS for number in pattern.findall(tail))]
    return {value for text in texts for value in normal_value(text)}


def normal_value(text: str) -> list[Value]:
    """A number rounded to two digits, or the text lowered; a single character with a space before or behind it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        pass
    text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def mmmu_open(answer: str, targets: list[str]) -> bool:
    """Whether an answer contains one of the targets, or a number equal to one."""
    wanted = [value for target in targets for value in normal_value(target)]
    return any(
        any(isinstance(own, str) and own in value for own in wanted) if isinstance(value, str) else value in wanted
        for value in mmmu_values(answer)
    )
