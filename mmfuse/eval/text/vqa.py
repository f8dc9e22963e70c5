"""The answer forms of VQA: that of the VQA evaluation code, of EvalAI (TextVQA and others), and of VLMEvalKit.

All three take punctuation away, write number words as digits, drop articles and put apostrophes back. They differ in
small things that move scores: which commas and periods count, and whether a first pass over the words runs before.
"""

from __future__ import annotations

import re
from typing import Final

#: Words that get their apostrophe back: each is also found with any one of its apostrophes missing.
_CONTRACTIONS: Final = [
    "ain't",
    "aren't",
    "can't",
    "could've",
    "couldn't",
    "couldn't've",
    "didn't",
    "doesn't",
    "don't",
    "hadn't",
    "hadn't've",
    "hasn't",
    "haven't",
    "he'd",
    "he'd've",
    "he's",
    "how'd",
    "how'll",
    "how's",
    "isn't",
    "it'd",
    "it'd've",
    "it'll",
    "ma'am",
    "mightn't",
    "mightn't've",
    "might've",
    "mustn't",
    "must've",
    "needn't",
    "not've",
    "o'clock",
    "oughtn't",
    "'ow's'at",
    "shan't",
    "she'd've",
    "should've",
    "shouldn't",
    "shouldn't've",
    "somebody'd've",
    "somebody'll",
    "somebody's",
    "someone'd",
    "someone'd've",
    "someone'll",
    "someone's",
    "something'd",
    "something'd've",
    "something'll",
    "that's",
    "there'd",
    "there'd've",
    "there're",
    "there's",
    "they'd",
    "they'd've",
    "they'll",
    "they're",
    "they've",
    "'twas",
    "wasn't",
    "we'd've",
    "we've",
    "weren't",
    "what'll",
    "what're",
    "what's",
    "what've",
    "when's",
    "where'd",
    "where's",
    "where've",
    "who'd",
    "who'd've",
    "who'll",
    "who's",
    "who've",
    "why'll",
    "why're",
    "why's",
    "won't",
    "would've",
    "wouldn't",
    "wouldn't've",
    "y'all",
    "y'all'll",
    "y'all'd've",
    "you'd",
    "you'd've",
    "you'll",
    "you're",
    "you've",
]


def _without_one(word: str) -> list[str]:
    return [word[:place] + word[place + 1 :] for place, character in enumerate(word) if character == "'"]


_RESTORED: Final = {
    **{key: word for word in _CONTRACTIONS for key in _without_one(word)},
    # One entry of the official table goes the wrong way round; scores depend on it.
    "somebody'd": "somebodyd",
}
_NUMBERS: Final = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}
_ARTICLES: Final = frozenset(("a", "an", "the"))
_PUNCTUATION: Final = ';/[]"{}()=+\\_-><@`,?!'
_COMMA: Final = re.compile(r"\d,\d")
_EVALAI_COMMA: Final = re.compile(r"\d,+\d")
#: The official look-behind is mistyped, so that a period goes unless a digit follows, whatever stands before it.
_PERIOD: Final = re.compile(r"\.(?!\d)")
_LONE_PERIOD: Final = re.compile(r"(?<!\d)\.(?!\d)")
#: `re.UNICODE` stands where the count belongs, so only this many periods go.
_MOST_PERIODS: Final = 32


def vqa_official(answer: str) -> str:
    """As the VQA evaluation code (GT-Vision-Lab/VQA) does where the ten answers differ."""
    return _words(_punctuation(_one_line(answer), _COMMA, _PERIOD))


def vqa_lmms(answer: str) -> str:
    """As lmms-eval does for VQAv2: the EvalAI rules for punctuation, without the pass over words."""
    return _words(_punctuation(_one_line(answer), _EVALAI_COMMA, _PERIOD))


def vqa_vlmevalkit(answer: str) -> str:
    """As VLMEvalKit does, which also keeps periods that follow a digit."""
    return _words(_punctuation(_one_line(answer), _COMMA, _LONE_PERIOD))


def evalai(answer: str) -> str:
    """As EvalAI's processor (facebookresearch/mmf) does for TextVQA, VizWiz and others."""
    words = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _words(_punctuation(_one_line(words), _EVALAI_COMMA, _PERIOD))


def vlmevalkit_punctuation(text: str) -> str:
    """VLMEvalKit's pass over punctuation alone, which it also uses for yes and no."""
    return _punctuation(text, _COMMA, _LONE_PERIOD)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _punctuation(text: str, comma: re.Pattern[str], period: re.Pattern[str]) -> str:
    """Punctuation next to a space goes, all of it if a number has a comma; what joins two words becomes a space."""
    numeric = comma.search(text) is not None
    out = text
    for mark in _PUNCTUATION:
        beside_space = mark + " " in text or " " + mark in text
        out = out.replace(mark, "" if numeric or beside_space else " ")
    return period.sub("", out, count=_MOST_PERIODS)


def _words(text: str) -> str:
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)
