"""Which option an answer chooses: the letter that it names, or the option whose text it repeats.

Each reader takes the answer and the options (letter to text, in order) and returns the letter, or None, and the rule
that found it. They are those of the benchmarks and of the two harnesses; scores of one model differ by ten points
between them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Final

#: The letter or None, and the rule by which it was read.
Choice = tuple[str | None, str]
#: Letters with the texts of their options, in order.
Options = Mapping[str, str]
Reader = Callable[[str, Options], Choice]

_NOTHING: Final[Choice] = (None, "none")
_REFUSALS: Final = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_FAILED: Final = "Failed to obtain answer via API"
_NO_WORD: Final = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_ANSWER_IS: Final = re.compile(r"answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
_LONE_LETTER: Final = re.compile(r"\s*\(?([A-Za-z])\)?[.:]?\s*")
_SCIENCE: Final = re.compile(r"The answer is ([A-Z]).")
_FIRST_LETTER: Final = re.compile(r"[\(\s]*([A-Z])", re.IGNORECASE)
_LETTER_PERIOD: Final = re.compile(r"\s*([A-Z])\.")
#: What may surround a letter in lmms-eval's MMBench reader, in the order in which it is tried.
_AROUND: Final = (
    ("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ")."), (":", ""), (":", ","),
    (":", "."), (":", ")"), (":", ")."),
)  # fmt: skip
#: All of them: each is looked for where it occurs first, so a longer one may lead further on.
_PHRASES: Final = (
    "answer is", "the answer is", "correct answer is", "the correct answer is", "best answer is", "the best answer is",
    "correct option is", "the correct option is", "best option is", "the best option is", "choice is", "the choice is",
    "correct choice is", "the correct choice is", "my answer is", "my choice is", "i choose", "i select", "i pick",
    "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは",
)  # fmt: skip


def letter_choice(answer: str, options: Options) -> Choice:
    """A letter alone, in any case, perhaps in parentheses or with a period or colon behind it."""
    match = _LONE_LETTER.fullmatch(answer)
    if match and match[1].upper() in options:
        return match[1].upper(), "letter"
    return _NOTHING


def vlmevalkit_choice(answer: str, options: Options) -> Choice:
    """As VLMEvalKit's exact matching does, which is the official reader of MMBench.

    The one letter that stands alone among the last five words; else a letter behind "answer is"; else the one option
    whose text occurs in an answer that is not much longer than all options. A refusal chooses nothing.
    """
    if _FAILED not in answer:
        if any(refusal in answer for refusal in _REFUSALS):
            return None, "refusal"
        words = answer.translate(_NO_WORD).split()
        named = [letter for letter in options if letter in words]
        if len(named) == 1 and words.index(named[0]) > len(words) - 5:
            return named[0], "letter"
        if not named and "Z" in words:
            return None, "refusal"
        match = _ANSWER_IS.search(answer)
        if match and match[1].upper() in options:
            return match[1].upper(), "answer is"
    lowered = answer.lower()
    if len(lowered) > 2 * sum(map(len, options.values())):
        return _NOTHING
    return _only_text(lowered, options)


def lmms_mmbench_choice(answer: str, options: Options) -> Choice:
    """As lmms-eval does for MMBench without a judge: a letter among the words, an option's text, then `lmms_choice`."""
    if _FAILED not in answer:
        words = answer.split()
        named = [letter for letter in "ABCDE" if letter in words]
        if len(named) == 1 and not ("A" in words and len(words) > 3):
            return named[0], "letter"
        for before, behind in _AROUND:
            named = [letter for letter in "ABCDE" if before + letter + behind in words]
            if len(named) == 1:
                return named[0], "letter"
    letter, rule = _only_text(answer.lower(), options)
    return (letter, rule) if letter else lmms_choice(answer, options)


def _only_text(lowered: str, options: Options) -> Choice:
    held = [letter for letter, text in options.items() if text.lower() in lowered]
    return (held[0], "option text") if len(held) == 1 else _NOTHING


def lmms_choice(answer: str, options: Options) -> Choice:
    """As lmms-eval's shared reader does: the best form in which a letter occurs, the last one of that form.

    From best to worst: at the beginning, at the end, behind a phrase such as "answer is", then `(A)`, `A.`, `A:`,
    `A)`, `A `; if there is none of these, a letter anywhere, even inside a word. Case matters.
    """
    if not answer.strip():
        return _NOTHING
    text = answer.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    text = f" {text} "
    found: list[tuple[int, int, str, str]] = []

    def look_for(rank: int, rule: str, before: str, behind: str) -> None:
        for letter in options:
            place = text.rfind(before + letter + behind)
            if place != -1:
                found.append((rank, place, letter, rule))

    for rank, before, behind in ((6, "(", ")"), (5, "", "."), (4, "", ":"), (3, "", ")"), (2, "", " ")):
        look_for(rank, f"{before}A{behind}", before, behind)
    _behind_phrases(text, options, found)
    core = text.strip()
    for letter in options:
        if core.startswith(letter) and (len(core) == 1 or not core[1].isalpha()):
            found.append((10, 0, letter, "beginning"))
        if core.endswith(letter) and (len(core) == 1 or not core[-2].isalpha()):
            found.append((9, len(text) - 1, letter, "end"))
    if not found:
        look_for(0, "anywhere", "", "")
    if not found:
        return _NOTHING
    _, _, letter, rule = max(found, key=lambda item: item[:2])
    return letter, rule


def _behind_phrases(text: str, options: Options, found: list[tuple[int, int, str, str]]) -> None:
    lowered = text.lower()
    for phrase in _PHRASES:
        place = lowered.find(phrase)
        if place == -1:
            continue
        for letter in options:
            own = text.find(letter, place + len(phrase))
            if own != -1:
                found.append((7, own, letter, "answer is"))


def mmmu_choice(answer: str, options: Options) -> Choice:
    """As MMMU's own code does: the last of `(A)`, else of ` A `, else of the options' texts in an answer of six words.

    The official code then guesses at random; that is left to the scorer.
    """
    return _mmmu(answer, options, (("({})", "({})"), (" {} ", " {} ")))


def lmms_mmmu_choice(answer: str, options: Options) -> Choice:
    """As lmms-eval does for MMMU, which also takes `A ` at the end of a word, and `A.`."""
    # Of several letters it takes the last one with a space on both sides, by whichever form they were found.
    return _mmmu(answer, options, (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")))


def _mmmu(answer: str, options: Options, forms: tuple[tuple[str, str], ...]) -> Choice:
    for mark in ",.!?;:'":
        answer = answer.strip(mark)
    text = f" {answer} "
    for form, place in forms:
        named = [letter for letter in options if form.format(letter) in text]
        if named:
            return max(named, key=lambda letter: text.rfind(place.format(letter))), "letter"
    lowered = text.lower()
    held = [letter for letter, option in options.items() if option.lower() in lowered]
    if held and len(text.split()) > 5:
        return max(held, key=lambda letter: lowered.rfind(options[letter].lower())), "option text"
    return _NOTHING


def scienceqa_choice(answer: str, options: Options) -> Choice:
    """As LLaVA does for ScienceQA: the letter alone, `A. …`, or one "The answer is A." in the text."""
    if answer in options:
        return answer, "letter"
    if len(answer) >= 3 and answer[1:3] == ". " and answer[0] in "ABCDE":
        return (answer[0], "letter") if answer[0] in options else _NOTHING
    found = _SCIENCE.findall(answer)
    return (found[0], "answer is") if len(found) == 1 and found[0] in options else _NOTHING


def lmms_scienceqa_choice(answer: str, options: Options) -> Choice:
    """As lmms-eval does for ScienceQA: the letter alone in any case, or an upper-case letter and a period in front."""
    text = answer.strip()
    letter = text[:1] if len(text) >= 2 and text[0].isupper() and text[1] == "." else text
    return (letter.upper(), "letter") if letter.upper() in options else _NOTHING


def first_character(answer: str, options: Options) -> Choice:
    """The first character that is no space, in any case, as lmms-eval does for SEED-Bench."""
    letter = _lowered(options).get(answer.strip()[:1].lower())
    return (letter, "first character") if letter else _NOTHING


def _lowered(options: Options) -> dict[str, str]:
    return {letter.lower(): letter for letter in options}


def lmms_cv_bench_choice(answer: str, options: Options) -> Choice:
    """The first character behind spaces and opening parentheses, if it is a letter, as lmms-eval does for CV-Bench."""
    match = _FIRST_LETTER.match(answer.strip())
    return (match[1].upper(), "first character") if match and match[1].upper() in options else _NOTHING


def lmms_ai2d_choice(answer: str, options: Options) -> Choice:
    """A letter and a period in front, else the letter alone up to punctuation and case, as lmms-eval does for AI2D."""
    match = _LETTER_PERIOD.match(answer)
    text = (match[1] if match else answer).lower().translate(_ASCII_PUNCTUATION).upper()
    return (text, "letter") if text in options else _NOTHING


_ASCII_PUNCTUATION: Final = str.maketrans("", "", "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")


def mmstar_choice(answer: str, options: Options) -> Choice:
    """As MMStar's own code does: the first character, or the one behind `(`, "option " or "the answer is "."""
    text = answer.lower().strip().replace("\n", " ")
    letters = _lowered(options)
    for start, rule in (
        ("", "first character"),
        ("(", "letter"),
        ("option ", "letter"),
        ("the answer is ", "answer is"),
    ):
        letter = letters.get(text[len(start) : len(start) + 1])
        if text.startswith(start) and letter:
            return letter, rule
    return _NOTHING


def cambrian_choice(answer: str, options: Options) -> Choice:
    """The first character behind the last "answer is", as the evaluation of Cambrian (and so of CV-Bench) does."""
    text = answer.lower().strip()
    for phrase in ("answer is", "answer is:", "answer:"):
        text = text.split(phrase)[-1]
    text = text.strip().rstrip(".:,").lstrip("(").rstrip(")")
    letter = _lowered(options).get(text[:1])
    return (letter, "first character") if letter else _NOTHING


def lmms_mmvp_choice(answer: str, options: Options) -> Choice:
    """A or B by the patterns that lmms-eval tries for MMVP, in any case."""
    text = answer.strip()
    for pattern in _MMVP:
        match = pattern.search(text)
        if match:
            return match[1].upper(), "letter"
    letter = text[:1].upper()
    return (letter, "first character") if letter in ("A", "B") else _NOTHING


_MMVP: Final = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"^\s*\(?([AB])\)?\.?\s*$",
        r"^\s*\(?([AB])\)?[\.\s]",
        r"answer\s+is\s+\(?([AB])\)?",
        r"option\s+\(?([AB])\)?",
        r"\(?([AB])\)?(?:\s|$)",
    )
)
