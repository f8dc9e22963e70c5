"""The 25 instructions of IFEval that can be checked by rule (Zhou et al. 2023)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Final

from mmfuse.errors import DataError
from mmfuse.eval.text.objects import treebank_pieces

Settings = Mapping[str, Any]
#: Whether a text follows an instruction; None if that cannot be told here.
Check = Callable[[str, Settings], bool | None]

_WORD: Final = re.compile(r"\w+")
_SENTENCE_END: Final = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s|$)")
_NO_END: Final = re.compile(
    r"(?:\b(?:mr|mrs|ms|dr|st|jr|sr|prof|vs|e\.g|i\.e|inc|ltd|co|a\.m|p\.m)|\b[A-Za-z])\.$", re.I
)
_BOLD: Final = re.compile(r"\*\*[^\n\*]*\*\*")
_ITALIC: Final = re.compile(r"\*[^\n\*]*\*")
_FENCES: Final = ("```json", "```Json", "```JSON", "```")
_CONSTRAINED: Final = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def follows(text: str, instruction: str, settings: Settings) -> bool | None:
    """Whether a text follows an instruction; an empty one never does. None if no language detector is installed.

    Raises:
        DataError: an instruction that does not exist, or a setting that is missing or cannot be used.
    """
    if instruction not in CHECKS:
        raise DataError(f"there is no instruction {instruction!r} in IFEval")
    if not text.strip():
        return False
    try:
        return CHECKS[instruction](text, settings)
    except KeyError as error:
        raise DataError(f"instruction {instruction}: the setting {error} is missing") from error
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise DataError(
            f"instruction {instruction}: settings {dict(settings)!r:.120} cannot be used: {error}"
        ) from error


def sentence_count(text: str) -> int:
    """How many sentences a text has, by its marks. The official code asks NLTK's Punkt model, which is a download."""
    marks = _SENTENCE_END.finditer(text)
    ends = [
        mark
        for mark in marks
        if mark.end() == len(text) or not _NO_END.search(text[max(0, mark.end() - 12) : mark.end()])
    ]
    tail = text[ends[-1].end() :] if ends else text
    return len(ends) + bool(tail.strip())


def detected_language(text: str) -> str | None:
    """The code of the language by langdetect, seeded; "" where it finds no features; None if it is not installed."""
    factory = _detectors()
    if factory is None:
        return None
    from langdetect import LangDetectException

    detector = factory.create()
    detector.seed = 0
    detector.append(text)
    try:
        return str(detector.detect())
    except LangDetectException:
        return ""


@cache
def _detectors() -> Any:
    try:
        from langdetect import PROFILES_DIRECTORY, DetectorFactory
    except ImportError:
        return None
    factory = DetectorFactory()
    factory.load_profile(PROFILES_DIRECTORY)
    return factory


def _compared(count: int, relation: str, limit: Any) -> bool:
    if relation not in ("less than", "at least"):
        raise ValueError(f"the relation must be 'less than' or 'at least', got {relation!r}")
    return count < limit if relation == "less than" else count >= limit


def _is_language(text: str, code: str) -> bool | None:
    found = detected_language(text)
    # Where nothing can be detected (digits, marks) the official code lets it pass.
    return None if found is None else found in ("", code)


def _case(text: str, held: bool) -> bool | None:
    return _is_language(text, "en") if held else False


def _paragraphs(text: str, settings: Settings) -> bool:
    parts = re.split(r"\s?\*\*\*\s?", text)
    if any(not part.strip() for part in parts[1:-1]):
        return False
    ends = parts[:1] + parts[1:][-1:]
    return len(parts) - sum(not part.strip() for part in ends) == settings["num_paragraphs"]


def _first_word(text: str, settings: Settings) -> bool:
    parts = text.split("\n\n")
    count, nth = sum(bool(part.strip()) for part in parts), settings["nth_paragraph"]
    if nth > count or not parts[nth - 1].strip():
        return False
    word = parts[nth - 1].split()[0].lstrip("'").lstrip('"')
    word = re.split(r"[.,?!'\"]", word)[0].lower()
    return count == settings["num_paragraphs"] and word == settings["first_word"].lower()


def _postscript(text: str, settings: Settings) -> bool:
    marker = settings["postscript_marker"].strip()
    known = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return re.search(known.get(marker, marker.lower()), text.lower()) is not None


def _highlights(text: str, settings: Settings) -> bool:
    marked = [part.strip("*") for part in _ITALIC.findall(text)]
    marked += [part.removeprefix("**").removesuffix("**") for part in _BOLD.findall(text)]
    return sum(bool(part.strip()) for part in marked) >= settings["num_highlights"]


def _json(text: str, settings: Settings) -> bool:
    text = text.strip()
    for fence in _FENCES:
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _two_responses(text: str, settings: Settings) -> bool:
    parts = text.split("******")
    if any(not part.strip() for part in parts[1:-1]):
        return False
    held = [part.strip() for part in parts if part.strip()]
    return len(held) == 2 and held[0] != held[1]


def _bullets(text: str, settings: Settings) -> bool:
    stars = re.findall(r"^\s*\*[^\*].*$", text, flags=re.MULTILINE)
    return len(stars) + len(re.findall(r"^\s*-.*$", text, flags=re.MULTILINE)) == settings["num_bullets"]


def _all_found(text: str, settings: Settings) -> bool:
    return all(re.search(word, text, re.IGNORECASE) for word in settings["keywords"])


def _none_found(text: str, settings: Settings) -> bool:
    return not any(re.search(rf"\b{word}\b", text, re.IGNORECASE) for word in settings["forbidden_words"])


def _keyword_frequency(text: str, settings: Settings) -> bool:
    found = re.findall(settings["keyword"].strip(), text, flags=re.IGNORECASE)
    return _compared(len(found), settings["relation"], settings["frequency"])


def _letter_frequency(text: str, settings: Settings) -> bool:
    letter = settings["letter"].strip().lower()
    return _compared(text.lower().count(letter), settings["let_relation"], settings["let_frequency"])


def _capital_words(text: str, settings: Settings) -> bool:
    count = sum(word.isupper() for word in treebank_pieces(text))
    return _compared(count, settings["capital_relation"], settings["capital_frequency"])


def _sections(text: str, settings: Settings) -> bool:
    splitter = settings["section_spliter"].strip()
    return len(re.split(rf"\s?{splitter}\s?\d+\s?", text)) - 1 >= settings["num_sections"]


def _quoted(text: str, settings: Settings) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def _words(text: str, settings: Settings) -> bool:
    return _compared(len(_WORD.findall(text)), settings["relation"], settings["num_words"])


def _sentences(text: str, settings: Settings) -> bool:
    return _compared(sentence_count(text), settings["relation"], settings["num_sentences"])


def _ends(text: str, settings: Settings) -> bool:
    return text.strip().strip('"').lower().endswith(settings["end_phrase"].strip().lower())


def _repeats(text: str, settings: Settings) -> bool:
    return text.strip().lower().startswith(settings["prompt_to_repeat"].strip().lower())


def _title(text: str, settings: Settings) -> bool:
    return any(title.lstrip("<").rstrip(">").strip() for title in re.findall(r"<<[^\n]+>>", text))


CHECKS: Final[dict[str, Check]] = {
    "keywords:existence": _all_found,
    "keywords:frequency": _keyword_frequency,
    "keywords:forbidden_words": _none_found,
    "keywords:letter_frequency": _letter_frequency,
    "language:response_language": lambda text, settings: _is_language(text, settings["language"]),
    "length_constraints:number_sentences": _sentences,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_words": _words,
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:number_placeholders": lambda text, settings: (
        len(re.findall(r"\[.*?\]", text)) >= settings["num_placeholders"]
    ),
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": lambda text, settings: any(form in text for form in _CONSTRAINED),
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeats,
    "startend:end_checker": _ends,
    "startend:quotation": _quoted,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": lambda text, settings: _case(text, text.isupper()),
    "change_case:english_lowercase": lambda text, settings: _case(text, text.islower()),
    "punctuation:no_comma": lambda text, settings: "," not in text,
}
