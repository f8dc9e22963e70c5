"""Objects that a caption invents: CHAIR and the generative part of AMBER. Both need word lists of the benchmark."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmfuse.errors import DataError
from mmfuse.eval.scorers.records import Metric, Result, Row, Sample, clusters, identity, ratio, required, text
from mmfuse.eval.text.objects import ObjectNames, caption_words, singular


def chair(rows: Sequence[Row], protocol: str, resources: Mapping[str, str]) -> Result:
    """CHAIR (Rohrbach et al. 2018) on COCO images.

    `target` lists the objects in the image (names of COCO's categories or their synonyms); `captions`, if given, are
    the reference captions, whose objects are added, as the official script does. The resource `synonyms` is its
    `synonyms.txt`. `chair_i` is the share of mentions that are not there, `chair_s` that of captions with one, `recall`
    the share of objects there that are mentioned.

    `official` follows the script (in its Python 3 form) where it loses objects: "bus" and "tennis racket" are cut to
    words that no list has, and entries with a stray space are never found. `corrected` finds them.
    """
    names = ObjectNames(resources["synonyms"], exact=protocol == "official")
    samples, counts = [], []
    for row in rows:
        there = _there(row, names)
        mentioned = names.mentions(text(row))
        invented = [word for word, own in mentioned if own not in there]
        found = {own for _, own in mentioned} & there
        sample = Sample(identity(row), float(not invented), ", ".join(invented), "objects", clusters(row, "image"))
        samples.append(sample)
        words = len(text(row).split())
        counts.append((len(invented), len(mentioned), bool(invented), 1, len(found), len(there), words))
    held = np.array(counts, dtype=np.float64)
    metrics = {
        "chair_i": Metric(held[:, [0, 1]], ratio),
        "chair_s": Metric(held[:, [2, 3]], ratio, bounded=True),
        "recall": Metric(held[:, [4, 5]], ratio),
        "mentions_per_caption": Metric(held[:, [1, 3]], ratio),
        "words_per_caption": Metric(held[:, [6, 3]], ratio),
    }
    warnings = () if held[:, 1].any() else ("no caption mentions an object of the table: chair_i is not defined",)
    return Result(tuple(samples), metrics, warnings)


def _there(row: Row, names: ObjectNames) -> set[str]:
    target = required(row, "target")
    if not isinstance(target, list) or not all(isinstance(name, str) for name in target):
        raise DataError(f"row {identity(row)}: 'target' must be the list of objects in the image, got {target!r:.80}")
    there = set()
    for name in target:
        own = names.object(name.strip().lower())
        if own is None:
            raise DataError(f"row {identity(row)}: the object {name!r} is in no line of the table of synonyms")
        there.add(own)
    for caption in row.get("captions") or ():
        there |= {own for _, own in names.mentions(str(caption))}
    return there


def amber_generative(rows: Sequence[Row], protocol: str, resources: Mapping[str, str]) -> Result:
    """Descriptions of AMBER's images (Wang et al. 2023), by exact words; not comparable with published numbers.

    `target` is the annotation `{"truth": […], "hallu": […]}`; the resources are `relation` (relation.json) and
    `safe_words`. The official script takes the nouns that NLTK tags and lets word vectors of spaCy decide what is
    similar. Here every word counts in its singular and nothing is similar but what relation.json says, so the protocol
    is called `exact_words`. `chair`: mentions that are not there; `cover`: objects there that are mentioned; `hal`:
    descriptions with an invented object; `cog`: of the objects that people tend to invent, those that are mentioned.
    """
    relation = _relation(resources["relation"])
    known = set(relation) | {word for others in relation.values() for word in others}
    safe = {line for line in resources["safe_words"].split("\n") if line}
    samples, counts = [], []
    for row in rows:
        truth, tempting = _annotation(row, relation)
        nouns = [word for word in map(_noun, caption_words(text(row))) if word in known]
        covered, felt, invented = set[int](), set[int](), []
        for noun in nouns:
            if noun in safe:
                continue
            place = _place(noun, truth, relation)
            if place is not None:
                covered.add(place)
                continue
            place = _place(noun, tempting, relation)
            if place is not None:
                felt.add(place)
            invented.append(noun)
        samples.append(Sample(identity(row), float(not invented), ", ".join(invented), "words", clusters(row, "image")))
        counts.append(
            (len(invented), len(nouns), len(covered), len(truth), bool(invented), 1, len(felt), len(tempting))
        )
    held = np.array(counts, dtype=np.float64)
    metrics = {
        name: Metric(held[:, 2 * place : 2 * place + 2], ratio, bounded=name == "hal")
        for place, name in enumerate(("chair", "cover", "hal", "cog"))
    }
    return Result(
        tuple(samples), metrics, ("exact words instead of word vectors: not comparable with AMBER's numbers",)
    )


def _noun(word: str) -> str:
    return singular(word, keep=frozenset((word,)) if word.endswith(("ss", "us", "is")) else frozenset(), exact=False)


def _place(noun: str, words: Sequence[str], relation: Mapping[str, Sequence[str]]) -> int | None:
    """Which of `words` a noun means: the first one that it is related to, else the first one that it is."""
    for place, word in enumerate(words):
        if noun in relation[word]:
            return place
    return words.index(noun) if noun in words else None


def _relation(text: str) -> dict[str, list[str]]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"the resource 'relation' is no JSON: {error}") from error
    if not isinstance(value, dict) or not all(isinstance(words, list) for words in value.values()):
        raise DataError("the resource 'relation' must be an object from words to lists of words")
    return value


def _annotation(row: Row, relation: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    target = required(row, "target")
    if not isinstance(target, dict) or not all(isinstance(target.get(key), list) for key in ("truth", "hallu")):
        raise DataError(f"row {identity(row)}: 'target' must have lists 'truth' and 'hallu', got {target!r:.80}")
    for word in (*target["truth"], *target["hallu"]):
        if word not in relation:
            raise DataError(f"row {identity(row)}: the object {word!r} is not in the resource 'relation'")
    return target["truth"], target["hallu"]
