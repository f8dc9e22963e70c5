"""From answers to numbers: the scorer's metrics, each with an interval that knows which samples belong together.

Shapes: `N` samples, `K` counts, `G` clusters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mmfuse.errors import RunError
from mmfuse.eval.runner import OnError, Record, TaskRun
from mmfuse.eval.scorers import Metric, Result, Sample, score_rows
from mmfuse.eval.scorers.records import mean, ratio
from mmfuse.eval.statistics import bootstrap_interval, cluster_sums, mean_interval
from mmfuse.eval.tasks.items import Task


@dataclass(frozen=True)
class Estimated:
    """A metric with its 95 % interval.

    Attributes:
        value: over all samples; NaN where it is not defined.
        low: where the interval begins; NaN if there is none.
        high: where it ends.
        error: the standard error; NaN if there is none.
        method: see `mmfuse.eval.statistics.Interval`.
        clusters: how many independent groups of samples it rests on.
    """

    value: float
    low: float
    high: float
    error: float
    method: str
    clusters: int


@dataclass(frozen=True)
class TaskScore:
    """The scores of a task.

    Attributes:
        run: what was asked and answered.
        result: what the scorer says of each scored sample, in order.
        scored: the records that the scorer saw.
        metrics: by name, the primary one first.
        warnings: what a reader of the numbers has to know.
    """

    run: TaskRun
    result: Result
    scored: tuple[Record, ...]
    metrics: dict[str, Estimated]
    warnings: tuple[str, ...]

    @property
    def primary(self) -> tuple[str, Estimated]:
        """The name and value of the metric that is quoted."""
        return next(iter(self.metrics.items()))

    @property
    def unparsed_rate(self) -> float:
        """The share of scored samples whose prediction could not be read."""
        return sum(sample.parsed is None for sample in self.result.samples) / len(self.result.samples)


def score_run(run: TaskRun, on_error: OnError = "wrong") -> TaskScore:
    """Score the answers of a task.

    Samples that could not be asked have no prediction that a scorer could read; some scorers would even take an empty
    one as right. Under `wrong` they enter the primary metric and its categories as wrong, and no other metric.

    Raises:
        RunError: not one sample could be asked.
        DataError: rows that the scorer cannot use.
    """
    task = run.task
    usable = tuple(record for record in run.records if "error" not in record)
    if not usable:
        raise RunError(f"task {task.name}: none of {len(run.records)} samples could be asked; "
                       f"the first: {run.records[0]['id']}: {run.records[0]['error']}")  # fmt: skip
    result = score_rows(task.scorer, usable, task.protocol)
    clusters = [str(record["cluster"]) for record in usable]
    primary = next(iter(result.metrics))
    warnings = list(result.warnings)
    metrics = {}
    for name, metric in result.metrics.items():
        own, groups = of_samples(metric, result.samples) if name == primary else metric, clusters
        if on_error == "wrong" and run.errors and name.split("/")[0] == primary:
            category = name.partition("/")[2]
            wrong = [r for r in run.errors if not category or str(r["category"]) == category]
            own, groups = _with_wrong(metric, len(wrong)), clusters + [str(record["cluster"]) for record in wrong]
        metrics[name] = estimate(own, groups)
    metrics |= {name: Estimated(value, math.nan, math.nan, math.nan, "none", 0) for name, value in result.fixed.items()}
    if run.errors:
        counted = on_error == "wrong" and is_mean(of_samples(result.metrics[primary], result.samples))
        how = "count as wrong in the primary metric" if counted else "are left out"
        warnings.append(f"{len(run.errors)} of {len(run.records)} samples could not be asked and {how}")
    return TaskScore(run, result, usable, metrics, tuple(warnings))


def judge(task: Task, records: Sequence[Record]) -> tuple[float | None, int]:
    """The mean score of some answers and how many could not be read, for the running display."""
    samples = score_rows(task.scorer, records, task.protocol).samples
    scores = [sample.score for sample in samples if sample.score is not None]
    unparsed = sum(sample.parsed is None for sample in samples)
    return (sum(scores) / len(scores) if scores else None), unparsed


def estimate(metric: Metric, clusters: Sequence[str]) -> Estimated:
    """A metric with its interval: clustered for a mean, by bootstrap over clusters for another function of the counts.

    Args:
        metric: counts `[N, K]`.
        clusters: of each sample `[N]`.
    """
    counts = np.asarray(metric.counts, dtype=np.float64)
    value = metric.total
    if is_mean(metric):
        asked = counts[:, 1] > 0
        if not asked.any():
            return Estimated(value, math.nan, math.nan, math.nan, "none", 0)
        own = [name for name, kept in zip(clusters, asked, strict=True) if kept]
        found = mean_interval(counts[asked, 0], own, binary=metric.bounded)
    else:
        found = bootstrap_interval(cluster_sums(counts, clusters), metric.value)
    return Estimated(value, found.low, found.high, found.error, found.method, found.clusters)


def of_samples(metric: Metric, samples: Sequence[Sample]) -> Metric:
    """A mean of zeros and ones that stands among other counts (accuracy beside F1), as the mean of scores."""
    if not metric.bounded or is_mean(metric) or any(sample.score is None for sample in samples):
        return metric
    plain_mean = mean(sample.score for sample in samples)
    return plain_mean if math.isclose(plain_mean.total, metric.total, abs_tol=1e-12) else metric


def is_mean(metric: Metric) -> bool:
    """Whether a metric is the mean of one number for each sample that has one."""
    counts = metric.counts
    return metric.value is ratio and counts.shape[1] == 2 and bool(np.isin(counts[:, 1], (0, 1)).all())


def _with_wrong(metric: Metric, count: int) -> Metric:
    """A mean over samples with so many more that are 0; other metrics as they are."""
    if metric.value is not ratio or metric.counts.shape[1] != 2 or not count:
        # The counts of a corpus metric have no row that means "wrong".
        zeros = np.zeros((count, metric.counts.shape[1]))
        return replace(metric, counts=np.concatenate([metric.counts, zeros]))
    return replace(metric, counts=np.concatenate([metric.counts, np.tile([0.0, 1.0], (count, 1))]))


def plain(score: TaskScore) -> dict[str, Any]:
    """What `results.json` says of a task; numbers that are not defined are null."""
    name, _ = score.primary
    return {
        "protocol": score.run.task.protocol,
        "scorer": score.run.task.scorer,
        "request": str(score.run.task.request),
        "primary": name,
        "n": len(score.run.records),
        "errors": {str(record["id"]): record["error"] for record in score.run.errors},
        "unparsed_rate": score.unparsed_rate,
        "questions": score.run.task.digest,
        "metrics": {
            key: {
                "value": _number(own.value),
                "low": _number(own.low),
                "high": _number(own.high),
                "error": _number(own.error),
                "method": own.method,
                "clusters": own.clusters,
            }
            for key, own in score.metrics.items()
        },
        "warnings": list(score.warnings),
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
