"""The words of captions as the COCO evaluation counts them: Penn Treebank tokens without punctuation."""

from __future__ import annotations

import re
from typing import Final

#: Tokens that the official evaluation drops. Its list has brackets in upper case, but the tokenizer lowers them, so
#: `-lrb-` and `-rrb-` stay and count as words.
_DROPPED: Final = frozenset(("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))
_BRACKETS: Final = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_ABBREVIATION: Final = (
    r"(?:mr|mrs|ms|dr|st|jr|sr|prof|vs|etc|ave|inc|ltd|co|no|mt|ft|gen|col|sgt|rev|gov|hon|e\.g|i\.e|a\.m|p\.m)\."
    r"|(?:[a-z]\.){2,}(?![a-z])|[a-z]\.(?=\s+\S)"
)
_TOKEN: Final = re.compile(
    rf"""{_ABBREVIATION}(?!\w)
    |\.\.\.+
    |https?://[^\s<>]+
    |(?<!\w)[-+]?\d+(?:[.,:/-]\d+)*(?:st|nd|rd|th|s)?(?!\w)   # 1,000  3.5  10:30  1/2  1st  90s  -2
    |\.\d+
    |'(?:s|m|d|ll|re|ve|t)(?!\w)
    |n't(?!\w)
    |(?:[^\W_]|')+?(?=n't(?!\w))                          # is|n't
    |o'[^\W_]+                                            # o'clock, o'brien
    |[^\W_]+(?:[-/_&.@][^\W_]+)*                            # words, with what joins them inside
    |--+|[-–—]
    |``|''|\*\*+|__+
    |\S""",
    re.VERBOSE,
)
_SPLIT: Final = {
    "cannot": ("can", "not"), "gonna": ("gon", "na"), "gotta": ("got", "ta"), "wanna": ("wan", "na"),
    "lemme": ("lem", "me"), "gimme": ("gim", "me"),
}  # fmt: skip


def treebank_words(caption: str) -> list[str]:
    """Close to what Stanford's PTBTokenizer gives for captions (`-preserveLines -lowerCase`), without Java."""
    words: list[str] = []
    for token in _TOKEN.findall(caption.lower().replace("’", "'")):
        words += _SPLIT.get(token, (_BRACKETS.get(token, token),))
    return [word for word in words if word not in _DROPPED and word not in '"“”‘’–—']
