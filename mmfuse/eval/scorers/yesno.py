"""Questions with yes or no: POPE, MME, HallusionBench and the discriminative part of AMBER."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from mmfuse.errors import DataError
from mmfuse.eval.scorers.judges import judge_suffix
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
    unparsed,
    whole_groups,
)
from mmfuse.eval.text import yesno as read

#: The tasks of MME by group.
MME_GROUPS = {
    "perception": (
        "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
    ),
    "cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
}  # fmt: skip

_HALLUSION_JUDGES = ("gpt-4", "gpt-4-0314", "gpt-4-0613")


def label(row: Row) -> str:
    """The target as `yes` or `no`; `true`, `1` and `false`, `0` are understood.

    Raises:
        DataError: it is something else.
    """
    value = text(row, "target").strip().strip(".").lower()
    for name, forms in (("yes", ("yes", "true", "1")), ("no", ("no", "false", "0"))):
        if value in forms:
            return name
    raise DataError(f"row {identity(row)}: 'target' must be yes or no, got {row['target']!r:.80}")


def _read(rows: Sequence[Row], reader: read.YesNoReader, category: str, cluster: Sequence[str]) -> list[Sample]:
    samples = []
    for row in rows:
        said, rule = reader(text(row))
        score = float(said == label(row))
        samples.append(Sample(identity(row), score, said, rule, clusters(row, *cluster), optional(row, category)))
    return samples


def binary_metrics(
    samples: Sequence[Sample], labels: Sequence[str], positive: str = "yes", *, silence_is_missed: bool = True
) -> dict[str, Metric]:
    """Accuracy, precision, recall, F1 and the share of answers `yes`; 0 where a denominator is.

    Args:
        samples: their `parsed` is `yes`, `no` or None.
        labels: `yes` or `no` for each.
        positive: which of them is found or missed.
        silence_is_missed: an answer that cannot be read counts as a positive that was missed.
    """
    rows = []
    for sample, truth in zip(samples, labels, strict=True):
        found = sample.parsed == positive
        missed = truth == positive and not found and (silence_is_missed or sample.parsed is not None)
        hit = found and truth == positive
        rows.append((hit, found and truth != positive, missed))
    counts = np.array(rows, dtype=np.float64).reshape(-1, 3)

    def part(numerator: int, *denominator: int) -> Callable[[Counts], Counts]:
        return lambda sums: _or_zero(sums[..., numerator], sums[..., list(denominator)].sum(-1))

    def f1(sums: Counts) -> Counts:
        # The harmonic mean of precision and recall, without their divisions.
        return _or_zero(2 * sums[..., 0], 2 * sums[..., 0] + sums[..., 1] + sums[..., 2])

    return {
        "accuracy": mean(sample.parsed == truth for sample, truth in zip(samples, labels, strict=True)),
        "precision": Metric(counts, part(0, 0, 1)),
        "recall": Metric(counts, part(0, 0, 2)),
        "f1": Metric(counts, f1),
        "yes_ratio": mean(sample.parsed == "yes" for sample in samples),
    }


def _or_zero(numerator: Counts, denominator: Counts) -> Counts:
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator != 0)


def pope(rows: Sequence[Row], protocol: str) -> Result:
    """POPE (Li et al. 2023): are objects seen that are not there?

    `official` reads everything as yes that has no "no" in its first sentence, "" and "I cannot tell" included;
    `ambiguous_rate` says how many answers were read as yes without saying so. `lmms` wants the bare word, and leaves an
    answer that it cannot read out of recall. (Its own yes ratio counts the labels; here it counts the answers.)
    `vlmevalkit` wants exactly one of the two words. With `category` (`random`, `popular`, `adversarial`) all metrics
    are given for each of them, and the means over the three, which papers quote.
    """
    reader = {
        "official": read.pope_yes_no,
        "lmms": read.exact_yes_no,
        "vlmevalkit": read.vlmevalkit_yes_no,
    }[protocol]
    samples, labels = _read(rows, reader, "category", ("image", "image_source")), [label(row) for row in rows]
    missed = protocol != "lmms"
    metrics = binary_metrics(samples, labels, silence_is_missed=missed)
    if protocol == "official":
        metrics["ambiguous_rate"] = mean(sample.rule == "default" for sample in samples)
    else:
        metrics["unparsed_rate"] = unparsed(samples)
    # A question of several splits, in VLMEvalKit's file, names them all.
    belongs = [set(sample.category.replace(" ", "").split(",")) - {""} for sample in samples]
    splits = list(dict.fromkeys(split for sample in samples for split in sample.category.replace(" ", "").split(",")))
    parts = {}
    for split in filter(None, splits):
        parts[split] = [number for number, own in enumerate(belongs) if split in own]
        inside = binary_metrics(
            [samples[number] for number in parts[split]],
            [labels[number] for number in parts[split]],
            silence_is_missed=missed,
        )
        for name, metric in inside.items():
            metrics[f"{name}/{split}"] = spread(metric, parts[split], len(rows))
    if len(parts) > 1:
        for name in ("accuracy", "f1"):
            metrics[f"{name}_mean"] = average([metrics[f"{name}/{split}"] for split in parts])
    return Result(tuple(samples), metrics, _undefined(samples, labels))


def spread(metric: Metric, places: Sequence[int], size: int) -> Metric:
    """A metric of some samples as one over all `size` of them; the others count nothing."""
    counts = np.zeros((size, metric.counts.shape[1]))
    counts[list(places)] = metric.counts
    return Metric(counts, metric.value, metric.bounded)


def average(metrics: Sequence[Metric]) -> Metric:
    """The plain mean of several metrics over the same samples."""
    ends = np.cumsum([metric.counts.shape[1] for metric in metrics])[:-1]

    def value(sums: Counts) -> Counts:
        parts = np.split(sums, ends, axis=-1)
        return np.mean([metric.value(part) for metric, part in zip(metrics, parts, strict=True)], axis=0)

    return Metric(np.concatenate([metric.counts for metric in metrics], axis=1), value)


def _undefined(samples: Sequence[Sample], labels: Sequence[str]) -> tuple[str, ...]:
    warnings = []
    if not any(sample.parsed == "yes" for sample in samples):
        warnings.append("no answer is yes: precision is not defined and given as 0")
    if "yes" not in labels:
        warnings.append("no label is yes: recall is not defined and given as 0")
    return tuple(warnings)


def mme(rows: Sequence[Row], protocol: str) -> Result:
    """MME (Fu et al. 2023): for each task 100 × accuracy + 100 × accuracy+, summed by group.

    accuracy+ asks for both questions of an image. `perception` sums ten tasks (at most 2000), `cognition` four (800).
    Questions of an image share `image` or `question_id`; without either, two rows of a task that follow each other do.
    """
    reader = {
        "official": read.mme_yes_no,
        "lmms": read.lmms_mme_yes_no,
        "vlmevalkit": read.vlmevalkit_yes_no,
    }[protocol]
    samples = _read(rows, reader, "category", ("image", "question_id"))
    pairs = _pairs(rows)
    scores = [sample.score for sample in samples]
    both = whole_groups(scores, pairs)
    samples = [
        Sample(own.id, own.score, own.parsed, own.rule, own.cluster if own.cluster != own.id else pair, own.category)
        for own, pair in zip(samples, pairs, strict=True)
    ]
    metrics: dict[str, Metric] = {}
    tasks = list(dict.fromkeys(sample.category for sample in samples))
    for group, names in MME_GROUPS.items():
        held = [task for task in tasks if task in names]
        if held:
            metrics[group] = _mme_sum(samples, both, held)
    for task in tasks:
        metrics[f"score/{task}"] = _mme_sum(samples, both, [task])
    metrics["accuracy"] = mean(scores)
    metrics["accuracy_plus"] = mean(both)
    metrics |= {**by_category("accuracy", samples), "unparsed_rate": unparsed(samples)}
    known = [name for names in MME_GROUPS.values() for name in names]
    other = [task for task in tasks if task not in known]
    warnings = (f"no tasks of MME, so in no group: {', '.join(other)}",) if other else ()
    return Result(tuple(samples), metrics, warnings)


def _pairs(rows: Sequence[Row]) -> list[str]:
    pairs, seen = [], dict[str, int]()
    for row in rows:
        task, own = str(required(row, "category")), optional(row, "image", "question_id")
        number = seen[task] = seen.get(task, -1) + 1
        pairs.append(f"{task}/{own or number // 2}")
    for pair, count in Counter(pairs).items():
        if count != 2:
            raise DataError(f"task mme: {pair} has {count} questions, expected 2")
    return pairs


def _mme_sum(samples: Sequence[Sample], both: Sequence[bool | None], tasks: Sequence[str]) -> Metric:
    counts = np.zeros((len(samples), 4 * len(tasks)))
    for row, (sample, pair) in enumerate(zip(samples, both, strict=True)):
        if sample.category in tasks:
            place = 4 * tasks.index(sample.category)
            counts[row, place : place + 2] = sample.score or 0.0, 1.0
            if pair is not None:
                counts[row, place + 2 : place + 4] = float(pair), 1.0

    def value(sums: Counts) -> Counts:
        pairs = sums.reshape(*sums.shape[:-1], -1, 2)
        return 100 * _or_zero(pairs[..., 0], pairs[..., 1]).sum(-1)

    return Metric(counts, value)


def hallusionbench(rows: Sequence[Row], protocol: str) -> Result:
    """HallusionBench (Guan et al. 2023): right answers (`accuracy`), figures and questions all of whose answers are.

    `vlmevalkit` reads yes or no. `official` needs GPT-4's words for each row in `judgement` (and its name in `judge`):
    "correct", "incorrect" or else unclear, which is right where a question of the kind VS comes without its figure; the
    figure accuracy leaves those rows out. `substitute` takes another judge, whose name then stands in the metrics'.
    `figure_accuracy` and `question_accuracy` are the paper's fAcc and qAcc.
    """
    samples, figures, questions = [], [], []
    for row in rows:
        kind, subcategory, group, figure, question = _hallusion_place(row)
        official = protocol != "vlmevalkit"
        blind = kind == "VS" and figure == "0"
        said: str | None
        if official:
            verdict = _verdict(text(row, "judgement"))
            said, rule = verdict, "judge"
            score = float(verdict == "correct" or (blind and verdict == "unclear"))
        else:
            said, rule = read.vlmevalkit_yes_no(text(row))
            score = float(said == label(row))
        place = (kind, subcategory, group) if official else (subcategory, group)
        figures.append("" if official and blind else "_".join((*place, "figure", figure)))
        questions.append("_".join((*place, "question", question)))
        samples.append(Sample(identity(row), score, said, rule, f"{subcategory}_{group}", kind))
    scores = [sample.score for sample in samples]
    suffix = "" if protocol == "vlmevalkit" else judge_suffix(rows, _HALLUSION_JUDGES, protocol, "hallusionbench")
    metrics = {
        f"accuracy{suffix}": mean(scores),
        f"figure_accuracy{suffix}": mean(whole_groups(scores, figures)),
        f"question_accuracy{suffix}": mean(whole_groups(scores, questions)),
        **by_category(f"accuracy{suffix}", samples),
        "unparsed_rate": unparsed(samples),
    }
    return Result(tuple(samples), metrics)


def _hallusion_place(row: Row) -> tuple[str, str, str, str, str]:
    """Kind (VD or VS), subcategory, set, figure and question, from fields or from VLMEvalKit's `index`."""
    parts = optional(row, "index").split("_")
    if row.get("set_id") is None and len(parts) == 6:
        kind, subcategory = optional(row, "category") or parts[0], optional(row, "l2-category") or parts[1]
        return kind, subcategory, parts[3], parts[4], parts[5]
    keys = ("category", "subcategory", "set_id", "figure_id", "question_id")
    kind, subcategory, group, figure, question = (str(required(row, key)) for key in keys)
    return kind, subcategory, group, figure, question


def _verdict(words: str) -> str:
    lowered = words.lower()
    return "incorrect" if "incorrect" in lowered else "correct" if "correct" in lowered else "unclear"


_AMBER_PARTS = {
    "discriminative-hallucination": ("existence",),
    "discriminative-attribute-state": ("attribute", "state"),
    "discriminative-attribute-number": ("attribute", "number"),
    "discriminative-attribute-action": ("attribute", "action"),
    "discriminative-relation": ("relation",),
    "relation": ("relation",),
}


def amber_discriminative(rows: Sequence[Row], protocol: str) -> Result:
    """The questions of AMBER (Wang et al. 2023). "No" is what precision and recall look for.

    `official` takes "Yes" and "No" as exactly these words; `vlmevalkit` reads them and gives accuracies. The official
    script adds 0.001 to denominators and 0.0001 to that of F1 and rounds in between; these numbers are exact.
    """
    reader = read.amber_yes_no if protocol == "official" else read.vlmevalkit_yes_no
    samples, labels = _read(rows, reader, "type", ("image",)), [label(row) for row in rows]
    metrics = binary_metrics(samples, labels, "no")
    kinds = [set(_AMBER_PARTS.get(sample.category, ("other",))) for sample in samples]
    for part in ("existence", "attribute", "state", "number", "action", "relation", "other"):
        inside = [number for number, own in enumerate(kinds) if part in own]
        if inside and any(sample.category for sample in samples):
            own = binary_metrics([samples[number] for number in inside], [labels[number] for number in inside], "no")
            for name in ("accuracy", "precision", "recall", "f1"):
                metrics[f"{name}/{part}"] = spread(own[name], inside, len(rows))
    means = [
        metrics[f"accuracy/{part}"] for part in ("existence", "attribute", "relation") if f"accuracy/{part}" in metrics
    ]
    if len(means) > 1:
        metrics["accuracy_mean"] = average(means)
    metrics["unparsed_rate"] = unparsed(samples)
    return Result(tuple(samples), metrics)
