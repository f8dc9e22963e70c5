"""Intervals over seeds and questions: how well a strategy does, and by how much two strategies differ.

Several runs of a strategy, one for each seed, answer the same questions. That is a crossed design: an answer is right
or wrong because of the seed, because of the question, or because of both. Pooling the answers of all seeds would take
them for independent ones and give intervals that are far too narrow; resampling three seeds (bootstrap) still leaves
them too narrow, because three seeds hardly show their own spread. So the variance of the mean is estimated by the
two-way analysis of variance without replication, both factors random:

    V = (MS_seeds + MS_questions - MS_rest) / (S * Q)

and the interval is the mean ± t * sqrt(V), with Satterthwaite's degrees of freedom. It covers about as often as it says
whether seeds differ little or a lot, at the price of being wide: two seeds that differ say little about a third.
Shapes: `S` seeds, `Q` questions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmfuse.errors import DataError
from mmfuse.eval.scores import Z95, Score
from mmfuse.eval.text import normalise


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval.

    Attributes:
        mean: over seeds and questions.
        low: where the interval begins.
        high: where it ends.
        seeds: how many runs it is made of; with 1 the interval says nothing about other seeds.
        questions: how many questions each of them answered.
    """

    mean: float
    low: float
    high: float
    seeds: int
    questions: int


def read_right(paths: Sequence[str | PathLike[str]]) -> NDArray[np.bool_]:
    """Which answers are right, from the `predictions.jsonl` of several runs: `[S, Q]`, questions in the order of keys.

    Raises:
        DataError: the runs answered other questions, or a key occurs twice.
    """
    runs = [_right_by_key(Path(path)) for path in paths]
    for path, run in zip(paths, runs, strict=True):
        if run.keys() != runs[0].keys():
            some = sorted(run.keys() ^ runs[0].keys())[0]
            raise DataError(f"{path} and {paths[0]} answer different questions: only one of them has {some!r}")
    return np.array([[run[key] for key in sorted(run)] for run in runs], dtype=np.bool_)


def _right_by_key(path: Path) -> dict[str, bool]:
    right: dict[str, bool] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["key"] in right:
            raise DataError(f"{path}: two answers have the key {row['key']!r}; answers are paired by key")
        right[row["key"]] = normalise(row["prediction"]) == normalise(row["answer"])
    return right


def accuracy_interval(right_SQ: NDArray[np.bool_]) -> Estimate:
    """The share of right answers with its interval, which ends at 0 and 1.

    With one seed, and where no answer or every answer is right, it is Wilson's interval over the questions. With one
    seed that ignores that another seed would have given another model.

    Args:
        right_SQ: bool `[S, Q]`, each row a run.

    Raises:
        ValueError: no runs or no questions.
    """
    seeds, questions = _shape(right_SQ)
    mean = float(right_SQ.mean())
    if seeds == 1 or questions == 1 or mean in (0.0, 1.0):
        low, high = Score(questions, round(mean * questions)).interval
    else:
        variance, freedom = mean_variance(right_SQ)
        half = t_quantile(freedom) * math.sqrt(variance)
        low, high = max(0.0, mean - half), min(1.0, mean + half)
    return Estimate(mean, low, high, seeds, questions)


def difference_interval(right_SQ: NDArray[np.bool_], base_SQ: NDArray[np.bool_]) -> Estimate:
    """How much more is right than in `base_SQ`, in -1..1, with its interval.

    Answers are paired by seed and question: the runs of one seed share initial weights and the order of samples, so
    what a hard question or a lucky seed does to both cancels. The interval is that of t; it reaches at least one
    question to both sides, because no difference among `Q` questions is no proof that there is none.

    Args:
        right_SQ: bool `[S, Q]`.
        base_SQ: bool `[S, Q]`, the same seeds and questions in the same order.

    Raises:
        ValueError: the shapes differ, or there are no runs or questions.
    """
    if right_SQ.shape != base_SQ.shape:
        raise ValueError(f"answers {right_SQ.shape} and {base_SQ.shape} (seeds, questions) cannot be paired")
    seeds, questions = _shape(right_SQ)
    difference = right_SQ.astype(float) - base_SQ.astype(float)
    mean, half = float(difference.mean()), 0.0
    if questions > 1:
        variance, freedom = mean_variance(difference)
        half = t_quantile(freedom) * math.sqrt(variance)
    half = max(half, 1 / questions)
    return Estimate(mean, max(-1.0, mean - half), min(1.0, mean + half), seeds, questions)


def mean_variance(values_SQ: NDArray[np.generic]) -> tuple[float, float]:
    """The variance of the mean over seeds and questions, both drawn at random, and its degrees of freedom.

    Components that are estimated as negative count as 0. With one seed only the questions vary.

    Args:
        values_SQ: `[S, Q]`, with two questions or more.
    """
    values = np.asarray(values_SQ, dtype=float)
    seeds, questions = values.shape
    by_question = values.mean(0)
    from_questions = seeds * float(by_question.var(ddof=1))
    if seeds == 1:
        return from_questions / questions, questions - 1.0
    by_seed = values.mean(1)
    rest = values - by_seed[:, None] - by_question + values.mean()
    from_rest = float((rest**2).sum()) / ((seeds - 1) * (questions - 1))
    from_seeds = max(questions * float(by_seed.var(ddof=1)), from_rest)
    from_questions = max(from_questions, from_rest)
    total = from_seeds + from_questions - from_rest
    if total == 0:
        return 0.0, math.inf
    squares = ((from_seeds, seeds - 1), (from_questions, questions - 1), (from_rest, (seeds - 1) * (questions - 1)))
    return total / (seeds * questions), total**2 / sum(square**2 / freedom for square, freedom in squares)


def t_quantile(freedom: float) -> float:
    """The 97.5 % quantile of Student's t; infinitely many degrees of freedom give the normal distribution's."""
    from scipy.special import stdtrit

    return Z95 if math.isinf(freedom) else float(stdtrit(freedom, 0.975))


def _shape(right_SQ: NDArray[np.bool_]) -> tuple[int, int]:
    if right_SQ.ndim != 2 or not right_SQ.size:
        raise ValueError(f"an interval needs answers [seeds, questions], got {list(right_SQ.shape)}")
    return right_SQ.shape[0], right_SQ.shape[1]
