"""Statistics against sums written out, properties, and how often intervals cover what they say."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfuse.eval.scorers.records import ratio
from mmfuse.eval.statistics import (
    bootstrap_interval,
    cluster_sums,
    clustered_error,
    compare_means,
    compare_metrics,
    detectable_difference,
    holm,
    mcnemar,
    mean_interval,
)

SCORES = st.lists(st.tuples(st.floats(0, 1, width=32), st.integers(0, 4)), min_size=2, max_size=40)


def split(scores):
    return np.array([score for score, _ in scores], dtype=float), [str(cluster) for _, cluster in scores]


def f1(sums):
    """From true positives, false positives and false negatives."""
    with np.errstate(invalid="ignore"):
        return 2 * sums[..., 0] / (2 * sums[..., 0] + sums[..., 1] + sums[..., 2])


def error_by_pairs(values, clusters):
    """The oracle: every pair of samples of a cluster, as in Miller's equation 4, times the factor of CR1."""
    mean, total, groups = sum(values) / len(values), 0.0, len(set(clusters))
    for value, cluster in zip(values, clusters, strict=True):
        for other, its in zip(values, clusters, strict=True):
            if cluster == its:
                total += (value - mean) * (other - mean)
    return math.sqrt(max(0.0, total) * groups / (groups - 1)) / len(values)


@given(SCORES)
def test_the_clustered_error_is_the_sum_over_pairs(scores):
    values, clusters = split(scores)
    if len(set(clusters)) == 1:
        assert math.isnan(clustered_error(values, clusters))
    else:
        expected = error_by_pairs(values.tolist(), clusters)
        assert clustered_error(values, clusters) == pytest.approx(expected, rel=1e-6, abs=1e-7)


@given(SCORES, st.randoms(use_true_random=False), st.integers(2, 4))
def test_order_names_and_copies_of_samples_do_not_matter(scores, random, copies):
    values, clusters = split(scores)
    found = mean_interval(values, clusters)
    mixed = scores * copies
    random.shuffle(mixed)
    other_values, other_clusters = split(mixed)
    other = mean_interval(other_values, [f"c{name}" for name in other_clusters])
    assert (other.low, other.high, other.error) == pytest.approx(
        (found.low, found.high, found.error), abs=1e-7, nan_ok=True
    )


@given(SCORES)
def test_swapped_models_have_the_opposite_difference(scores):
    values, clusters = split(scores)
    one, other = compare_means(values, values[::-1], clusters), compare_means(values[::-1], values, clusters)
    assert one.difference == pytest.approx(-other.difference)
    assert one.interval.low == pytest.approx(-other.interval.high, nan_ok=True)
    assert one.p == pytest.approx(other.p, nan_ok=True)


def test_a_paired_comparison_by_hand():
    first = np.array([i % 2 for i in range(10)], dtype=float)
    second = np.array([i % 2 or i < 4 for i in range(10)], dtype=float)
    names = [str(i) for i in range(10)]
    found = compare_means(first, second, names)
    error = (second - first).std(ddof=1) / math.sqrt(10)
    assert found.difference == pytest.approx(0.2) and found.interval.clusters == 10
    assert found.interval.high - found.difference == pytest.approx(2.2621572 * error)
    assert found.p == pytest.approx(0.1679, abs=1e-3)
    assert found.detectable == pytest.approx((2.2621572 + 0.8416212) * error)
    same = compare_means(first, first, names)
    assert (same.interval.low, same.interval.high, same.p) == (-0.1, 0.1, 1.0) and math.isnan(same.detectable)
    assert math.isnan(compare_means(first, second, ["one"] * 10).p)
    assert math.isnan(detectable_difference(0.0, 10))


def test_mcnemar_by_hand():
    first, second = np.array([1, 1, 0, 0, 0, 0, 0.0]), np.array([1, 0, 1, 1, 1, 1, 1.0])
    assert mcnemar(first, second) == pytest.approx(2 * (1 + 6) / 2**6)
    assert mcnemar(first, first) == 1.0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_the_plain_procedure(values):
    adjusted = holm(values)
    for level in (0.01, 0.05, 0.2):
        # Holm's own words: from the smallest on, reject while p <= level / (tests that are left).
        rejected = set()
        for rank, at in enumerate(sorted(range(len(values)), key=lambda at: values[at])):
            if values[at] * (len(values) - rank) > level:
                break
            rejected.add(at)
        assert {at for at, p in enumerate(adjusted) if p <= level} == rejected
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([math.nan, 0.04])[1] == 0.04 and math.isnan(holm([math.nan, 0.04])[0])


def test_few_or_equal_answers_have_wilsons_interval():
    ones = mean_interval(np.ones(12), [str(i // 4) for i in range(12)], binary=True)
    assert (ones.method, ones.clusters) == ("wilson", 3) and ones.low == pytest.approx(0.4385, abs=1e-3)
    always_yes = mean_interval(np.array([0.0, 1.0] * 10), [str(i // 4) for i in range(20)], binary=True)
    assert (always_yes.method, always_yes.clusters) == ("wilson", 5) and always_yes.high - always_yes.low > 0.5
    half = mean_interval(np.array([0.0, 1.0] * 5), [str(i) for i in range(10)], binary=True)
    assert half.method == "wilson" and (half.low, half.high) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert (
        mean_interval(np.array([0.0, 1.0] * 5), [str(i // 3) for i in range(10)], binary=True).method == "clustered t"
    )


def test_a_bootstrap_of_a_mean_is_the_clustered_interval():
    rng = np.random.default_rng(3)
    values, clusters = rng.random(600), [str(i // 3) for i in range(600)]
    sums = cluster_sums(np.stack([values, np.ones(600)], axis=1), clusters)
    found, plain = bootstrap_interval(sums, ratio), mean_interval(values, clusters)
    assert (found.low, found.high) == pytest.approx((plain.low, plain.high), abs=0.004)
    assert found.error == pytest.approx(plain.error, rel=0.06)
    assert bootstrap_interval(sums, ratio) == found, "the same counts have the same interval"


def test_resamples_are_those_of_a_loop():
    sums = np.random.default_rng(0).integers(0, 5, (6, 3)).astype(float)
    times = np.random.default_rng(7).multinomial(6, np.full(6, 1 / 6), size=50)
    plain = []
    for row in times:
        members = [sums[cluster] for cluster, count in enumerate(row) for _ in range(count)]
        plain.append(float(f1(np.sum(members, axis=0))))
    found = bootstrap_interval(sums, f1, resamples=50, seed=7)
    assert found.error == pytest.approx(np.std(plain, ddof=1))
    assert min(plain) <= found.low <= found.high <= max(plain)


def test_a_metric_that_is_mostly_undefined_has_no_interval():
    sums = np.zeros((5, 3))
    sums[0, 0] = 1.0
    assert bootstrap_interval(sums, f1).method == "none"
    assert bootstrap_interval(sums[:1], f1).method == "none"
    assert math.isnan(compare_metrics(sums, sums, f1).p)


def test_metrics_of_two_models_are_compared_over_the_same_clusters():
    rng = np.random.default_rng(1)
    first = rng.integers(1, 6, (80, 3)).astype(float)
    better = first + np.array([2.0, 0.0, 0.0])
    found = compare_metrics(first, better, f1)
    assert found.difference == pytest.approx(float(f1(better.sum(0)) - f1(first.sum(0))))
    assert 0 < found.interval.low < found.difference < found.interval.high and found.p < 0.01
    assert found.interval.high - found.interval.low < 0.5 * (
        bootstrap_interval(first, f1).high - bootstrap_interval(first, f1).low
    ), "what makes a cluster hard cancels"
    assert compare_metrics(first, first, f1).p == 1.0


def drawn(rng, clusters, size):
    """Clusters whose samples are right with a probability of their own, 0.7 on average."""
    right = rng.random((clusters, size)) < rng.beta(2.8, 1.2, clusters)[:, None]
    return right.astype(float)


def coverage_of_mean(runs, seed):
    rng, held = np.random.default_rng(seed), 0
    names = [str(i // 6) for i in range(360)]
    for _ in range(runs):
        found = mean_interval(drawn(rng, 60, 6).ravel(), names, binary=True)
        held += found.low <= 0.7 <= found.high
    return held / runs


def coverage_of_f1(runs, seed):
    """Half of the samples are positive; a sample is answered rightly with the probability of its cluster: F1 is 0.7."""
    rng, held = np.random.default_rng(seed), 0
    for _ in range(runs):
        right = drawn(rng, 100, 6)
        yes, no = right[:, :3], right[:, 3:]
        sums = np.stack([yes.sum(1), (1 - no).sum(1), (1 - yes).sum(1)], axis=1)
        found = bootstrap_interval(sums, f1, resamples=600, seed=int(rng.integers(2**31)))
        held += found.low <= 0.7 <= found.high
    return held / runs


def coverage_of_difference(runs, seed):
    rng, held = np.random.default_rng(seed), 0
    names = [str(i // 6) for i in range(360)]
    for _ in range(runs):
        chance = rng.beta(2.8, 1.2, 60)[:, None]
        first, second = ((rng.random((60, 6)) < p).astype(float).ravel() for p in (chance, 0.9 * chance))
        found = compare_means(first, second, names)
        held += found.interval.low <= -0.07 <= found.interval.high
    return held / runs


def coverage_of_wilson(runs, seed):
    rng, held = np.random.default_rng(seed), 0
    names = [str(i) for i in range(40)]
    for _ in range(runs):
        found = mean_interval((rng.random(40) < 0.85).astype(float), names, binary=True)
        held += found.low <= 0.85 <= found.high
    return held / runs


COVERAGES = [coverage_of_mean, coverage_of_f1, coverage_of_difference, coverage_of_wilson]


@pytest.mark.parametrize("coverage", COVERAGES)
def test_intervals_cover_about_as_often_as_they_say(coverage):
    assert 0.925 <= coverage(400, 0) <= 0.975


@pytest.mark.slow
@pytest.mark.parametrize("coverage", COVERAGES)
def test_intervals_cover_as_often_as_they_say(coverage):
    found = coverage(4000, 1)
    print(f"{coverage.__name__}: {found:.4f}")
    assert 0.93 <= found <= 0.97


@settings(max_examples=20)
@given(st.integers(2, 12), st.integers(0, 100))
def test_a_bootstrap_stays_where_the_metric_lives(groups, seed):
    sums = np.random.default_rng(seed).integers(0, 4, (groups, 3)).astype(float) + 1.0
    found = bootstrap_interval(sums, f1, resamples=100)
    assert 0.0 <= found.low <= found.high <= 1.0
