"""Multiple choice: MMBench (CircularEval), SEED-Bench, AI2D, RealWorldQA, CV-Bench, MMStar, ScienceQA, MMVP, any other.

Rows have their options as a list, as an object from letter to text, or in the columns `A`, `B`, … of the TSV files; the
target is a letter. How the letter is read from an answer is the protocol, see `mmfuse.eval.text.choices`.
"""

from __future__ import annotations

import math
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

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
    mean_of_groups,
    optional,
    required,
    text,
    unparsed,
    whole_groups,
)
from mmfuse.eval.text import choices as read

#: Questions of MMVP (numbered from 1) whose published answers are wrong, with the right ones.
MMVP_CORRECTED = {99: "B", 100: "A", 279: "B", 280: "A"}
_AB = {"A": "", "B": ""}


def options(row: Row) -> dict[str, str]:
    """The options of a row by letter, in order; empty if it has none.

    Raises:
        DataError: `options` is neither a list nor an object of texts, or there are more than 26.
    """
    value = row["options"] if row.get("options") is not None else row.get("choices")
    if value is None:
        # A TSV file leaves what a question does not have empty, which pandas writes as NaN.
        held = {letter: row.get(letter) for letter in string.ascii_uppercase}
        return {letter: str(item) for letter, item in held.items() if item is not None and not _is_nan(item)}
    if isinstance(value, list | tuple) and len(value) <= len(string.ascii_uppercase):
        return {letter: str(item) for letter, item in zip(string.ascii_uppercase, value, strict=False)}
    if isinstance(value, dict):
        return {str(letter): str(item) for letter, item in value.items()}
    raise DataError(
        f"row {identity(row)}: 'options' must be a list of at most 26 texts or an object, got {value!r:.80}"
    )


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def wanted(row: Row, own: dict[str, str]) -> str:
    """The letter of the right option: `target` is the letter, perhaps in parentheses, or its number from 0.

    Raises:
        DataError: it is no letter of an option.
    """
    target = required(row, "target")
    if isinstance(target, int) and not isinstance(target, bool) and 0 <= target < len(own):
        return list(own)[target]
    letter = str(target).strip().strip("()").upper()
    if letter not in own:
        raise DataError(
            f"row {identity(row)}: the target {target!r} is none of the options {', '.join(own) or '(none)'}"
        )
    return letter


def _choose(row: Row, reader: read.Reader, default: str = "") -> Sample:
    own = options(row) or dict.fromkeys(default, "")
    if not own:
        raise DataError(f"row {identity(row)}: the field 'options' is missing")
    letter, rule = reader(text(row), own)
    score = float(letter == wanted(row, own))
    category = optional(row, "category", "question_type", "type")
    return Sample(identity(row), score, letter, rule, clusters(row, "image"), category)


def _plain(samples: Sequence[Sample], warnings: tuple[str, ...] = ()) -> Result:
    metrics = {
        "accuracy": mean(sample.score for sample in samples),
        **by_category("accuracy", samples),
        "unparsed_rate": unparsed(samples),
    }
    return Result(tuple(samples), metrics, warnings)


def multiple_choice(rows: Sequence[Row], protocol: str) -> Result:
    """Any multiple choice: by `letter` (the letter alone), `lmms`, `vlmevalkit`, or `mmmu` without its guesses."""
    reader = {
        "letter": read.letter_choice,
        "lmms": read.lmms_choice,
        "vlmevalkit": read.vlmevalkit_choice,
        "mmmu": read.mmmu_choice,
    }[protocol]
    return _plain([_choose(row, reader) for row in rows])


def ai2d(rows: Sequence[Row], protocol: str) -> Result:
    """AI2D, which publishes no scoring code."""
    reader = read.lmms_ai2d_choice if protocol == "lmms" else read.vlmevalkit_choice
    return _plain([_choose(row, reader, "ABCD") for row in rows])


def scienceqa(rows: Sequence[Row], protocol: str) -> Result:
    """ScienceQA by LLaVA's rules (`official`), which everybody follows, or those of the harnesses.

    Rows with an `image`, or with `has_image`, give `accuracy/image` (ScienceQA-IMG) beside that of the others.
    """
    reader = {
        "official": read.scienceqa_choice,
        "lmms": read.lmms_scienceqa_choice,
        "vlmevalkit": read.vlmevalkit_choice,
    }[protocol]
    samples = [_choose(row, reader, "ABCDE") for row in rows]
    seen = [bool(row.get("has_image", row.get("image"))) for row in rows]
    metrics = {"accuracy": mean(sample.score for sample in samples)}
    if len(set(seen)) > 1:
        pairs = list(zip(samples, seen, strict=True))
        metrics["accuracy/image"] = mean(sample.score if image else None for sample, image in pairs)
        metrics["accuracy/text"] = mean(None if image else sample.score for sample, image in pairs)
    metrics |= {**by_category("accuracy", samples), "unparsed_rate": unparsed(samples)}
    return Result(tuple(samples), metrics)


def realworldqa(rows: Sequence[Row], protocol: str) -> Result:
    """RealWorldQA, which publishes no scoring code. Where the target is no letter, texts are compared."""
    samples = []
    for row in rows:
        target = text(row, "target").strip()
        own = options(row)
        if protocol == "lmms" and target.upper() in ("A", "B", "C", "D"):
            letter, rule = read.lmms_choice(text(row), dict.fromkeys("ABCD", ""))
            score, parsed = letter == target.upper(), letter
        elif protocol == "vlmevalkit" and own:
            parsed, rule = read.vlmevalkit_choice(text(row), own)
            score = parsed == wanted(row, own)
        else:
            given = text(row).lower().strip().rstrip(".")
            score, parsed, rule = given == target.lower(), given, "text"
        category = optional(row, "category")
        samples.append(Sample(identity(row), float(score), parsed, rule, clusters(row, "image"), category))
    return _plain(samples)


def mmstar(rows: Sequence[Row], protocol: str) -> Result:
    """MMStar: `official` and `vlmevalkit` take the mean over questions, `lmms` that over the 18 kinds of question."""
    reader = {
        "official": read.mmstar_choice,
        "lmms": read.lmms_choice,
        "vlmevalkit": read.vlmevalkit_choice,
    }[protocol]
    samples = [_choose(row, reader, "ABCD") for row in rows]
    kinds = [optional(row, "l2_category", "l2-category") for row in rows]
    result = _plain(samples)
    metrics = dict(result.metrics)
    if all(kinds):
        metrics["mean_of_kinds"] = mean_of_groups([sample.score for sample in samples], kinds)
    elif protocol == "lmms":
        raise DataError("task mmstar, protocol lmms: the field 'l2_category' is missing; the score is a mean over it")
    if protocol == "lmms":
        metrics = {"mean_of_kinds": metrics.pop("mean_of_kinds"), **metrics}
    return Result(tuple(samples), metrics)


def cv_bench(rows: Sequence[Row], protocol: str) -> Result:
    """CV-Bench: 2D is the mean of ADE20K and COCO, 3D is Omni3D, and the score is the mean of the two.

    Rows of all sources (the field `source`) are needed for that; otherwise the accuracies of those that are there are
    given. `official` reads answers as the evaluation of Cambrian does.
    """
    reader = {
        "official": read.cambrian_choice,
        "lmms": read.lmms_cv_bench_choice,
        "vlmevalkit": read.vlmevalkit_choice,
    }[protocol]
    samples = [_choose(row, reader, "ABCDEF") for row in rows]
    sources = [optional(row, "source").lower() for row in rows]
    metrics = {"accuracy": mean(sample.score for sample in samples)}
    parts = {"2d": ("ade20k", "coco"), "3d": ("omni3d",)}
    known = {source: dimension for dimension, names in parts.items() for source in names}
    for dimension, names in parts.items():
        if set(names) <= set(sources):
            picked = [
                sample.score if source in names else None for sample, source in zip(samples, sources, strict=True)
            ]
            metrics[f"accuracy/{dimension}"] = mean_of_groups(picked, sources)
    if set(known) <= set(sources):
        metrics = {"cv_bench": _of_dimensions(samples, sources), **metrics}
    for source in dict.fromkeys(filter(None, sources)):
        pairs = zip(samples, sources, strict=True)
        metrics[f"accuracy/{source}"] = mean(sample.score if own == source else None for sample, own in pairs)
    metrics |= {**by_category("accuracy", samples), "unparsed_rate": unparsed(samples)}
    return Result(tuple(samples), metrics)


def _of_dimensions(samples: Sequence[Sample], sources: Sequence[str]) -> Metric:
    names = ("ade20k", "coco", "omni3d")
    counts = np.zeros((len(samples), 6))
    for row, (sample, source) in enumerate(zip(samples, sources, strict=True)):
        if source in names:
            counts[row, 2 * names.index(source) : 2 * names.index(source) + 2] = sample.score or 0.0, 1.0

    def value(sums: Counts) -> Counts:
        with np.errstate(divide="ignore", invalid="ignore"):
            ade, coco, omni = (sums[..., 2 * part] / sums[..., 2 * part + 1] for part in range(3))
        return ((ade + coco) / 2 + omni) / 2

    return Metric(counts, value)


def seedbench(rows: Sequence[Row], protocol: str) -> Result:
    """SEED-Bench. `official` ranks the four answers by likelihood: `prediction` is then the list of their losses.

    A text is taken as the letter itself (as LLaVA's scripts do). `lmms` takes its first character, `vlmevalkit` reads
    the letter. `data_type` (`image`, `video`) and `question_type_id` give accuracies of their own.
    """
    samples = []
    for row in rows:
        own = options(row) or dict.fromkeys("ABCD", "")
        parsed, rule = _seed(row, own, protocol)
        category = optional(row, "data_type", "category")
        score = float(parsed == wanted(row, own))
        samples.append(Sample(identity(row), score, parsed, rule, clusters(row, "image", "data_id"), category))
    metrics = {"accuracy": mean(sample.score for sample in samples), **by_category("accuracy", samples)}
    kinds = [optional(row, "question_type_id") for row in rows]
    for kind in dict.fromkeys(filter(None, kinds)):
        pairs = zip(samples, kinds, strict=True)
        metrics[f"accuracy/{kind}"] = mean(sample.score if own == kind else None for sample, own in pairs)
    metrics["unparsed_rate"] = unparsed(samples)
    return Result(tuple(samples), metrics)


def _seed(row: Row, own: dict[str, str], protocol: str) -> read.Choice:
    given = required(row, "prediction")
    if protocol == "official" and isinstance(given, list):
        letters = list(own)
        if len(given) != len(letters) or not all(isinstance(loss, int | float) and loss == loss for loss in given):
            raise DataError(f"row {identity(row)}: 'prediction' must hold {len(letters)} losses, got {given!r:.80}")
        return letters[min(range(len(given)), key=given.__getitem__)], "lowest loss"
    if protocol == "official":
        return (text(row), "letter") if text(row) in own else (None, "none")
    return (read.first_character if protocol == "lmms" else read.vlmevalkit_choice)(text(row), own)


def mmbench(rows: Sequence[Row], protocol: str) -> Result:
    """MMBench and CCBench: CircularEval, and the plain accuracy of the first rotation beside it.

    A question counts if it is right in every rotation. Rotations have the same `index` up to multiples of 1,000,000, as
    in the official files, or the same `g_index`. Nothing is judged by another model: what cannot be read is wrong
    (VLMEvalKit's exact matching; `official` is the same). `lmms` reads as its static evaluation does.
    """
    reader = read.lmms_mmbench_choice if protocol == "lmms" else read.vlmevalkit_choice
    samples, groups, first = [], [], []
    for row in rows:
        number = _index(row)
        group = _index(row, "g_index") if row.get("g_index") is not None else number % 1_000_000
        groups.append(group)
        first.append(number == group)
        sample = _choose(row, reader)
        samples.append(Sample(sample.id, sample.score, sample.parsed, sample.rule, str(group), sample.category))
    lacking = set(groups) - {group for group, own in zip(groups, first, strict=True) if own}
    if lacking:
        raise DataError(f"task mmbench: question {min(lacking)} has rotations, but no row of its own index")
    whole: dict[int, bool] = {}
    for sample, group in zip(samples, groups, strict=True):
        whole[group] = whole.get(group, True) and sample.score == 1.0
    circular = [whole[group] if own else None for group, own in zip(groups, first, strict=True)]
    metrics = {"circular_accuracy": mean(circular)}
    metrics["accuracy"] = mean(sample.score if own else None for sample, own in zip(samples, first, strict=True))
    for key in ("category", "l2-category"):
        kinds = [optional(row, key) for row in rows]
        for kind in dict.fromkeys(filter(None, kinds)):
            picked = (right if own == kind else None for right, own in zip(circular, kinds, strict=True))
            metrics[f"circular_accuracy/{kind}"] = mean(picked)
    metrics["unparsed_rate"] = unparsed(samples)
    single = len(whole) == len(samples)
    warnings = ("no question has rotations, so CircularEval is the plain accuracy",) if single else ()
    return Result(tuple(samples), metrics, warnings)


def _index(row: Row, key: str = "index") -> int:
    value = row.get(key) if row.get(key) is not None else row["id"]
    try:
        return int(str(value))
    except (TypeError, ValueError):
        raise DataError(f"row {identity(row)}: {key!r} must be a whole number, got {value!r:.80}") from None


def mmvp(rows: Sequence[Row], protocol: str) -> Result:
    """MMVP: a pair of questions counts if both are right. Pairs share `pair`; without it they are consecutive rows.

    The paper lets GPT-4 judge; here the letter is read by the rules of a harness. Four published answers are wrong
    (`MMVP_CORRECTED`, by `index` from 1); rows that carry them are named in a warning.
    """
    reader = read.lmms_mmvp_choice if protocol == "lmms" else read.vlmevalkit_choice
    named = [optional(row, "pair") for row in rows]
    pairs = named if all(named) else [str(number // 2) for number in range(len(rows))]
    samples = []
    for row, pair in zip(rows, pairs, strict=True):
        sample = _choose(row, reader, "AB")
        samples.append(Sample(sample.id, sample.score, sample.parsed, sample.rule, pair, sample.category))
    for pair, count in Counter(pairs).items():
        if count != 2:
            raise DataError(f"task mmvp: pair {pair} has {count} rows, expected 2")
    whole = whole_groups([sample.score for sample in samples], pairs)
    metrics = {
        "pair_accuracy": mean(whole),
        "accuracy": mean(sample.score for sample in samples),
        **by_category("accuracy", samples),
        "unparsed_rate": unparsed(samples),
    }
    return Result(tuple(samples), metrics, _published_errors(rows))


def _published_errors(rows: Sequence[Row]) -> tuple[str, ...]:
    corrected = [MMVP_CORRECTED.get(row["index"]) if isinstance(row.get("index"), int) else None for row in rows]
    pairs = zip(rows, corrected, strict=True)
    wrong = [identity(row) for row, right in pairs if right and wanted(row, options(row) or _AB) != right]
    return (f"published answers that are known to be wrong: rows {', '.join(wrong)}",) if wrong else ()
