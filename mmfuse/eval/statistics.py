"""How sure a score is: standard errors, intervals and comparisons of samples that come in clusters. Pure functions.

Questions about one image, or windows of one recording, are not independent; what is drawn at random is the cluster.

- A mean has the clustered standard error of Miller (arXiv 2411.00640, equation 4) with the small-sample factor of CR1,
  and Student's t with as many degrees of freedom as there are clusters, less one.
- A function of summed counts (F1, BLEU, word error rate) has the BCa interval of a cluster bootstrap (Efron 1987).
- Few independent zeros and ones, or samples that are all alike, have Wilson's interval (1927).
- Two models that answer the same samples are compared by their differences; several tasks are corrected by Holm (1979).

Shapes: `N` samples, `G` clusters, `K` counts, `R` resamples. All arrays are float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmfuse.eval.intervals import t_quantile
from mmfuse.eval.scores import wilson

Array = NDArray[np.float64]
#: From summed counts `[..., K]` to the metric `[...]`; NaN where it is not defined.
Value = Callable[[Array], Array]

#: Resamples of a bootstrap, and what they are drawn from: the same counts always have the same interval.
RESAMPLES, SEED = 2000, 0
#: Below so many independent zeros and ones a mean has Wilson's interval.
FEW = 50
#: The 80 % quantile of the normal distribution: the power of `detectable_difference`.
POWER = 0.8416212335729143
#: Share of resamples in which the metric may be undefined.
UNDEFINED = 0.05


@dataclass(frozen=True)
class Interval:
    """A 95 % interval.

    Attributes:
        low: where it begins; NaN if there is none.
        high: where it ends.
        error: the standard error; NaN if there is none.
        method: `clustered t`, `cluster bootstrap`, `wilson` or `none`.
        clusters: independent groups of samples that it rests on.
    """

    low: float
    high: float
    error: float
    method: str
    clusters: int


@dataclass(frozen=True)
class Comparison:
    """How the second of two models differs from the first.

    Attributes:
        difference: second minus first.
        interval: of the difference.
        p: two-sided, before `holm`; NaN with fewer than two clusters.
        detectable: the smallest difference that so many clusters would show with 80 % power; NaN if none differs.
    """

    difference: float
    interval: Interval
    p: float
    detectable: float


def cluster_sums(counts_NK: Array, clusters: Sequence[str]) -> Array:
    """The counts of each cluster, `[G, K]`, clusters in the order of their names."""
    place = {name: at for at, name in enumerate(sorted(set(clusters)))}
    sums = np.zeros((len(place), counts_NK.shape[1]))
    np.add.at(sums, [place[name] for name in clusters], counts_NK)
    return sums


def clustered_error(values_N: Array, clusters: Sequence[str]) -> float:
    """The standard error of the mean of `values_N`; NaN with fewer than two clusters."""
    totals = cluster_sums((values_N - values_N.mean())[:, None], clusters)
    groups = len(totals)
    if groups < 2:
        return math.nan
    return math.sqrt(groups / (groups - 1) * float((totals**2).sum())) / len(values_N)


def mean_interval(values_N: Array, clusters: Sequence[str], *, binary: bool = False) -> Interval:
    """The interval of the mean of `values_N`, which begins and ends in 0..1 if the values are `binary`.

    Args:
        values_N: one for each sample.
        clusters: the cluster of each.
        binary: all values are 0 or 1.
    """
    names = set(clusters)
    groups, mean = len(names), float(values_N.mean())
    error = clustered_error(values_N, clusters)
    # Clusters that are all alike (all right, or each half right because only yes is said) show no spread of their own.
    alike = binary and (mean in (0.0, 1.0) or error < 1e-12)
    if alike or (binary and groups == len(values_N) < FEW):
        return Interval(*wilson(mean, groups), error, "wilson", groups)
    if math.isnan(error):
        return Interval(math.nan, math.nan, math.nan, "none", groups)
    half = t_quantile(groups - 1.0) * error
    low, high = mean - half, mean + half
    if binary:
        low, high = max(0.0, low), min(1.0, high)
    return Interval(low, high, error, "clustered t", groups)


def bootstrap_interval(sums_GK: Array, value: Value, *, resamples: int = RESAMPLES, seed: int = SEED) -> Interval:
    """The bias-corrected and accelerated interval of `value` of the summed counts, by resampling clusters.

    Args:
        sums_GK: the counts of each cluster.
        value: from summed counts to the metric.
        resamples: how many.
        seed: of the resamples.
    """
    return _bca(sums_GK, value, _resampled(sums_GK, value, resamples, seed))


def compare_means(first_N: Array, second_N: Array, clusters: Sequence[str]) -> Comparison:
    """Two models' scores of the same samples, by a paired t test over clusters.

    The interval reaches at least one cluster to both sides: no difference among so many is no proof that there is none.
    """
    difference = second_N - first_N
    mean, error = float(difference.mean()), clustered_error(difference, clusters)
    groups = len(set(clusters))
    if groups < 2:
        return Comparison(mean, Interval(math.nan, math.nan, math.nan, "none", groups), math.nan, math.nan)
    half = max(t_quantile(groups - 1.0) * error, 1 / groups)
    interval = Interval(mean - half, mean + half, error, "clustered t", groups)
    return Comparison(mean, interval, _p_value(mean, error, groups), detectable_difference(error, groups))


def compare_metrics(
    first_GK: Array, second_GK: Array, value: Value, *, resamples: int = RESAMPLES, seed: int = SEED
) -> Comparison:
    """Two models' metrics over the same clusters, by resampling clusters for both at once.

    Args:
        first_GK: the counts of each cluster under the first model.
        second_GK: of the same clusters under the second one.
        value: from summed counts to the metric.
        resamples: how many.
        seed: of the resamples.
    """
    width = first_GK.shape[1]

    def both(sums: Array) -> Array:
        return value(sums[..., width:]) - value(sums[..., :width])

    joined = np.concatenate([first_GK, second_GK], axis=1)
    difference, drawn = float(both(joined.sum(0))), _resampled(joined, both, resamples, seed)
    interval = _bca(joined, both, drawn)
    if interval.method == "none":
        return Comparison(difference, interval, math.nan, math.nan)
    tail = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    p = min(1.0, 2 * (tail + 1) / (len(drawn) + 1))
    return Comparison(difference, interval, p, detectable_difference(interval.error, interval.clusters))


def detectable_difference(error: float, clusters: int) -> float:
    """The smallest true difference that a test at 5 % finds with 80 % power; NaN if the error is 0 or undefined."""
    if clusters < 2 or not error > 0:
        return math.nan
    return (t_quantile(clusters - 1.0) + POWER) * error


def mcnemar(first_N: Array, second_N: Array) -> float:
    """The exact two-sided p-value for zeros and ones of independent samples: a sign test of those that differ."""
    from scipy.stats import binomtest

    gained, lost = int((second_N > first_N).sum()), int((second_N < first_N).sum())
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def holm(values: Sequence[float]) -> list[float]:
    """The p-values after Holm's correction for their number; those that are NaN stay so and do not count."""
    order = sorted((at for at, value in enumerate(values) if not math.isnan(value)), key=lambda at: values[at])
    adjusted, largest = [math.nan] * len(values), 0.0
    for rank, at in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * values[at]))
        adjusted[at] = largest
    return adjusted


def _resampled(sums_GK: Array, value: Value, resamples: int, seed: int) -> Array:
    """The metric of each resample that defines it, `[R]`."""
    groups = len(sums_GK)
    if groups < 2:
        return np.zeros(0)
    # How often each cluster is drawn says all about a resample.
    times_RG = np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), size=resamples)
    drawn: Array = np.asarray(value(times_RG @ sums_GK), dtype=np.float64)
    defined: Array = drawn[np.isfinite(drawn)]
    return defined if len(defined) >= (1 - UNDEFINED) * resamples else np.zeros(0)


def _bca(sums_GK: Array, value: Value, drawn: Array) -> Interval:
    """Efron's BCa interval from the metric of resamples, with the jackknife's acceleration."""
    from scipy.special import ndtr, ndtri

    groups = len(sums_GK)
    whole = sums_GK.sum(0)
    found = float(value(whole))
    if not len(drawn) or not math.isfinite(found):
        return Interval(math.nan, math.nan, math.nan, "none", groups)
    # Half of those that equal the estimate count as below it: counts are whole numbers, and ties are common.
    below = ((drawn < found).sum() + 0.5 * (drawn == found).sum()) / len(drawn)
    bias = float(ndtri(np.clip(below, 1 / (len(drawn) + 1), len(drawn) / (len(drawn) + 1))))
    left_out = np.asarray(value(whole - sums_GK), dtype=np.float64)
    lead = np.nanmean(left_out) - left_out[np.isfinite(left_out)]
    spread = float((lead**2).sum())
    acceleration = float((lead**3).sum()) / (6 * spread**1.5) if spread > 0 else 0.0
    ends = bias + ndtri(np.array([0.025, 0.975]))
    low, high = np.quantile(drawn, ndtr(bias + ends / (1 - acceleration * ends)))
    return Interval(float(low), float(high), float(drawn.std(ddof=1)), "cluster bootstrap", groups)


def _p_value(mean: float, error: float, groups: int) -> float:
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    from scipy.special import stdtr

    return float(2 * stdtr(groups - 1, -abs(mean) / error))
