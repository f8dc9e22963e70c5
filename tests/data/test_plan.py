from __future__ import annotations

import math
from collections import Counter
from itertools import islice, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfuse.data import Draw, Plan, StagePlan
from mmfuse.data.shuffle import BlockShuffle
from mmfuse.errors import ConfigError

PARTS = {"align": [4, 3], "instruct": [10, 10], "text": [3]}
SIZES = {name: sum(counts) for name, counts in PARTS.items()}
STAGES = [
    StagePlan({"align": 1.0}, 5),
    StagePlan({"instruct": 3, "align": 1, "text": 0.5}, 9),
    StagePlan({"text": 0, "instruct": 1}, 4),
]

weights = st.dictionaries(st.sampled_from(sorted(PARTS)), st.floats(0.01, 10), min_size=1)
stages = st.lists(st.builds(StagePlan, weights, st.integers(1, 8)), min_size=1, max_size=3)


def batches(plan: Plan) -> list[list[Draw]]:
    """All windows of all stages, where a window is a batch."""
    return [
        plan.window(stage, number)
        for stage, (begin, end) in enumerate(zip(plan.starts, plan.starts[1:], strict=False))
        for number in range(end - begin)
    ]


@settings(max_examples=60)
@given(stages=stages, window=st.integers(1, 5), seed=st.integers(0, 3), lanes=st.integers(1, 4))
def test_every_sample_is_drawn_once_in_every_epoch(stages: list[StagePlan], window: int, seed: int, lanes: int) -> None:
    """Across stages, and however many lanes there are."""
    drawn: Counter[tuple[str, int]] = Counter()
    for batch in batches(Plan(PARTS, stages, window=window, seed=seed, lanes=lanes)):
        drawn.update((draw.source, draw.sample) for draw in batch)
        for name, size in SIZES.items():
            times = [drawn[name, sample] for sample in range(size)]
            # Inside a window the order is shuffled, so that this holds at its end.
            assert max(times) - min(times) <= 1


@settings(max_examples=60)
@given(stages=stages, window=st.integers(1, 9), lanes=st.integers(1, 5), staggered=st.booleans())
def test_windows_cover_the_slots_without_gap(stages: list[StagePlan], window: int, lanes: int, staggered: bool) -> None:
    """Nothing is left out between windows, also where the first ones are shorter."""
    plan = Plan(PARTS, stages, window=window, lanes=lanes, window_is_batch=not staggered)
    for stage in range(len(stages)):
        drawn = Counter(draw for number in range(3 * lanes) for draw in plan.window(stage, number))
        assert max(drawn.values()) == 1, "a draw is of one window only"
        for name in SIZES:
            own = sorted((draw.epoch, draw.sample) for draw in drawn if draw.source == name)
            epochs = Counter(epoch for epoch, _ in own)
            whole = sorted(epochs)[1:-1]
            assert all(epochs[epoch] == SIZES[name] for epoch in whole)
    if staggered:
        sizes = [len(plan.window(0, number)) for number in range(2 * lanes)]
        assert sizes[lanes:] == [window] * lanes and sizes[:lanes] == sorted(sizes[:lanes])


@settings(max_examples=80)
@given(
    shares=st.lists(st.floats(0.001, 1), min_size=1, max_size=6),
    start=st.integers(0, 500),
    length=st.integers(1, 300),
)
def test_any_run_of_slots_keeps_the_weights(shares: list[float], start: int, length: int) -> None:
    weights = {f"source {number}": share for number, share in enumerate(shares)}
    plan = Plan({name: [1000] for name in weights}, [StagePlan(weights, 800)], window=1)
    drawn = Counter(plan.window(0, number)[0].source for number in range(start, start + length))
    for name, share in weights.items():
        assert abs(drawn[name] - length * share / math.fsum(shares)) <= 3


@given(shares=st.lists(st.floats(0.001, 1), min_size=2, max_size=2), slots=st.integers(1, 2000))
def test_two_sources_are_never_a_sample_off(shares: list[float], slots: int) -> None:
    plan = Plan({"a": [10**4], "b": [10**4]}, [StagePlan({"a": shares[0], "b": shares[1]}, 1)], window=slots)
    drawn = Counter(draw.source for draw in plan.window(0, 0))
    assert abs(drawn["a"] - slots * shares[0] / sum(shares)) <= 1


def test_orders_differ_by_epoch_source_and_seed() -> None:
    def orders(seed: int) -> list[tuple[int, ...]]:
        plan = Plan({"a": [50], "b": [50]}, [StagePlan({"a": 1}, 2), StagePlan({"b": 1}, 1)], window=50, seed=seed)
        return [tuple(draw.sample for draw in batch) for batch in batches(plan)]

    seen = orders(0) + orders(1)
    assert len(set(seen)) == len(seen) == 6
    assert all(sorted(order) == list(range(50)) for order in seen)
    assert orders(0) == orders(0)


def test_the_order_is_fixed() -> None:
    """Checkpoints of older versions go on with the same samples: a change here breaks every run under way."""
    plan = Plan(PARTS, STAGES[1:], window=4, seed=5)
    assert [[(draw.source[0], draw.sample) for draw in batch] for batch in islice(batches(plan), 3)] == [
        [("i", 0), ("i", 5), ("i", 6), ("a", 4)],
        [("i", 10), ("i", 13), ("t", 1), ("a", 5)],
        [("i", 2), ("i", 16), ("a", 1), ("i", 1)],
    ]
    blocks = BlockShuffle([3, 2, 4, 1, 5], "a", 5, block=6)
    assert [blocks(position) for position in range(13, 18)] == [(0, 2), (0, 1), (1, 3), (1, 7), (1, 5)]


def test_stages_and_lanes_of_batches() -> None:
    plan = Plan(PARTS, STAGES, window=4, lanes=3)
    assert len(plan) == 18
    assert [plan.stage_of(batch) for batch in range(18)] == [0] * 5 + [1] * 9 + [2] * 4
    assert [plan.lane_of(batch) for batch in (4, 5, 6, 13, 14)] == [(0, 1), (1, 0), (1, 1), (1, 2), (2, 0)]
    for batch in (-1, 18):
        with pytest.raises(IndexError, match=rf"batch {batch} of a plan with 18 batches"):
            plan.stage_of(batch)
    assert {draw.source for batch in batches(plan)[:5] for draw in batch} == {"align"}
    assert {draw.source for batch in batches(plan)[14:] for draw in batch} == {"instruct"}  # weight 0 draws nothing


def test_no_rank_always_meets_the_same_source() -> None:
    """Two sources of equal weight alternate; without a shuffle, windows would have a pattern of sources."""
    plan = Plan({"a": [100], "b": [100]}, [StagePlan({"a": 1, "b": 1}, 100)], window=2)
    assert 30 < sum(batch[0].source == "a" for batch in batches(plan)) < 70


def test_where_windows_are_no_batches_stages_begin_new_epochs() -> None:
    plan = Plan(PARTS, [StagePlan({"align": 1}, 3)] * 2, window=7, window_is_batch=False, lanes=1)
    first, second = plan.window(0, 0), plan.window(1, 0)
    assert sorted(draw.sample for draw in first) == sorted(draw.sample for draw in second) == list(range(7))
    assert {draw.epoch for draw in first}.isdisjoint({draw.epoch for draw in second})
    assert first != second


def test_a_late_window_costs_nothing() -> None:
    """The ten-thousand-millionth window comes as the first does: nothing is drawn and discarded."""
    plan = Plan(PARTS, [StagePlan({"align": 1, "text": 2}, 10**10)], window=32)
    assert len(plan.window(0, 10**10 - 1)) == 32


# Orders of one source


@given(
    parts=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    block=st.integers(1, 40),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 3),
)
def test_an_epoch_is_a_permutation(parts: list[int], block: int, seed: int, epoch: int) -> None:
    order, size = BlockShuffle(parts, "a", seed, block), sum(parts)
    found = [order(position) for position in range(epoch * size, (epoch + 1) * size)]
    assert {number for number, _ in found} == {epoch}
    assert sorted(sample for _, sample in found) == list(range(size))


def test_a_block_is_a_few_shards() -> None:
    """Reading any run of samples touches the shards of two blocks at most."""
    order = BlockShuffle([10] * 100, "a", seed=1, block=40)
    shards = [order(position)[1] // 10 for position in range(1000)]
    for begin in range(960):
        assert len(set(shards[begin : begin + 40])) <= 8
    assert shards[:400] != sorted(shards[:400])
    neighbours = sum(one == other for one, other in pairwise(shards))
    assert neighbours < 350, "samples of one shard do not stand together: about a quarter by chance"


def test_a_large_source_is_shuffled_in_little_memory() -> None:
    """A thousand million samples: only shards and one block are ever listed."""
    order = BlockShuffle([10_000] * 100_000, "a", seed=1)
    assert len({order(10**12 + position)[1] for position in range(1000)}) == 1000
    assert sum(len(samples) for samples in order._orders.values()) < 4 * (1 << 17)


@pytest.mark.parametrize(
    ("parts", "plans", "arguments", "message"),
    [
        (PARTS, [StagePlan({"instuct": 1}, 1)], {}, "stage 0: unknown source 'instuct': did you mean 'instruct'?"),
        (PARTS, [*STAGES, StagePlan({"align": 0.0}, 1)], {}, "stage 3: all weights are zero"),
        (PARTS, [StagePlan({}, 1)], {}, "stage 0: all weights are zero"),
        (PARTS, [StagePlan({"align": -1, "text": 2}, 1)], {}, "stage 0: the weight of 'align' must be a number from 0"),
        (PARTS, [StagePlan({"align": math.nan}, 1)], {}, "stage 0: the weight of 'align' must be a number from 0"),
        (PARTS, [StagePlan({"align": math.inf}, 1)], {}, "stage 0: the weight of 'align' must be a number from 0"),
        (PARTS, [StagePlan({"align": 1}, 0)], {}, "stage 0: batches must be at least 1, got 0"),
        (PARTS, [], {}, "a plan needs at least one stage"),
        ({"align": []}, [StagePlan({"align": 1}, 1)], {}, "source 'align' is empty"),
        (PARTS, STAGES, {"window": 0}, "expected window >= 1, lanes >= 1 and seed >= 0, got 0, 1 and 0"),
        (PARTS, STAGES, {"seed": -1}, "expected window >= 1, lanes >= 1 and seed >= 0, got 4, 1 and -1"),
    ],
)
def test_what_cannot_be_planned_is_named(parts: dict, plans: list, arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Plan(parts, plans, **{"window": 4, **arguments})
    assert str(raised.value).startswith(message)
