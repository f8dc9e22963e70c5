"""Two evaluations of the same questions, compared pair by pair."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmfuse.errors import DataError
from mmfuse.eval.intervals import t_quantile
from mmfuse.eval.store import read_records


@dataclass(frozen=True)
class Paired:
    """How two models differ on a task.

    Attributes:
        task: its name.
        first: the mean score of the first model.
        second: the mean score of the second one.
        difference: second minus first.
        low: where the 95 % interval of the difference begins.
        high: where it ends.
        p: of a two-sided paired t test over clusters, before `holm`.
        n: questions.
        clusters: groups of questions that are not independent.
        detectable: the smallest difference that so many clusters would show with 80 % power; NaN if no answers differ.
    """

    task: str
    first: float
    second: float
    difference: float
    low: float
    high: float
    p: float
    n: int
    clusters: int
    detectable: float


def compare_folders(first: Path, second: Path) -> list[Paired]:
    """Compare two output folders of `mmfuse eval` task by task.

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
    return [paired(task, _scores(first, task), _scores(second, task)) for task in common]


def paired(task: str, first: Mapping[str, tuple[float, str]], second: Mapping[str, tuple[float, str]]) -> Paired:
    """Compare two models' scores of the same samples.

    Args:
        task: its name.
        first: by sample the score and the cluster.
        second: the same samples.

    Raises:
        DataError: other samples.
    """
    if first.keys() != second.keys():
        some = sorted(first.keys() ^ second.keys())[0]
        raise DataError(f"task {task}: only one of the evaluations has scored {some!r}")
    names = sorted(first)
    before, after = (np.array([scores[name][0] for name in names]) for scores in (first, second))
    difference = after - before
    mean = float(difference.mean())
    totals: dict[str, float] = {}
    for name, own in zip(names, difference - mean, strict=True):
        totals[first[name][1]] = totals.get(first[name][1], 0.0) + float(own)
    groups = len(totals)
    # The cluster-robust variance of a mean, with the small-sample factor of CR1.
    factor = groups / (groups - 1) if groups > 1 else math.nan
    error = math.sqrt(factor * sum(total**2 for total in totals.values())) / len(names)
    quantile = t_quantile(groups - 1.0) if groups > 1 else math.nan
    # No difference among so many clusters is no proof that there is none.
    half = max(quantile * error, 1 / groups) if groups > 1 else math.nan
    power = 0.8416212335729143  # the 80 % quantile of the normal distribution
    return Paired(
        task=task,
        first=float(before.mean()),
        second=float(after.mean()),
        difference=mean,
        low=mean - half,
        high=mean + half,
        p=_p_value(mean, error, groups),
        n=len(names),
        clusters=groups,
        detectable=(quantile + power) * error if error else math.nan,
    )


def holm(values: Sequence[float]) -> list[float]:
    """The p-values after Holm's correction for their number (1979)."""
    order = sorted(range(len(values)), key=lambda at: values[at])
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, at in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * values[at]))
        adjusted[at] = largest
    return adjusted


def _p_value(mean: float, error: float, groups: int) -> float:
    if groups < 2:
        return math.nan
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    from scipy.special import stdtr

    return float(2 * stdtr(groups - 1, -abs(mean) / error))


def _results(folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; expected the --out folder of `mmfuse eval`")
    tasks: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["tasks"]
    return tasks


def _scores(folder: Path, task: str) -> dict[str, tuple[float, str]]:
    rows = read_records(folder / "samples" / f"{task}.jsonl")
    return {row["id"]: (float(row["score"]), str(row["cluster"])) for row in rows if row["score"] is not None}
