"""What goes into a scorer and what comes out: rows with predictions; scores of samples, and sums that give metrics.

A metric is a function of *sums over samples*: each sample contributes a row of counts `[K]` (right and asked; true and
false positives; edits and words), and `value` turns the summed counts into the number. So one form serves accuracies,
F1, κ, BLEU and word error rates, and the statistics can resample or weigh samples without knowing the metric.
Shapes: `N` samples, `K` counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmfuse.errors import DataError

#: One line of a file of predictions: `id`, `prediction`, `target` and the fields of the task.
Row = Mapping[str, Any]
Counts = NDArray[np.float64]
#: From summed counts `[..., K]` to the metric `[...]`; NaN where it is not defined.
Value = Callable[[Counts], Counts]


@dataclass(frozen=True)
class Sample:
    """What a scorer says of one row.

    Attributes:
        id: of the row.
        score: 0..1, or whatever range the metric's own samples have; None if only the whole set has a score.
        parsed: what was read from the prediction; None if nothing could be read.
        rule: by which rule it was read, such as `letter` or `option text`; `none` if nothing could be read.
        cluster: samples of one image, speaker or subject share it.
        category: for the table by category; empty if the task has none.
    """

    id: str
    score: float | None
    parsed: str | None = None
    rule: str = ""
    cluster: str = ""
    category: str = ""


@dataclass(frozen=True)
class Metric:
    """A number over all samples, kept as sums.

    Attributes:
        counts: float64 `[N, K]`, one row for each sample in order. What belongs to a group of samples (both questions
            of a pair) stands in the row of its first sample, and such a group is never spread over clusters.
        value: from summed counts to the number.
        bounded: the metric lies in 0..1 and is the mean of zeros and ones, so that Wilson's interval applies.
    """

    counts: Counts
    value: Value
    bounded: bool = False

    @property
    def total(self) -> float:
        """The metric over all samples; NaN where it is not defined."""
        return float(self.value(self.counts.sum(0)))


@dataclass(frozen=True)
class Result:
    """What a scorer returns.

    Attributes:
        samples: one for each row, in order.
        metrics: by name, the primary one first.
        warnings: what a reader of the numbers has to know, one sentence each.
        fixed: metrics that no sum over samples gives (such as the area under a curve), by name.
    """

    samples: tuple[Sample, ...]
    metrics: dict[str, Metric]
    warnings: tuple[str, ...] = ()
    fixed: dict[str, float] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, float]:
        """All metrics as numbers; NaN where one is not defined."""
        return {**{name: metric.total for name, metric in self.metrics.items()}, **self.fixed}


def ratio(sums: Counts) -> Counts:
    """The first count over the second; NaN if that is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(sums[..., 1] == 0, math.nan, sums[..., 0] / sums[..., 1])


def mean(values: Iterable[float | bool | None]) -> Metric:
    """The mean over the samples that have a value; `None` leaves a sample out."""
    held = list(values)
    counts = [(0.0, 0.0) if value is None else (float(value), 1.0) for value in held]
    binary = all(value is None or float(value) in (0.0, 1.0) for value in held)
    return Metric(np.array(counts, dtype=np.float64).reshape(-1, 2), ratio, bounded=binary)


def by_category(name: str, samples: Sequence[Sample]) -> dict[str, Metric]:
    """The mean score of each category as metrics `name/category`, in order of appearance."""
    categories = dict.fromkeys(sample.category for sample in samples if sample.category)
    return {
        f"{name}/{category}": mean(sample.score if sample.category == category else None for sample in samples)
        for category in categories
    }


def mean_of_groups(values: Sequence[float | bool | None], groups: Sequence[str]) -> Metric:
    """The mean over groups of each group's mean, whatever its size; groups without a value do not count.

    Args:
        values: of the samples; `None` leaves one out.
        groups: the group of each sample.
    """
    places = {group: place for place, group in enumerate(dict.fromkeys(groups))}
    counts = np.zeros((len(values), 2 * len(places)))
    for row, (value, group) in enumerate(zip(values, groups, strict=True)):
        if value is not None:
            counts[row, 2 * places[group] : 2 * places[group] + 2] = float(value), 1.0

    def value_of(sums: Counts) -> Counts:
        pairs = sums.reshape(*sums.shape[:-1], -1, 2)
        held = pairs[..., 1] > 0
        means = np.divide(pairs[..., 0], pairs[..., 1], out=np.zeros_like(pairs[..., 0]), where=held)
        return ratio(np.stack([means.sum(-1), held.sum(-1)], -1))

    return Metric(counts, value_of)


def whole_groups(scores: Sequence[float | None], groups: Sequence[str]) -> list[bool | None]:
    """For the first sample of each group, whether all samples of the group score 1; None for all others.

    Args:
        scores: of the samples.
        groups: the group of each sample; a sample with an empty one belongs to none.
    """
    whole: dict[str, bool] = {}
    for score, group in zip(scores, groups, strict=True):
        whole[group] = whole.get(group, True) and score == 1.0
    whole.pop("", None)
    return [whole.pop(group, None) for group in groups]


def unparsed(samples: Sequence[Sample]) -> Metric:
    """The share of samples whose prediction could not be read."""
    return mean(sample.parsed is None for sample in samples)


def identity(row: Row) -> str:
    """The id of a row as text.

    Raises:
        DataError: there is none.
    """
    if row.get("id") is None or isinstance(row["id"], dict | list):
        raise DataError(f"a row has no id: {dict(row)!r:.200}")
    return str(row["id"])


def required(row: Row, key: str) -> Any:
    """The value of a field that must be there.

    Raises:
        DataError: it is missing or null, with the row's id and the field's name.
    """
    if row.get(key) is None:
        raise DataError(f"row {identity(row)}: the field {key!r} is missing")
    return row[key]


def text(row: Row, key: str = "prediction") -> str:
    """A field that must be there as text; numbers and truth values are written as JSON does.

    Raises:
        DataError: it is missing, or a list or an object.
    """
    value = required(row, key)
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str | int | float):
        raise DataError(f"row {identity(row)}: {key!r} must be text, got {value!r:.80}")
    return str(value)


def texts(row: Row, key: str = "target") -> list[str]:
    """A field that holds one text or a list of at least one.

    Raises:
        DataError: it is missing, empty, or holds something else.
    """
    value = required(row, key)
    items = value if isinstance(value, list | tuple) else [value]
    if not items or not all(isinstance(item, str | int | float) for item in items):
        raise DataError(f"row {identity(row)}: {key!r} must be text or a list of texts, got {value!r:.80}")
    return [str(item) for item in items]


def optional(row: Row, *keys: str) -> str:
    """The first of the fields that the row has, as text; empty if it has none of them."""
    return next((str(row[key]) for key in keys if row.get(key) is not None), "")


def clusters(row: Row, *keys: str) -> str:
    """What the row shares with others that are not independent of it.

    That is the field `cluster` if there is one, else the first of `keys` (such as the image), else the row's own id.
    """
    return optional(row, "cluster", *keys) or identity(row)
