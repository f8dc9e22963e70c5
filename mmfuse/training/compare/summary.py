"""From the runs of a comparison to one row for each strategy."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmfuse.errors import DataError
from mmfuse.eval.intervals import Estimate, accuracy_interval, difference_interval, read_right
from mmfuse.training.compare.runs import Run
from mmfuse.training.measure import Cost
from mmfuse.training.metrics_csv import read_rows

#: `measure(folder)` gives the cost of the run in that folder.
Measure = Callable[[Path], Cost]


@dataclass(frozen=True)
class Scores:
    """What the finished runs of one strategy reached and cost: means over the seeds unless said otherwise.

    Attributes:
        exact_match: over seeds and questions.
        by_seed: exact match of each run.
        difference: to the first strategy, over the seeds that both have; None for the first itself.
        blind_exact_match: of the same models without the image.
        tokens_per_second: in training.
        train_seconds: of all optimizer steps, without validation.
        parameters: of the model.
        cost: of the model of the first seed.
    """

    exact_match: Estimate
    by_seed: list[float]
    difference: Estimate | None
    blind_exact_match: float
    tokens_per_second: float
    train_seconds: float
    parameters: int
    cost: Cost


@dataclass(frozen=True)
class Row:
    """One strategy in the table.

    Attributes:
        label: its name.
        factor: on the config's steps, by the budget.
        steps: that each run makes.
        seeds: of the finished runs.
        failed: seeds of the others.
        scores: of the finished runs; None if there are none.
    """

    label: str
    factor: float
    steps: int
    seeds: list[int]
    failed: list[int]
    scores: Scores | None


def summarise(runs: Sequence[Run], factors: Mapping[str, float], measure: Measure) -> list[Row]:
    """One row for each strategy in the order of `factors`, the first of which the others are compared with.

    Raises:
        DataError: runs that were trained or tested on other data.
    """
    check_same_data([run for run in runs if run.results is not None])
    by_label = {label: [run for run in runs if run.label == label] for label in factors}
    base = {run.seed: run for run in by_label[next(iter(factors))] if run.results is not None}
    rows = []
    for label, own in by_label.items():
        finished = [run for run in own if run.results is not None]
        rows.append(
            Row(
                label=label,
                factor=factors[label],
                steps=own[0].steps,
                seeds=[run.seed for run in finished],
                failed=[run.seed for run in own if run.results is None],
                scores=_scores(finished, base, measure) if finished else None,
            )
        )
    return rows


def check_same_data(runs: Sequence[Run]) -> None:
    """Refuse to compare runs on other data.

    Raises:
        DataError: naming two of them.
    """
    hashes = {run.name: run.results["data_hash"] for run in runs if run.results is not None}
    for name, found in hashes.items():
        first = next(iter(hashes))
        if found != hashes[first]:
            raise DataError(f"{name} was run on other data than {first} (data_hash {found} and {hashes[first]})")


def _scores(finished: Sequence[Run], base: Mapping[int, Run], measure: Measure) -> Scores:
    results = [run.results or {} for run in finished]
    paired = [run for run in finished if run.seed in base and run is not base[run.seed]]
    difference = None
    if paired:
        right = read_right([*(run.predictions for run in paired), *(base[run.seed].predictions for run in paired)])
        difference = difference_interval(right[: len(paired)], right[len(paired) :])
    return Scores(
        exact_match=accuracy_interval(read_right([run.predictions for run in finished])),
        by_seed=[result["exact_match"] for result in results],
        difference=difference,
        blind_exact_match=statistics.fmean(result["blind_exact_match"] for result in results),
        tokens_per_second=statistics.fmean(result["tokens_per_second"] for result in results),
        train_seconds=statistics.fmean(_train_seconds(run) for run in finished),
        parameters=results[0]["parameters"],
        cost=measure(finished[0].folder),
    )


def _train_seconds(run: Run) -> float:
    """Seconds of all optimizer steps; exact where every step was logged."""
    rows = read_rows(run.folder / "metrics.csv")
    seconds = [float(row["train/seconds"]) for row in rows if row.get("train/seconds")]
    return statistics.fmean(seconds) * run.steps if seconds else 0.0
