"""Which objects a caption mentions: words, their singular, and a table of synonyms."""

from __future__ import annotations

import re
from typing import Final

#: Pieces of a caption, in the manner of the Penn Treebank: punctuation and clitics apart, hyphens inside words.
_BREAK: Final = re.compile(r"\.(?=[\"')\]]*(?:\s|$))|\.{2,}|[;@#$%&?!()\[\]{}<>\"*…“”«»`]|--|[:,](?!\d)|[:,](?=$)")
_CLITIC: Final = re.compile(r"(?<=\w)('s|'m|'d|'ll|'re|'ve|n't|')(?=\s|$)")

_IRREGULAR: Final = {
    "children": "child", "men": "man", "people": "person", "mice": "mouse", "geese": "goose",
    "feet": "foot", "teeth": "tooth", "leaves": "leaf", "loaves": "loaf", "thieves": "thief", "buses": "bus",
    "dice": "die", "shoes": "shoe",
}  # fmt: skip
#: Words whose end looks like a plural but is none.
_SAME: Final = frozenset(
    ("scissors", "series", "species", "bison", "trout", "salmon", "swine", "news", "luggage", "clippers")
)
#: Plurals in -ies of words in -ie; any other is that of a word in -y.
_IE: Final = ("doggie", "birdie", "cookie", "collie", "hoagie", "veggie", "zombie", "rookie", "auntie")


def treebank_pieces(text: str) -> list[str]:
    """The words and marks of a text."""
    return _CLITIC.sub(r" \1", _BREAK.sub(lambda mark: f" {mark[0]} ", text)).split()


def caption_words(caption: str) -> list[str]:
    """The words and marks of a caption in lower case."""
    return treebank_pieces(caption.lower())


def singular(word: str, *, keep: frozenset[str] = frozenset(), exact: bool = True) -> str:
    """The singular of a lower-case noun, by rule: `glass` becomes `glas`, unless it is in `keep`.

    So does the library that the official CHAIR script uses, which is why "bus" is never found there. With `exact` the
    plurals that it does not know ("doggies", "ties") are kept from their singular here, too.
    """
    if word in keep or word in _SAME or len(word) < 2:
        return word
    if word == "oxen":
        return "ox"
    for plural, one in _IRREGULAR.items():
        if word.endswith(plural):
            return word[: -len(plural)] + one
    if word.endswith("ies"):
        if word[:-1].endswith(_IE):
            return word if exact else word[:-1]
        return word[:-1] if word in ("ties", "pies") and not exact else word[:-3] + "y"
    for ending, cut in (("oes", 2), ("xes", 2), ("ches", 2), ("sses", 2), ("shes", 2)):
        if word.endswith(ending):
            return word[:-cut]
    if word.endswith("ves"):
        if word.endswith(("nives", "lives", "wives")):
            return word[:-3] + "fe"
        return word[:-3] + ("f" if word.endswith(("lves", "rves", "eaves")) else "ve")
    return word[:-1] if word.endswith("s") else word


_ANIMALS: Final = (
    "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub",
)  # fmt: skip
#: Pairs of words that become one, beside the names of two words: an age or a use is no person.
_PAIRS: Final = {
    **{f"{age} {animal}": animal for age in ("baby", "adult") for animal in _ANIMALS},
    **{f"passenger {vehicle}": vehicle for vehicle in ("jet", "train")},
    "home plate": "home plate",
    "train track": "train track",
    "toilet seat": "toilet",
    "wine glas": "wine glass",
}


class ObjectNames:
    """A table of synonyms: each line names an object and, behind commas, the other words for it.

    Args:
        table: the text of the file.
        exact: reproduce the official script to the letter: names with a stray space in front, and those that its
            singular breaks ("bus", "tennis racket"), are never found.
    """

    def __init__(self, table: str, *, exact: bool = True) -> None:
        self._object: dict[str, str] = {}
        for line in table.splitlines():
            names = line.strip().split(", ") if exact else [name.strip() for name in line.split(",")]
            for name in names:
                if name:
                    self._object[name] = names[0]
        doubles = {name.strip(): name.strip() for name in self._object if name.strip().count(" ") == 1}
        # Of the names of two words the official script leaves out this one, and finds the table in it.
        doubles.pop("dining table", None)
        self._pairs = {**doubles, **_PAIRS, "bow tie": "tie"}
        parts = {part for name in self._object for part in name.split()}
        self._exact = exact
        self._keep = frozenset() if exact else frozenset(parts)

    def object(self, name: str) -> str | None:
        """The object that a name stands for; None if it is in no line."""
        return self._object.get(name)

    def mentions(self, caption: str) -> list[tuple[str, str]]:
        """Each mention in order: the word, and the object that it stands for."""
        single = [singular(word, keep=self._keep, exact=self._exact) for word in caption_words(caption)]
        words, place = [], 0
        while place < len(single):
            pair = " ".join(single[place : place + 2])
            words.append(self._pairs.get(pair, single[place]))
            place += 2 if pair in self._pairs else 1
        if "toilet" in words:
            words = [word for word in words if word != "seat"]
        return [(word, self._object[word]) for word in words if word in self._object]
