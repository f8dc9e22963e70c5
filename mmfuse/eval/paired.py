"""Two evaluations of the same questions, compared pair by pair."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmfuse.errors import DataError
from mmfuse.eval.scorers import Metric, score_rows
from mmfuse.eval.scoring import is_mean, of_samples
from mmfuse.eval.statistics import Comparison, cluster_sums, compare_means, compare_metrics
from mmfuse.eval.store import read_records

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Paired:
    """How two models differ on a task.

    Attributes:
        task: its name.
        metric: that is compared.
        first: of the first model.
        second: of the second one.
        comparison: of the two.
        n: samples that both have answered.
    """

    task: str
    metric: str
    first: float
    second: float
    comparison: Comparison
    n: int


def compare_folders(first: Path, second: Path) -> list[Paired]:
    """Compare two output folders of `mmfuse eval` task by task, on each task's primary metric.

    Raises:
        FileNotFoundError: a folder holds no evaluation.
        DataError: no common task, or a task whose questions differ.
    """
    results = [_results(folder) for folder in (first, second)]
    common = [task for task in results[0] if task in results[1]]
    if not common:
        raise DataError(
            f"{first} and {second} have no task in common: {', '.join(results[0])}; {', '.join(results[1])}"
        )
    for task in common:
        for field in ("questions", "protocol", "scorer"):
            if results[0][task][field] != results[1][task][field]:
                raise DataError(f"task {task}: the two evaluations differ in their {field}; they cannot be paired")
    return [
        paired(task, results[0][task]["scorer"], results[0][task]["protocol"], _rows(first, task), _rows(second, task))
        for task in common
    ]


def paired(task: str, scorer: str, protocol: str, first: Sequence[Row], second: Sequence[Row]) -> Paired:
    """Compare two models' answers to the same samples.

    A sample that one of the models could not be asked is wrong for it where each sample has a score of its own; where
    the metric is one of all samples together, it is left out for both.

    Args:
        task: its name.
        scorer: that of the task.
        protocol: whose rules.
        first: rows with `id`, `prediction`, `target`, `cluster` and the fields of the scorer.
        second: the same samples.

    Raises:
        DataError: other samples, or none that both could be asked.
    """
    rows = [{str(row["id"]): row for row in own} for own in (first, second)]
    if rows[0].keys() != rows[1].keys():
        some = sorted(rows[0].keys() ^ rows[1].keys())[0]
        raise DataError(f"task {task}: only one of the evaluations has scored {some!r}")
    names = list(rows[0])
    both = [name for name in names if not any("error" in own[name] for own in rows)]
    if not both:
        raise DataError(f"task {task}: there is no sample that both models could be asked")
    results = [score_rows(scorer, [own[name] for name in both], protocol) for own in rows]
    metric = next(iter(results[0].metrics))
    values = [of_samples(result.metrics[metric], result.samples) for result in results]
    if all(is_mean(own) and bool((own.counts[:, 1] == 1).all()) for own in values):
        return _means(task, metric, rows, names, values, both)
    sums = [cluster_sums(own.counts, [str(rows[0][name]["cluster"]) for name in both]) for own in values]
    found = compare_metrics(sums[0], sums[1], values[0].value)
    return Paired(task, metric, values[0].total, values[1].total, found, len(both))


def _means(
    task: str,
    metric: str,
    rows: Sequence[Mapping[str, Row]],
    names: Sequence[str],
    values: Sequence[Metric],
    both: Sequence[str],
) -> Paired:
    """The comparison of scores of single samples; those that could not be asked have been scored for neither model."""
    by_name = [dict(zip(both, own.counts[:, 0].tolist(), strict=True)) for own in values]
    lost = [name for name in names if name not in by_name[0]]
    # The other model's answer to a sample that only one could be asked has its score from the evaluation itself.
    for own, found in zip(rows, by_name, strict=True):
        found |= {name: float(own[name]["score"] or 0) if "error" not in own[name] else 0.0 for name in lost}
    before, after = (np.array([found[name] for name in names]) for found in by_name)
    compared = compare_means(before, after, [str(rows[0][name]["cluster"]) for name in names])
    return Paired(task, metric, float(before.mean()), float(after.mean()), compared, len(names))


def _results(folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; expected the --out folder of `mmfuse eval`")
    tasks: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["tasks"]
    return tasks


def _rows(folder: Path, task: str) -> list[dict[str, Any]]:
    return read_records(folder / "samples" / f"{task}.jsonl")
