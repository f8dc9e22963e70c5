"""Caption metrics against plain versions of their definitions."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmfuse.errors import ConfigError
from mmfuse.eval.scorers import find_scorer, score_rows
from mmfuse.eval.scorers.captions import bleu_counts, cider_d, longest_common, rouge_l
from mmfuse.eval.text.treebank import treebank_words

sentences = st.lists(st.sampled_from(["a", "dog", "on", "the", "bus"]), max_size=7)
corpora = st.lists(st.tuples(sentences, st.lists(sentences, min_size=1, max_size=3)), min_size=1, max_size=5)


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A dog, isn't it?", "a dog is n't it"),
        ("The U.S.A. flag (red)", "the u.s.a. flag -lrb- red -rrb-"),
        ("man's t-shirt; 3.5 and 1,000!", "man 's t-shirt 3.5 and 1,000"),
        ("I cannot...", "i can not"),
        ('"Yes"', "yes"),
        ("", ""),
    ],
)
def test_words(caption: str, words: str) -> None:
    assert treebank_words(caption) == words.split()


@given(st.text())
def test_words_are_total_and_whole(caption: str) -> None:
    assert all(word and not any(map(str.isspace, word)) for word in treebank_words(caption))


def plain_common(first: list[str], second: list[str]) -> int:
    row = [0] * (len(second) + 1)
    for word in first:
        above = row
        row = [0]
        for j, other in enumerate(second):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[-1]))
    return row[-1]


@given(sentences, sentences)
def test_longest_common_subsequence(first: list[str], second: list[str]) -> None:
    assert longest_common(first, second) == plain_common(first, second) == longest_common(second, first)


def plain_cider(corpus: list[tuple[list[str], list[list[str]]]]) -> list[float]:
    """The definition, n by n, with dense vectors over all n-grams."""

    def grams(words: list[str], n: int) -> Counter:
        return Counter(zip(*(words[k:] for k in range(n)), strict=False))

    scores = []
    for words, references in corpus:
        total = 0.0
        for n in range(1, 5):
            every = {g for said, own in corpus for text in (said, *own) for g in grams(text, n)}
            seen = {g: sum(any(g in grams(r, n) for r in own) for _, own in corpus) for g in every}
            idf = {g: math.log(len(corpus)) - math.log(max(1, seen[g])) for g in every}
            a = {g: grams(words, n)[g] * idf[g] for g in every}
            for reference in references:
                b = {g: grams(reference, n)[g] * idf[g] for g in every}
                norm = math.sqrt(sum(x * x for x in a.values())) * math.sqrt(sum(x * x for x in b.values()))
                dot = sum(min(a[g], b[g]) * b[g] for g in every)
                apart = max(0, len(words) - 1) - max(0, len(reference) - 1)
                total += (dot / norm if norm else 0.0) * math.exp(-(apart**2) / 72)
        scores.append(10 * total / 4 / len(references))
    return scores


@given(corpora)
def test_cider_is_its_definition(corpus: list[tuple[list[str], list[list[str]]]]) -> None:
    found = cider_d([said for said, _ in corpus], [own for _, own in corpus])
    assert found == pytest.approx(plain_cider(corpus), abs=1e-9)
    assert all(-1e-9 <= score <= 10 + 1e-9 for score in found)


@given(corpora)
def test_bleu_counts_are_clipped(corpus: list[tuple[list[str], list[list[str]]]]) -> None:
    for words, references in corpus:
        counts = bleu_counts(words, references)
        for n in range(1, 5):
            own = Counter(zip(*(words[k:] for k in range(n)), strict=False))
            most = {
                gram: max(Counter(zip(*(r[k:] for k in range(n)), strict=False))[gram] for r in references)
                for gram in own
            }
            assert counts[n - 1] == sum(min(count, most[gram]) for gram, count in own.items())
            assert counts[3 + n] == own.total()
        assert counts[9] in {len(reference) for reference in references}


def test_bleu_and_rouge_by_hand() -> None:
    row = {"id": 1, "prediction": "the the the dog", "target": ["the dog", "a dog on the bus runs"]}
    values = score_rows("coco_captions", [row], "tokenized").values
    assert values["bleu_1"] == pytest.approx(2 / 4)
    assert values["bleu_2"] == pytest.approx(math.sqrt(2 / 4 * 1 / 3), rel=1e-6)
    precision, recall = 2 / 4, 1.0
    assert values["rouge_l"] == pytest.approx(2.44 * precision * recall / (recall + 1.44 * precision))


def test_short_captions_are_punished() -> None:
    row = {"id": 1, "prediction": "a dog", "target": ["a dog on the bus"]}
    assert score_rows("coco_captions", [row], "tokenized").values["bleu_1"] == pytest.approx(math.exp(1 - 5 / 2))
    assert rouge_l([], [["a"]]) == 0.0


def test_one_image_has_no_cider_and_java_metrics_are_named() -> None:
    result = score_rows("clotho", [{"id": 1, "prediction": "A dog.", "target": ["a dog"]}])
    assert result.values["cider"] == 0.0
    assert "METEOR, SPICE and SPIDEr need Java" in result.warnings[0]
    assert "CIDEr is 0" in result.warnings[1]


@pytest.mark.parametrize("name", ["meteor", "SPICE", "spider"])
def test_java_metrics_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(ConfigError, match="Java"):
        find_scorer(name)
