"""Captions of images and sounds: CIDEr-D, BLEU and ROUGE-L. METEOR and SPICE need Java and are refused by name."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from mmfuse.eval.scorers.records import (
    Counts,
    Metric,
    Result,
    Row,
    Sample,
    clusters,
    identity,
    mean,
    ratio,
    text,
    texts,
)
from mmfuse.eval.text.treebank import treebank_words

Grams = list[Counter[tuple[str, ...]]]

#: The longest n-grams.
LONGEST = 4
#: How fast CIDEr-D forgives a difference in length, in tokens.
_SIGMA = 6.0
#: How much more ROUGE-L weighs recall than precision.
_BETA = 1.2
#: The official BLEU adds these to numerators and denominators, so that no match gives almost 0.
_TINY, _SMALL = 1e-15, 1e-9


def captions(rows: Sequence[Row], protocol: str) -> Result:
    """CIDEr-D (Vedantam et al. 2015), BLEU-1..4 (Papineni et al. 2002) and ROUGE-L (Lin 2004), as COCO computes them.

    `target` is the list of reference captions. `python` cuts texts into words much as Stanford's PTBTokenizer does,
    which the official evaluation runs in Java; `tokenized` takes texts whose tokens are separated by spaces, so that
    the output of that tokenizer can be scored exactly. What is rare is counted over the images that are scored: one
    image alone gives a CIDEr of 0, and scores of subsets cannot be compared. An interval of CIDEr holds these counts
    fixed.
    """
    cut = str.split if protocol == "tokenized" else treebank_words
    said = [cut(text(row)) for row in rows]
    meant = [[cut(reference) for reference in texts(row)] for row in rows]
    scores = cider_d(said, meant)
    samples = tuple(
        Sample(identity(row), score, " ".join(words), "tokens", clusters(row, "image", "image_id"))
        for row, words, score in zip(rows, said, scores, strict=True)
    )
    bleu = np.array([bleu_counts(words, own) for words, own in zip(said, meant, strict=True)])
    metrics = {"cider": mean(scores)}
    metrics |= {f"bleu_{n}": Metric(bleu, _Bleu(n)) for n in range(1, LONGEST + 1)}
    metrics["rouge_l"] = mean(rouge_l(words, own) for words, own in zip(said, meant, strict=True))
    metrics["words_per_caption"] = Metric(np.array([(len(words), 1.0) for words in said]), ratio)
    return Result(samples, metrics, _notes(len(rows)))


def _notes(size: int) -> tuple[str, ...]:
    notes = ["METEOR, SPICE and SPIDEr need Java and are not computed"]
    if size == 1:
        notes.append("one image: no word is rarer than another, so CIDEr is 0")
    return tuple(notes)


def n_grams(words: Sequence[str]) -> Grams:
    """How often each n-gram occurs, for n = 1 .. 4."""
    return [
        Counter(tuple(words[start : start + n]) for start in range(len(words) - n + 1)) for n in range(1, LONGEST + 1)
    ]


def cider_d(said: Sequence[Sequence[str]], meant: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    """CIDEr-D of each caption, 0..10 (exactly 10 for a caption that is its only reference).

    Args:
        said: tokens of the captions.
        meant: tokens of their references.
    """
    documents: Counter[tuple[str, ...]] = Counter()
    references = [[n_grams(words) for words in own] for own in meant]
    for own in references:
        documents.update({gram for grams in own for counts in grams for gram in counts})
    log_size = math.log(len(said))

    def weighed(grams: Grams) -> tuple[list[dict[tuple[str, ...], float]], list[float]]:
        vectors = [
            {gram: count * (log_size - math.log(max(1.0, documents[gram]))) for gram, count in counts.items()}
            for counts in grams
        ]
        return vectors, [math.sqrt(sum(weight**2 for weight in vector.values())) for vector in vectors]

    scores = []
    for words, own in zip(said, references, strict=True):
        given, lengths = weighed(n_grams(words))
        total = 0.0
        for grams in own:
            wanted, wanted_lengths = weighed(grams)
            # The official length is the number of word pairs, one less than that of words.
            apart = grams[1].total() - max(0, len(words) - 1)
            similar = 0.0
            for n in range(LONGEST):
                both = lengths[n] * wanted_lengths[n]
                shared = sum(min(weight, wanted[n].get(gram, 0.0)) * wanted[n].get(gram, 0.0)
                             for gram, weight in given[n].items())  # fmt: skip
                similar += shared / both if both else shared
            total += similar / LONGEST * math.exp(-(apart**2) / (2 * _SIGMA**2))
        scores.append(10 * total / len(own))
    return scores


def bleu_counts(words: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Right n-grams (4), n-grams (4), the length of the caption, and that of the reference closest in length."""
    given = n_grams(words)
    known = [n_grams(reference) for reference in references]
    right = []
    for n in range(LONGEST):
        most: Counter[tuple[str, ...]] = Counter()
        for grams in known:
            most |= grams[n]
        right.append(float((given[n] & most).total()))
    closest = min((abs(len(reference) - len(words)), len(reference)) for reference in references)[1]
    return [*right, *(float(max(0, len(words) - n)) for n in range(LONGEST)), float(len(words)), float(closest)]


class _Bleu:
    """BLEU-n from summed counts `[..., 10]` of `bleu_counts`."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __call__(self, sums: Counts) -> Counts:
        precision = np.ones(sums.shape[:-1])
        for n in range(self.n):
            precision = precision * (sums[..., n] + _TINY) / (sums[..., LONGEST + n] + _SMALL)
        length = (sums[..., 8] + _TINY) / (sums[..., 9] + _SMALL)
        with np.errstate(over="ignore"):
            penalty = np.where(length < 1, np.exp(np.minimum(0.0, 1 - 1 / length)), 1.0)
        return precision ** (1 / self.n) * penalty


def rouge_l(words: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """ROUGE-L with the best precision and the best recall of all references, as the COCO evaluation takes them."""
    # The official code splits at single spaces, so an empty caption has one token, the empty one.
    own = list(words) or [""]
    shared = [(longest_common(own, list(reference) or [""]), len(reference) or 1) for reference in references]
    precision = max(common for common, _ in shared) / len(own)
    recall = max(common / size for common, size in shared)
    if not precision or not recall:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    """The length of the longest common subsequence, row by row in the bits of an integer (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    full = (1 << len(first)) - 1
    open_places = full
    for word in second:
        met = open_places & places.get(word, 0)
        open_places = ((open_places + met) | (open_places - met)) & full
    return len(first) - open_places.bit_count()
