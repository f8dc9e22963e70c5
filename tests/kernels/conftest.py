"""Plans of blocks made by brute force from a dense mask: the kernels are tested apart from the planner."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from mmfuse.kernels.plan import BlockPlan, TileLists


def _lists(tiles: Tensor) -> tuple[TileLists, Tensor]:
    """One orientation and its words from bool `[B, rows, columns, R, C]`; the order of work is from back to front."""
    whole = tiles.flatten(-2).all(-1).flatten(0, 1)
    part = tiles.flatten(-2).any(-1).flatten(0, 1) & ~whole
    offsets = [torch.cat([torch.zeros(1, dtype=torch.long), x.sum(1).cumsum(0)]).int() for x in (whole, part)]
    bits = tiles.flatten(0, 1)[part].unflatten(-1, (-1, 64)).long() << torch.arange(64)
    lists = TileLists(
        full_offsets=offsets[0],
        full_blocks=whole.nonzero()[:, 1].int(),
        partial_offsets=offsets[1],
        partial_blocks=part.nonzero()[:, 1].int(),
        partial_tiles=torch.arange(int(part.sum()), dtype=torch.int32),
        order=torch.arange(len(whole), dtype=torch.int32).flip(0),
    )
    return lists, bits.sum(-1)


def _plan(seen: Tensor, block_q: int = 64, block_k: int = 64) -> BlockPlan:
    batch, queries, keys = seen.shape
    rows, columns = -(-queries // block_q), -(-keys // block_k)
    padded = torch.zeros(batch, rows * block_q, columns * block_k, dtype=torch.bool)
    padded[:, :queries, :keys] = seen
    tiles = padded.view(batch, rows, block_q, columns, block_k).transpose(2, 3)
    by_query, words = _lists(tiles)
    # No tile is shared: each orientation may number its own.
    by_key, words_t = _lists(tiles.transpose(1, 2).transpose(3, 4))
    return BlockPlan(batch, queries, keys, block_q, block_k, by_query, by_key, words, words_t, visible=int(seen.sum()))


@pytest.fixture(scope="session")
def by_force() -> Callable[..., BlockPlan]:
    """Maker of the plan of `seen [B, Sq, Sk]` in blocks of a given shape."""
    return _plan


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nobody has written to holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
