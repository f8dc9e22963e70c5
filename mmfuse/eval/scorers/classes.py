"""One of several classes: sounds and videos (CREMA-D, AVE, VGGSound), EEG windows, and MUSIC-AVQA."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np

from mmfuse.errors import DataError
from mmfuse.eval.scorers.records import (
    Counts,
    Metric,
    Result,
    Row,
    Sample,
    by_category,
    clusters,
    identity,
    mean,
    optional,
    required,
    text,
)
from mmfuse.eval.text import normalise

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def classification(rows: Sequence[Row], protocol: str) -> Result:
    """Accuracy, balanced accuracy, Cohen's κ and weighted F1.

    `target` is a class. `prediction` is a class, or a list of scores with one for each of `classes`, of which the
    highest counts (the first of equals). Texts are compared up to case and whitespace. With `modality` (`audio`,
    `visual`, `audio-visual`) accuracies of each are given. With `score`, the probability of the class `1`, `auroc` and
    `auprc` are added; they are no sums over samples, so they get no interval from them.
    """
    samples, pairs = [], []
    for row in rows:
        wanted, given = normalise(text(row, "target")), _chosen(row)
        pairs.append((given, wanted))
        own = clusters(row, "subject", "video", "image")
        category = optional(row, "modality", "category")
        samples.append(Sample(identity(row), float(given == wanted), given, "class", own, category))
    metrics = {**class_metrics(pairs), **by_category("accuracy", samples)}
    fixed, warnings = _areas(rows)
    return Result(tuple(samples), metrics, warnings, fixed)


def _chosen(row: Row) -> str:
    value = required(row, "prediction")
    if not isinstance(value, list):
        return normalise(text(row))
    names = row.get("classes")
    if not isinstance(names, list) or len(names) != len(value):
        raise DataError(f"row {identity(row)}: a list of scores needs 'classes' with as many names ({len(value)})")
    if not all(isinstance(score, int | float) and math.isfinite(score) for score in value):
        raise DataError(f"row {identity(row)}: scores must be finite numbers, got {value!r:.80}")
    return normalise(str(names[max(range(len(value)), key=value.__getitem__)]))


def class_metrics(pairs: Sequence[tuple[str, str]]) -> dict[str, Metric]:
    """Metrics of (given, wanted) classes from three counts for each class: hits, answers, and samples of it."""
    names = list(dict.fromkeys(name for pair in pairs for name in reversed(pair)))
    place = {name: number for number, name in enumerate(names)}
    counts = np.zeros((len(pairs), 3 * len(names)))
    for row, (given, wanted) in enumerate(pairs):
        counts[row, 3 * place[wanted]] = float(given == wanted)
        counts[row, 3 * place[given] + 1] += 1.0
        counts[row, 3 * place[wanted] + 2] += 1.0
    values = {"balanced_accuracy": _balanced, "kappa": _kappa, "weighted_f1": _weighted_f1}
    return {
        "accuracy": mean(given == wanted for given, wanted in pairs),
        **{name: Metric(counts, value) for name, value in values.items()},
    }


def _parts(sums: Counts) -> tuple[Counts, Counts, Counts]:
    parts = sums.reshape(*sums.shape[:-1], -1, 3)
    return parts[..., 0], parts[..., 1], parts[..., 2]


def _divided(numerator: Counts, denominator: Counts, otherwise: float) -> Counts:
    return np.divide(numerator, denominator, out=np.full_like(numerator, otherwise), where=denominator != 0)


def _balanced(sums: Counts) -> Counts:
    hits, _, size = _parts(sums)
    return _divided(_divided(hits, size, 0.0).sum(-1), (size > 0).sum(-1).astype(np.float64), math.nan)


def _kappa(sums: Counts) -> Counts:
    hits, answers, size = _parts(sums)
    total = size.sum(-1)
    by_chance = (answers * size).sum(-1)
    # Not defined where one class is all that is said and all that is right.
    return _divided(hits.sum(-1) * total - by_chance, total**2 - by_chance, math.nan)


def _weighted_f1(sums: Counts) -> Counts:
    hits, answers, size = _parts(sums)
    return _divided((_divided(2 * hits, answers + size, 0.0) * size).sum(-1), size.sum(-1), math.nan)


def _areas(rows: Sequence[Row]) -> tuple[dict[str, float], tuple[str, ...]]:
    scores = [row.get("score") for row in rows]
    if all(score is None for score in scores):
        return {}, ()
    lacking = next((row for row, score in zip(rows, scores, strict=True) if not isinstance(score, int | float)), None)
    if lacking is not None:
        raise DataError(f"row {identity(lacking)}: 'score' must be a number in every row, got {lacking.get('score')!r}")
    from sklearn.metrics import average_precision_score, roc_auc_score

    labels = [float(normalise(text(row, "target")) == "1") for row in rows]
    if len(set(labels)) < 2:
        return {"auroc": math.nan, "auprc": math.nan}, ("one class only: AUROC and AUPRC are not defined",)
    return {
        "auroc": float(roc_auc_score(labels, scores)),
        "auprc": float(average_precision_score(labels, scores)),
    }, ()


def ave(rows: Sequence[Row], protocol: str) -> Result:
    """AVE localisation (Tian et al. 2018): the share of one-second segments whose class is right.

    `target` and `prediction` are lists of classes, one for each segment, background included.
    """
    samples, counts = [], []
    for row in rows:
        given, wanted = required(row, "prediction"), required(row, "target")
        if not (isinstance(given, list) and isinstance(wanted, list) and len(given) == len(wanted) > 0):
            raise DataError(f"row {identity(row)}: 'prediction' and 'target' must be lists of the same segments")
        right = sum(normalise(str(a)) == normalise(str(b)) for a, b in zip(given, wanted, strict=True))
        counts.append((right, len(wanted)))
        parsed = ", ".join(map(str, given))
        samples.append(Sample(identity(row), right / len(wanted), parsed, "class", clusters(row, "video")))
    held = np.array(counts, dtype=np.float64)
    return Result(tuple(samples), {"segment_accuracy": Metric(held, _share)})


def _share(sums: Counts) -> Counts:
    return _divided(sums[..., 0], sums[..., 1], math.nan)


def music_avqa(rows: Sequence[Row], protocol: str) -> Result:
    """MUSIC-AVQA (Li et al. 2022): accuracy over all questions, for three groups and nine types.

    `official` wants the class itself (the paper's models choose among 42 words). `generation` takes what a language
    model writes: outer punctuation, case and `_` do not count, numbers are words, and more than ten is one answer. The
    official file spells its key `anser` and writes `type` as a JSON list in a string; both are understood.
    """
    samples = []
    groups: list[str] = []
    for row in rows:
        wanted, given = text(row, "target"), text(row)
        if protocol == "generation":
            wanted, given = _spoken(wanted), _spoken(given)
        group, kind = _music_type(row)
        groups.append(group)
        category = f"{group}/{kind}" if group else ""
        own = clusters(row, "video_id")
        samples.append(Sample(identity(row), float(given == wanted), given, "text", own, category))
    metrics = {"accuracy": mean(sample.score for sample in samples)}
    for group in dict.fromkeys(filter(None, groups)):
        pairs = zip(samples, groups, strict=True)
        metrics[f"accuracy/{group}"] = mean(sample.score if own == group else None for sample, own in pairs)
    metrics |= by_category("accuracy", samples)
    return Result(tuple(samples), metrics)


def _spoken(answer: str) -> str:
    words = normalise(answer.replace("_", " ")).strip(" .,!?;:'\"")
    if words.isdecimal():
        number = int(words) if len(words) < 4 else 1000
        words = _DIGITS[number] if number < len(_DIGITS) else "more than ten"
    return words


def _music_type(row: Row) -> tuple[str, str]:
    value = row.get("type")
    if value is None:
        return "", ""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            value = None
    if not isinstance(value, list) or len(value) != 2:
        raise DataError(f'row {identity(row)}: \'type\' must be a list such as ["Audio", "Counting"]')
    return str(value[0]), str(value[1])
