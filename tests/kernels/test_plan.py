"""The planner: what its lists and bits rebuild is the mask, whatever the tokens, the rules and the tiles."""

from __future__ import annotations

import re
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfuse.fusion import FUSIONS
from mmfuse.fusion.base import axis_of, base_visibility
from mmfuse.kernels import Axis, Condition, Rules, Visibility
from mmfuse.kernels.plan import BlockPlan, TileLists, owner_of, plan_blocks
from mmfuse.kernels.tiles import pack_bits
from mmfuse.sequence import TokenMap

NAMES = ("alpha", "beta", "gamma")
SHAPES = ((1, 1), (2, 4), (3, 8), (8, 3), (16, 16), (32, 64), (64, 64), (128, 64), (64, 128))

conditions = st.lists(st.sampled_from(list(Condition)), max_size=2).map(
    lambda some: Condition(sum({int(c) for c in some}))
)
rule_tables = st.dictionaries(
    st.sampled_from(list(product(range(3), repeat=2))), st.lists(conditions, min_size=1, max_size=2), max_size=9
)


def random_axis(generator: torch.Generator, batch: int, count: int, orderly: bool) -> Axis:
    """Tokens in runs, as real ones are, or at random; some are padding."""

    def runs(low: int, high: int) -> torch.Tensor:
        changes = torch.rand(batch, count, generator=generator) < 0.15
        values = torch.randint(low, high, (batch, count), generator=generator)
        return values.gather(1, changes.int().cumsum(1).clamp(max=max(0, count - 1))) if orderly else values

    slot = torch.arange(count).expand(batch, count)
    rank = slot if orderly else torch.randint(0, 6, (batch, count), generator=generator)
    document = runs(-1, 2)
    y, x, top, left = (torch.randint(0, 4, (batch, count), generator=generator) for _ in range(4))
    bottom, right = (low + torch.randint(-1, 3, low.shape, generator=generator) for low in (top, left))
    place = {"y": y, "x": x, "top": top, "bottom": bottom, "left": left, "right": right}
    return Axis(document, rank, runs(-1, 3), runs(-1, 3), runs(0, 3), slot, runs(-1, 3), **place)


def brute_force(visibility: Visibility) -> torch.Tensor:
    """The definition, pair by pair; it shares no code with the package."""
    queries, keys, rules = visibility.queries, visibility.keys, visibility.rules
    names = (
        *("document", "rank", "segment", "turn", "cls", "slot", "ref"),
        *("y", "x", "top", "bottom", "left", "right"),
    )
    rows = {name: getattr(queries, name).tolist() for name in names}
    columns = {name: getattr(keys, name).tolist() for name in names}
    seen = torch.zeros(visibility.shape, dtype=torch.bool)
    for b, i, j in product(*(range(size) for size in visibility.shape)):
        q, k = ({name: side[name][b][at] for name in names} for side, at in ((rows, i), (columns, j)))
        wanted = {
            1: q["rank"] >= k["rank"],
            2: q["slot"] == k["slot"],
            4: q["segment"] == k["segment"],
            8: q["turn"] == k["turn"],
            16: q["ref"] == k["segment"],
            32: q["top"] <= k["y"] <= q["bottom"] and q["left"] <= k["x"] <= q["right"],
        }
        near = visibility.window is None or abs(q["slot"] - k["slot"]) < visibility.window
        if near and q["document"] >= 0 and q["document"] == k["document"]:
            terms = rules.get((q["cls"], k["cls"]), ())
            seen[b, i, j] = any(all(holds for bit, holds in wanted.items() if int(term) & bit) for term in terms)
    return seen


def check_lists(lists: TileLists, owners: int, others: int) -> torch.Tensor:
    """How often each tile is listed, `[owners, others]`; offsets, order and ranges are sound."""
    counts = torch.zeros(owners, others, dtype=torch.int64)
    for offsets, blocks in (
        (lists.full_offsets, lists.full_blocks),
        (lists.partial_offsets, lists.partial_blocks),
    ):
        assert offsets.dtype == blocks.dtype == torch.int32
        assert int(offsets[-1]) == len(blocks) and len(offsets) == owners + 1
        counts.index_put_((owner_of(offsets), blocks.long()), torch.ones(len(blocks), dtype=torch.int64), True)
    assert lists.order.sort().values.tolist() == list(range(owners))
    work = 2 * lists.full_offsets.diff() + 3 * lists.partial_offsets.diff()
    assert bool((work[lists.order.long()].diff() <= 0).all()), "heaviest first"
    return counts


def check_plan(plan: BlockPlan, mask: torch.Tensor) -> None:
    assert torch.equal(plan.dense(), mask)
    assert torch.equal(plan.dense(by_key=True), mask)
    by_query = check_lists(plan.by_query, plan.batch * plan.query_blocks, plan.key_blocks)
    by_key = check_lists(plan.by_key, plan.batch * plan.key_blocks, plan.query_blocks)
    assert bool((by_query <= 1).all())
    turned = by_key.unflatten(0, (plan.batch, plan.key_blocks)).transpose(1, 2).flatten(0, 1)
    assert torch.equal(by_query, turned)
    assert plan.visible == int(mask.sum())
    assert len(plan.words) == len(plan.words_t) == len({tuple(w.flatten().tolist()) for w in plan.words})


@settings(max_examples=1000)
@given(
    seed=st.integers(0, 1 << 30),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40)),
    rules=rule_tables,
    window=st.one_of(st.none(), st.integers(1, 30)),
    orderly=st.booleans(),
    same=st.booleans(),
)
def test_plan_rebuilds_the_mask(
    seed: int, sizes: tuple[int, int, int], rules: Rules, window: int | None, orderly: bool, same: bool
) -> None:
    """A thousand masks and more (a batch holds up to three different ones), in nine tile shapes."""
    generator = torch.Generator().manual_seed(seed)
    batch, count, others = sizes
    queries = random_axis(generator, batch, count, orderly)
    keys = queries if same else random_axis(generator, batch, others, orderly)
    visibility = Visibility(queries, keys, rules, NAMES, window)
    mask = visibility.dense()
    assert torch.equal(mask, brute_force(visibility))
    for block_q, block_k in SHAPES:
        check_plan(plan_blocks(visibility, block_q, block_k), mask)


@pytest.mark.parametrize("name", FUSIONS)
def test_plan_of_every_strategy(name: str) -> None:
    layout = [("text", 20), ("image", 70), ("text", 90), ("answer", 30), ("image", 64), ("text", 9), ("answer", 12)]
    maps = [TokenMap.from_layout(layout), TokenMap.from_layout(layout[:3])]
    for tokens in (TokenMap.pack(maps), TokenMap.batch(maps, side="left"), TokenMap.batch(maps, side="right")):
        whole = FUSIONS[name]().visibility(tokens)
        for visibility in (whole, whole.rows(100), whole.view(window=50, keys=200)):
            for block_q, block_k in ((64, 64), (128, 64), (64, 128)):
                check_plan(plan_blocks(visibility, block_q, block_k), visibility.dense())


def test_plan_of_a_long_causal_document_is_all_but_free_of_bits() -> None:
    plan = plan_blocks(base_visibility(TokenMap.from_layout([("text", 1024)])))
    assert (plan.full, plan.partial, len(plan.words)) == (16 * 15 // 2, 16, 1)
    assert plan.visible == 1024 * 1025 // 2
    assert plan.density == pytest.approx(1025 / 2048)
    assert plan.tile_efficiency == pytest.approx(1025 / (17 * 64))
    assert plan.useful_flops(2, 8) == 4 * 2 * 8 * plan.visible
    assert plan.useful_flops(2, 8, backward=True) == 14 * 2 * 8 * plan.visible
    assert plan.nbytes < 20_000
    assert plan.by_query.order[0] == 15 and plan.by_key.order[0] == 0


def test_plan_is_made_once_for_each_tile_shape() -> None:
    visibility = base_visibility(TokenMap.from_layout([("text", 9)]))
    assert plan_blocks(visibility) is plan_blocks(visibility, 64, 64)
    assert plan_blocks(visibility, 16, 64) is not plan_blocks(visibility)
    with pytest.raises(ValueError, match=re.escape("sides of a tile are 1..64 or a multiple of 64, got 96×64")):
        plan_blocks(visibility, 96, 64)


def test_an_empty_mask_has_a_plan() -> None:
    axis = axis_of(TokenMap.from_layout([("text", 70)]))
    plan = plan_blocks(Visibility(axis, axis, {}, NAMES))
    assert (plan.full, plan.partial, plan.visible, plan.density, plan.tile_efficiency) == (0, 0, 0, 0.0, 1.0)
    assert not plan.dense().any() and not plan.dense(by_key=True).any()


@pytest.mark.parametrize("columns", [1, 8, 63, 64, 65, 128, 130])
def test_bits_are_in_their_places(columns: int) -> None:
    seen = torch.rand(3, 5, columns) < 0.5
    words = pack_bits(seen)
    assert words.shape == (3, 5, -(-columns // 64))
    for u, i, j in product(range(3), range(5), range(columns)):
        assert bool((int(words[u, i, j // 64]) >> (j % 64)) & 1) == bool(seen[u, i, j])
