"""Packing to a budget of tokens, and cutting what is too long."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmfuse.data.packing import is_supervised, pack, truncate
from mmfuse.models import MultimodalProcessor
from mmfuse.models.chat import EncodedSample
from mmfuse.sequence import Modality, TokenMap

RUNS = st.lists(
    st.tuples(st.sampled_from(["text", "image", "audio", "answer"]), st.integers(1, 6)), min_size=1, max_size=8
)


def encoded(runs: list[tuple[str, int]], key: str = "sample") -> EncodedSample:
    tokens = TokenMap.from_layout(runs)
    table = torch.stack([tokens.modality, tokens.role, tokens.segment, tokens.turn])[:, 0].numpy()
    media: dict[str, list[Any]] = {}
    for kind, _ in runs:
        if kind in ("image", "audio"):
            media.setdefault(kind, []).append(f"{kind} {len(media.get(kind, []))}")
    return EncodedSample(np.arange(5, 5 + table.shape[1]), table, media, key)


@given(lengths=st.lists(st.integers(1, 40), max_size=60), budget=st.integers(40, 80))
def test_rows_hold_every_sample_once_and_keep_the_budget(lengths: list[int], budget: int) -> None:
    rows = pack(lengths, budget)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[number] for number in row) <= budget for row in rows)
    assert all(row == sorted(row) for row in rows)
    # Best fit decreasing: 11/9 of the fewest possible rows, and one.
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // budget) * 2 + 1
    assert sum(sum(lengths[number] for number in row) <= budget // 2 for row in rows) <= 1, "no two rows fit into one"


def test_best_fit_takes_the_fullest_row_that_has_room() -> None:
    assert pack([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    with pytest.raises(ValueError, match="a sample of 11 tokens does not fit into a row of 10"):
        pack([3, 11], 10)


@given(runs=RUNS, limit=st.integers(0, 40))
def test_truncation_never_cuts_through_a_medium(runs: list[tuple[str, int]], limit: int) -> None:
    whole = encoded(runs)
    short = truncate(whole, limit)
    assert len(short) <= max(limit, 0) or len(whole) <= limit
    np.testing.assert_array_equal(short.table, whole.table[:, : len(short)])
    np.testing.assert_array_equal(short.input_ids, whole.input_ids[: len(short)])
    kept: dict[str, int] = {}
    end = 0
    for kind, length in runs:
        end += length
        if kind in ("image", "audio") and end <= len(short):
            kept[kind] = kept.get(kind, 0) + 1
        elif kind in ("image", "audio"):
            assert len(short) <= end - length, "not a token of a medium that is not whole"
    assert dict(short.media.items()) == {name: whole.media[name][:count] for name, count in kept.items()}
    if len(short) < min(limit, len(whole)):
        assert whole.table[0][len(short)] != Modality.TEXT, "shorter than the limit only where a medium begins"


def test_a_sample_without_answer_is_not_supervised() -> None:
    sample = encoded([("image", 4), ("text", 3), ("answer", 2)])
    assert is_supervised(truncate(sample, 8)) and not is_supervised(truncate(sample, 7))
    assert truncate(sample, 3).media == {} and len(truncate(sample, 3)) == 0


def rows_of(batch: Mapping[str, Any], lengths: list[int], packed: list[list[int]]) -> dict[str, Any]:
    """The samples of an unpacked batch, packed by `TokenMap.pack`, which is the law for packing."""
    maps = [batch["tokens"].rows(row).columns(0, length) for row, length in enumerate(lengths)]
    packs = [TokenMap.pack([maps[one] for one in row]) for row in packed]
    width = max(map(len, packs))
    ids = torch.zeros(len(packed), width, dtype=torch.long)
    for number, row in enumerate(packed):
        joined = torch.cat([batch["input_ids"][one, : lengths[one]] for one in row])
        ids[number, : len(joined)] = joined
    return {"input_ids": ids, "tokens": TokenMap.batch(packs)}


@given(layouts=st.lists(RUNS, min_size=1, max_size=6), data=st.data())
def test_collated_rows_are_what_token_map_packs(layouts: list[list[tuple[str, int]]], data: st.DataObject) -> None:
    samples = [encoded(runs, str(number)) for number, runs in enumerate(layouts)]
    packed = pack([len(sample) for sample in samples], data.draw(st.integers(48, 90)))
    bare = MultimodalProcessor.__new__(MultimodalProcessor)
    bare.media_tokens = {}  # no media are collated here, only places
    bare.tokenizer = type("Tokenizer", (), {"pad_token_id": 0})()
    alone = bare.collate(samples)
    rows = bare.collate_rows([[samples[one] for one in row] for row in packed])
    expected = rows_of(alone, [len(sample) for sample in samples], packed)
    assert rows["tokens"] == expected["tokens"]
    assert torch.equal(rows["input_ids"], expected["input_ids"])
