"""Yes or no: what an answer says, by the rules of the benchmarks and harnesses.

Each reader returns `yes`, `no` or None, and the rule that decided.
"""

from __future__ import annotations

from collections.abc import Callable

from mmfuse.eval.text.vqa import vlmevalkit_punctuation

YesNo = tuple[str | None, str]
YesNoReader = Callable[[str], YesNo]


def pope_yes_no(answer: str) -> YesNo:
    """As POPE's own code does: "No", "no" or "not" among the words of the first sentence is no, all else is yes.

    The rule is `default` where the answer is no `no` and has no "yes" in it either.
    """
    words = answer.split(".")[0].replace(",", "").split(" ")
    if {"No", "not", "no"} & set(words):
        return "no", "word"
    return "yes", "word" if "yes" in answer.lower() else "default"


def exact_yes_no(answer: str) -> YesNo:
    """The word alone, in any case, as lmms-eval wants it for POPE: "Yes." is neither."""
    word = answer.lower().strip()
    return (word, "word") if word in ("yes", "no") else (None, "none")


def vlmevalkit_yes_no(answer: str) -> YesNo:
    """As VLMEvalKit does everywhere: exactly one of the words "yes" and "no"."""
    words = vlmevalkit_punctuation(answer.lower()).split()
    said = [word for word in ("yes", "no") if word in words]
    return (said[0], "word") if len(said) == 1 else (None, "none")


def mme_yes_no(answer: str) -> YesNo:
    """As MME's own code does: "yes", else "no" in the first four characters, so "None" and "Not" are no."""
    return _within_four(answer.lower())


def lmms_mme_yes_no(answer: str) -> YesNo:
    """As lmms-eval does for MME: without outer space and periods, and "y" and "n" count."""
    text = answer.lower().strip().replace(".", "")
    if text in ("y", "n"):
        return ("yes" if text == "y" else "no"), "letter"
    return _within_four(text)


def _within_four(text: str) -> YesNo:
    for word in ("yes", "no"):
        if word in text[:4]:
            return word, "word" if text == word else "beginning"
    return None, "none"


def amber_yes_no(answer: str) -> YesNo:
    """As AMBER's own code does: exactly "Yes" or "No"."""
    return (answer.lower(), "word") if answer in ("Yes", "No") else (None, "none")
