"""Classes, MUSIC-AVQA, and error rates of transcripts."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, cohen_kappa_score, f1_score

from mmfuse.errors import ConfigError, DataError
from mmfuse.eval.scorers import score_rows

pairs = st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("abc")), min_size=1, max_size=30)


@given(pairs)
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.filterwarnings("ignore:A single label was found")
@pytest.mark.filterwarnings("ignore:invalid value")
def test_class_metrics_are_those_of_scikit_learn(some: list[tuple[str, str]]) -> None:
    rows = [{"id": i, "prediction": said, "target": right} for i, (said, right) in enumerate(some)]
    values = score_rows("classification", rows).values
    said, right = zip(*some, strict=True)
    assert values["weighted_f1"] == pytest.approx(f1_score(right, said, average="weighted", zero_division=0))
    assert values["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(right, said))
    if len(set(said) | set(right)) > 1:
        assert values["kappa"] == pytest.approx(cohen_kappa_score(right, said), nan_ok=True)
    else:
        assert math.isnan(values["kappa"])


def test_scores_of_classes_and_areas() -> None:
    rows = [
        {"id": i, "prediction": [1 - p, p], "classes": ["0", "1"], "target": target, "score": p, "modality": "audio"}
        for i, (p, target) in enumerate([(0.9, "1"), (0.4, "1"), (0.6, "0"), (0.1, "0")])
    ]
    values = score_rows("eeg_classification", rows).values
    found = [values[name] for name in ("accuracy", "accuracy/audio", "auroc", "auprc")]
    assert found == pytest.approx([0.5, 0.5, 0.75, 5 / 6])
    one_class = score_rows("classification", rows[:2])
    assert math.isnan(one_class.values["auroc"])
    assert "one class only" in one_class.warnings[0]


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"prediction": [0.1, 0.2]}, "needs 'classes' with as many names"),
        ({"prediction": [0.1, math.nan], "classes": ["a", "b"]}, "scores must be finite"),
    ],
)
def test_mistakes_in_scores_are_named(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError, match=f"row 1: .*{problem}"):
        score_rows("classification", [{"id": 1, "target": "a", **fields}])


def test_segments() -> None:
    rows = [
        {"id": 1, "prediction": ["dog", "dog", "background"], "target": ["dog", "Background", "background"]},
        {"id": 2, "prediction": ["cat"], "target": ["cat"]},
    ]
    assert score_rows("ave", rows).values == {"segment_accuracy": 0.75}
    with pytest.raises(DataError, match="lists of the same segments"):
        score_rows("ave", [{"id": 1, "prediction": ["dog"], "target": ["dog", "dog"]}])


@pytest.mark.parametrize(
    ("answer", "target", "official", "generation"),
    [
        ("two", "two", 1, 1),
        ("2", "two", 0, 1),
        ("Two.", "two", 0, 1),
        ("11", "more than ten", 0, 1),
        ("acoustic guitar", "acoustic_guitar", 0, 1),
        ("Yes, it is", "yes", 0, 0),
    ],
)
def test_music_avqa(one, answer: str, target: str, official: int, generation: int) -> None:
    assert one("music_avqa", "official", answer, target).score == official
    assert one("music_avqa", "generation", answer, target, type='["Audio", "Counting"]').score == generation


def test_music_avqa_groups() -> None:
    kinds = [["Audio", "Counting"], '["Audio", "Comparative"]', ["Visual", "Location"]]
    rows = [{"id": i, "prediction": "yes", "target": "yes" if i else "no", "type": k} for i, k in enumerate(kinds)]
    values = score_rows("music_avqa", rows).values
    assert (values["accuracy/Audio"], values["accuracy/Audio/Comparative"], values["accuracy/Visual"]) == (0.5, 1, 1)
    with pytest.raises(DataError, match="row 0: 'type' must be a list"):
        score_rows("music_avqa", [{**rows[0], "type": "Audio"}])


@pytest.mark.parametrize(
    ("said", "meant", "words"),
    [
        ("one oh one", "101", 0),
        ("two and a half", "2.5", 0),
        ("uh (laughs) [noise] Mr. Smith", "mister smith", 0),
        ("café", "cafe", 0),
        ("colour", "color", 1),
        ("it won't", "it will not", 0),
    ],
)
def test_whisper_form(said: str, meant: str, words: int) -> None:
    row = {"id": 1, "prediction": said, "target": meant}
    assert score_rows("asr", [row], "whisper_no_spelling").values["wer"] * len(meant.split()) == words
    spelling = {"spelling": json.dumps({"colour": "color"})}
    assert score_rows("asr", [row], "whisper", spelling).values["wer"] == 0


def test_error_rates_are_of_the_corpus() -> None:
    rows = [
        {"id": 1, "prediction": "a b c d e f", "target": "a"},
        {"id": 2, "prediction": "a b c d", "target": "A B c d"},
    ]
    values = score_rows("asr", rows, "plain").values
    assert values["wer"] == 1.0
    assert values["sentence_error_rate"] == 0.5
    empty = [{"id": 1, "prediction": "abc", "target": ""}]
    assert score_rows("asr", empty, "plain").values["wer"] == 1.0
    assert score_rows("asr", [{**empty[0], "prediction": ""}], "plain").values["wer"] == 0.0


def test_the_spelling_table_is_asked_for() -> None:
    row = {"id": 1, "prediction": "a", "target": "a"}
    with pytest.raises(ConfigError, match="needs the resource 'spelling'"):
        score_rows("asr", [row], "whisper")
    with pytest.raises(DataError, match="'spelling' is no JSON"):
        score_rows("asr", [row], "whisper", {"spelling": "{"})


def test_kappa_of_resampled_sums_is_that_of_resampled_rows() -> None:
    rows = [{"id": i, "prediction": "ab"[i % 2], "target": "aab"[i % 3]} for i in range(12)]
    metric = score_rows("classification", rows).metrics["kappa"]
    picks = np.random.default_rng(0).integers(0, 12, (5, 12))
    for pick in picks:
        again = [{**rows[i], "id": n} for n, i in enumerate(pick)]
        expected = score_rows("classification", again).values["kappa"]
        assert float(metric.value(metric.counts[pick].sum(0))) == pytest.approx(expected, nan_ok=True)
