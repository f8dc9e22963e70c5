"""The plainest form of an answer."""

from __future__ import annotations


def normalise(text: str) -> str:
    """The form in which answers are compared: outer whitespace gone, inner runs one space, case folded.

    Punctuation, articles and number words are kept: `"35 71."` is not `"35 71"`.
    """
    return " ".join(text.split()).casefold()
