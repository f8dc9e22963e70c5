from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy.stats import t

from mmfuse.errors import DataError
from mmfuse.eval import Score
from mmfuse.eval.intervals import accuracy_interval, difference_interval, mean_variance, read_right, t_quantile

ANSWERS = arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, max_side=12))
PAIRS = array_shapes(min_dims=2, max_dims=2, max_side=8).flatmap(
    lambda shape: st.tuples(arrays(np.bool_, shape), arrays(np.bool_, shape))
)


def test_one_seed_has_the_interval_of_wilson():
    right = np.arange(200)[None] < 150
    found = accuracy_interval(right)
    assert (found.mean, found.seeds, found.questions) == (0.75, 1, 200)
    assert (found.low, found.high) == Score(200, 150).interval


@pytest.mark.parametrize("answer", [True, False])
def test_all_alike_is_no_certainty(answer):
    found = accuracy_interval(np.full((3, 50), answer))
    assert (found.low, found.high) == Score(50, 50 * answer).interval


def test_seeds_that_agree_are_no_more_questions():
    """Three copies of a run say as little as one."""
    run = np.arange(400) % 4 > 0
    variance, freedom = mean_variance(np.stack([run] * 3))
    assert variance == pytest.approx(run.var(ddof=1) / 400)
    assert freedom == pytest.approx(399)


def test_where_only_the_seed_matters_the_interval_is_that_of_t_over_seeds():
    scores = np.array([0.2, 0.5, 0.9, 0.4])
    values = np.repeat(scores[:, None], 1000, axis=1)
    variance, freedom = mean_variance(values)
    assert variance == pytest.approx(scores.var(ddof=1) / 4)
    assert freedom == pytest.approx(3)


def test_independent_answers_have_the_variance_of_independent_answers():
    rng = np.random.default_rng(0)
    found = [mean_variance(rng.random((5, 200)) < 0.7)[0] for _ in range(200)]
    # Components below 0 count as 0, so that the estimate is a little too large.
    assert 0.7 * 0.3 / 1000 < np.mean(found) < 1.5 * 0.7 * 0.3 / 1000


@pytest.mark.parametrize("freedom", [1.0, 2.3, 17.0])
def test_quantile_is_that_of_scipy(freedom):
    assert t_quantile(freedom) == pytest.approx(t.ppf(0.975, freedom))


@pytest.mark.parametrize(("seed_spread", "least"), [(0.0, 0.93), (0.5, 0.90), (1.0, 0.88)])
def test_interval_covers_the_truth_where_pooling_does_not(seed_spread, least):
    """Logits of a right answer are the sum of what the seed and the question give, 3 seeds and 200 questions."""
    rng = np.random.default_rng(1)

    def answers(seeds, questions):
        logits = 2.0 + seed_spread * rng.standard_normal((seeds, 1)) + 1.5 * rng.standard_normal((1, questions))
        return rng.random((seeds, questions)) < 1 / (1 + np.exp(-logits))

    truth = np.mean([answers(400, 400).mean() for _ in range(20)])
    draws = [answers(3, 200) for _ in range(500)]
    found = [accuracy_interval(right) for right in draws]
    pooled = [Score(right.size, int(right.sum())).interval for right in draws]
    assert np.mean([own.low <= truth <= own.high for own in found]) >= least
    assert np.mean([low <= truth <= high for low, high in pooled]) < 0.9


@given(ANSWERS)
def test_interval_holds_the_mean_and_stays_in_range(right):
    found = accuracy_interval(right)
    assert 0.0 <= found.low <= found.mean <= found.high <= 1.0
    assert (found.seeds, found.questions) == right.shape


@given(ANSWERS, st.randoms(use_true_random=False))
def test_order_of_seeds_and_questions_does_not_matter(right, random):
    shuffled = right[random.sample(range(right.shape[0]), right.shape[0])]
    shuffled = shuffled[:, random.sample(range(right.shape[1]), right.shape[1])]
    one, other = accuracy_interval(right), accuracy_interval(shuffled)
    assert (one.low, one.high) == pytest.approx((other.low, other.high), abs=1e-9)


@given(PAIRS)
def test_difference_is_turned_round_by_swapping(pair):
    one, other = difference_interval(*pair), difference_interval(*reversed(pair))
    assert one.mean == -other.mean
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low), abs=1e-12)
    assert -1.0 <= one.low <= one.mean <= one.high <= 1.0


def test_no_difference_among_few_questions_is_no_proof():
    right = np.arange(20)[None] < 12
    found = difference_interval(right, right)
    assert (found.mean, found.low, found.high) == (0.0, -1 / 20, 1 / 20)


def test_pairing_takes_out_what_both_have_in_common():
    """Seeds and questions vary a lot, and one strategy knows 60 answers more whatever the seed."""
    base = np.random.default_rng(0).random(2000) > np.array([0.2, 0.5, 0.8])[:, None]
    base[:, :60] = False
    better = base.copy()
    better[:, :60] = True
    found = difference_interval(better, base)
    assert (found.mean, found.low > 0.02, found.high < 0.04) == (0.03, True, True)
    assert accuracy_interval(better).low < accuracy_interval(base).high, "unpaired, they could not be told apart"


def test_what_cannot_be_paired_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(1, 3\)"):
        difference_interval(np.ones((2, 3), bool), np.ones((1, 3), bool))
    for empty in (np.ones((0, 3), bool), np.ones((2, 0), bool), np.ones(3, bool)):
        with pytest.raises(ValueError, match="needs answers"):
            accuracy_interval(empty)


def write(path, rows):
    lines = [json.dumps({"key": key, "answer": answer, "prediction": said}) for key, answer, said in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_answers_are_paired_by_key(tmp_path):
    one = write(tmp_path / "one.jsonl", [("b", "12", " 12 "), ("a", "Yes", "yes"), ("c", "3", "4")])
    two = write(tmp_path / "two.jsonl", [("c", "3", "3"), ("b", "12", "1 2"), ("a", "Yes", "no")])
    assert read_right([one, two]).tolist() == [[True, True, False], [False, False, True]]


def test_other_questions_and_doubled_keys_are_refused(tmp_path):
    one = write(tmp_path / "one.jsonl", [("a", "1", "1"), ("b", "1", "1")])
    two = write(tmp_path / "two.jsonl", [("a", "1", "1"), ("c", "1", "1")])
    with pytest.raises(DataError, match=r"two\.jsonl and .*one\.jsonl answer different questions: .* has 'b'"):
        read_right([one, two])
    with pytest.raises(DataError, match="two answers have the key 'a'"):
        read_right([write(tmp_path / "twice.jsonl", [("a", "1", "1"), ("a", "1", "1")])])
