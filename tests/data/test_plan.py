from __future__ import annotations

import math
import pickle
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from mmfuse.data import BatchPlan, MixtureDataset, Sample, SampleIndex, StagePlan
from mmfuse.errors import ConfigError

SIZES = {"align": 7, "instruct": 20, "text": 3}
STAGES = [
    StagePlan({"align": 1.0}, 5),
    StagePlan({"instruct": 3, "align": 1, "text": 0.5}, 9),
    StagePlan({"text": 0, "instruct": 1}, 4),
]

weights = st.dictionaries(st.sampled_from(sorted(SIZES)), st.floats(0.01, 10), min_size=1)
stages = st.lists(st.builds(StagePlan, weights, st.integers(1, 8)), min_size=1, max_size=3)


class Numbers:
    """A source that says which sample it was asked for."""

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        return Sample(f"{self.name}[{index}]", (), None, "text", {})

    def fingerprint(self) -> str:
        return self.name


@settings(max_examples=60)
@given(stages=stages, batch_size=st.integers(1, 5), seed=st.integers(0, 3), data=st.data())
def test_starting_late_gives_the_tail(stages: list[StagePlan], batch_size: int, seed: int, data: st.DataObject) -> None:
    whole = BatchPlan(SIZES, stages, batch_size, seed=seed)
    start = data.draw(st.integers(0, len(whole)))
    late = BatchPlan(SIZES, stages, batch_size, seed=seed, start=start)
    assert len(late) == len(whole) == sum(stage.batches for stage in stages)
    assert list(late) == list(whole)[start:]


@settings(max_examples=60)
@given(stages=stages, batch_size=st.integers(1, 4), world=st.integers(1, 4))
def test_ranks_share_the_batches_of_one_rank(stages: list[StagePlan], batch_size: int, world: int) -> None:
    alone = list(BatchPlan(SIZES, stages, batch_size * world, seed=1))
    ranks = [list(BatchPlan(SIZES, stages, batch_size, seed=1, rank=rank, world=world)) for rank in range(world)]
    for step, batch in enumerate(alone):
        assert [index for rank in ranks for index in rank[step]] == batch


@settings(max_examples=60)
@given(stages=stages, batch_size=st.integers(1, 5), seed=st.integers(0, 3))
def test_every_sample_is_drawn_once_in_every_epoch(stages: list[StagePlan], batch_size: int, seed: int) -> None:
    plan = BatchPlan(SIZES, stages, batch_size, seed=seed)
    drawn: Counter[SampleIndex] = Counter()
    for batch in plan:
        drawn.update(batch)
        for name, size in SIZES.items():
            times = [drawn[SampleIndex(name, index)] for index in range(size)]
            # Inside a batch the order is shuffled, so that this holds at its end.
            assert max(times) - min(times) <= 1
    for name, size in SIZES.items():
        total = sum(count for index, count in drawn.items() if index.source == name)
        assert plan.epochs()[name] == pytest.approx(total / size)


@settings(max_examples=80)
@given(
    shares=st.lists(st.floats(0.001, 1), min_size=1, max_size=6),
    start=st.integers(0, 500),
    length=st.integers(1, 300),
)
def test_any_window_keeps_the_weights(shares: list[float], start: int, length: int) -> None:
    weights = {f"source {number}": share for number, share in enumerate(shares)}
    plan = BatchPlan(dict.fromkeys(weights, 1000), [StagePlan(weights, 800)], 1, start=start)
    window = Counter(batch[0].source for batch in islice(plan, length))
    for name, share in weights.items():
        assert abs(window[name] - length * share / math.fsum(shares)) <= 3


def test_orders_differ_by_epoch_source_and_seed() -> None:
    def orders(seed: int) -> list[tuple[int, ...]]:
        plan = BatchPlan({"a": 50, "b": 50}, [StagePlan({"a": 1}, 2), StagePlan({"b": 1}, 1)], 50, seed=seed)
        return [tuple(index.index for index in batch) for batch in plan]

    seen = orders(0) + orders(1)
    assert len(set(seen)) == len(seen) == 6
    assert all(sorted(order) == list(range(50)) for order in seen)
    assert orders(0) == orders(0)


def test_a_plan_may_be_gone_through_again() -> None:
    plan = BatchPlan(SIZES, STAGES, 4, start=3)
    assert list(plan) == list(plan)


def test_the_order_is_fixed() -> None:
    """Checkpoints of older versions go on with the same samples: a change here breaks every run under way."""
    plan = BatchPlan(SIZES, STAGES[1:], 4, seed=5)
    assert [[(one.source[0], one.index) for one in batch] for batch in islice(plan, 3)] == [
        [("i", 0), ("i", 5), ("i", 6), ("a", 4)],
        [("i", 10), ("i", 13), ("t", 1), ("a", 5)],
        [("i", 2), ("i", 16), ("a", 1), ("i", 1)],
    ]


def test_stage_of_names_the_stage() -> None:
    plan = BatchPlan(SIZES, STAGES, 4)
    assert [plan.stage_of(batch) for batch in range(len(plan))] == [0] * 5 + [1] * 9 + [2] * 4
    for batch in (-1, 18):
        with pytest.raises(IndexError, match=rf"batch {batch} of a plan with 18 batches"):
            plan.stage_of(batch)
    assert {one.source for batch in list(plan)[:5] for one in batch} == {"align"}
    assert {one.source for batch in list(plan)[14:] for one in batch} == {"instruct"}  # a weight of 0 draws nothing


def test_no_rank_always_meets_the_same_source() -> None:
    """Two sources of equal weight alternate; without a shuffle, each of two ranks would get one of them."""
    plan = BatchPlan({"a": 100, "b": 100}, [StagePlan({"a": 1, "b": 1}, 100)], 1, rank=0, world=2)
    assert 30 < sum(batch[0].source == "a" for batch in plan) < 70


def test_a_late_start_costs_nothing() -> None:
    """The ten-millionth batch comes as quickly as the first: nothing is drawn and discarded."""
    plan = BatchPlan(SIZES, [StagePlan({"align": 1, "text": 2}, 10**10)], 32, start=10**10 - 2)
    assert [len(batch) for batch in plan] == [32, 32]
    assert plan.epochs()["align"] == pytest.approx(32 * 10**10 / 3 / 7)


@pytest.mark.parametrize(
    ("sizes", "plans", "arguments", "message"),
    [
        (SIZES, [StagePlan({"instuct": 1}, 1)], {}, "stage 0: unknown source 'instuct': did you mean 'instruct'?"),
        (SIZES, [*STAGES, StagePlan({"align": 0.0}, 1)], {}, "stage 3: all weights are zero"),
        (SIZES, [StagePlan({}, 1)], {}, "stage 0: all weights are zero"),
        (SIZES, [StagePlan({"align": -1, "text": 2}, 1)], {}, "stage 0: the weight of 'align' must be a number from 0"),
        (SIZES, [StagePlan({"align": math.nan}, 1)], {}, "stage 0: the weight of 'align' must be a number from 0"),
        (SIZES, [StagePlan({"align": math.inf}, 1)], {}, "stage 0: the weight of 'align' must be a number from 0"),
        (SIZES, [StagePlan({"align": 1}, 0)], {}, "stage 0: batches must be at least 1, got 0"),
        (SIZES, [], {}, "a plan needs at least one stage"),
        ({"align": 0}, [StagePlan({"align": 1}, 1)], {}, "source 'align' is empty"),
        (SIZES, STAGES, {"batch_size": 0}, "expected batch_size >= 1 and seed >= 0, got 0 and 0"),
        (SIZES, STAGES, {"seed": -1}, "expected batch_size >= 1 and seed >= 0, got 4 and -1"),
        (SIZES, STAGES, {"rank": 2, "world": 2}, "expected 0 <= rank < world, got rank 2 of 2"),
        (SIZES, STAGES, {"start": 19}, "start must be between 0 and the number of batches 18, got 19"),
    ],
)
def test_what_cannot_be_planned_is_named(sizes: dict, plans: list, arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        BatchPlan(sizes, plans, **{"batch_size": 4, **arguments})
    assert str(raised.value).startswith(message)


def test_an_unknown_source_of_a_mixture_is_named() -> None:
    with pytest.raises(ConfigError, match=r"unknown source 'alignn': did you mean 'align'\?"):
        MixtureDataset({"align": Numbers("align", 3)})[SampleIndex("alignn", 0)]


def keys(samples: list[Sample]) -> list[str]:
    return [sample.key for sample in samples]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_yields_the_plan(workers: int) -> None:
    plan = BatchPlan(SIZES, STAGES, 4, seed=3, start=2)
    dataset = MixtureDataset({name: Numbers(name, size) for name, size in SIZES.items()})
    loader = DataLoader(dataset, batch_sampler=plan, num_workers=workers, collate_fn=keys)
    assert list(loader) == [[f"{one.source}[{one.index}]" for one in batch] for batch in plan]
    assert len(loader) == 18  # the whole run, wherever it starts


def test_indices_can_be_sent_to_other_processes() -> None:
    index = SampleIndex("align", 3)
    assert pickle.loads(pickle.dumps(index)) == index  # noqa: S301  # safe: pickled on this line
