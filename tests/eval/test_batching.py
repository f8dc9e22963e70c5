from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmfuse.eval.batching import Backoff, plan_batches

LENGTHS = st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=4), min_size=1, max_size=30)


@given(LENGTHS, st.integers(1, 300), st.integers(0, 20), st.none() | st.integers(1, 5))
def test_every_item_is_in_one_batch_and_no_batch_of_several_exceeds_the_budget(lengths, budget, extra, most):
    batches = plan_batches(lengths, budget, extra=extra, most=most)
    assert sorted(item for batch in batches for item in batch.items) == list(range(len(lengths)))
    for batch in batches:
        rows = sum(len(lengths[item]) for item in batch.items)
        widest = max(max(lengths[item]) for item in batch.items) + extra
        assert batch.cost == rows * widest
        assert batch.cost <= budget or len(batch.items) == 1
        assert most is None or len(batch.items) <= most
    widths = [max(lengths[item]) for batch in batches for item in batch.items]
    assert widths == sorted(widths, reverse=True)


def test_batches_are_filled():
    assert [batch.items for batch in plan_batches([[4]] * 5, 8)] == [(0, 1), (2, 3), (4,)]
    assert len(plan_batches([[4]] * 5, 20)) == 1


@pytest.mark.parametrize("budget, most", [(0, None), (5, 0)])
def test_budgets_below_one_are_refused(budget, most):
    with pytest.raises(ValueError, match="at least one item"):
        plan_batches([[1]], budget, most=most)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_batch_that_does_not_fit_is_halved_until_it_does(error):
    seen = []

    def call(items):
        seen.append(len(items))
        if len(items) > 2:
            raise error
        return [item * 10 for item in items]

    backoff = Backoff()
    assert backoff.run(list(range(7)), call) == [0, 10, 20, 30, 40, 50, 60]
    assert seen == [7, 4, 2, 2, 3, 2, 1] and backoff.halved == 3


def test_other_errors_and_a_single_item_that_does_not_fit_are_raised():
    def call(items):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        Backoff().run([1, 2], call)

    def broken(items):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        Backoff().run([1, 2], broken)
